"""How fast the demos' servers are said to be."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from specontext_vllm.demo import speed
from specontext_vllm.demo.asking import Servers
from specontext_vllm.demo.speed import Speeds


@pytest.mark.parametrize(
    "sparse, dense, seen",
    [
        ((220, 180, 300), (100, 100, 100), "specontext was 2.20 times as fast (1.80 to 3.00 in 3"),
        ((80, 90, 60), (100, 100, 100), "specontext was slower: 0.80 times stock vLLM's speed (0."),
        ((220, 90, 230), (100, 100, 100), "Neither was the faster one in all of 3 rounds: specont"),
        ((100.4, 100.3, 101), (100, 100, 100), "Neither was the faster one in all of 3 rounds: sp"),
        # The ratio is the rounds', not that of the medians: 100 and 100.
        ((100, 50, 300), (50, 100, 100), "had 0.50 to 3.00 times stock vLLM's speed."),
    ],
    ids=["faster", "slower", "in turns", "the same as printed", "round by round"],
)
def test_the_last_sentence_says_what_was_measured(sparse, dense, seen: str):
    said = Speeds(4, 8000, 256, sparse, dense).sentences()
    assert seen in said
    assert said.startswith(
        "4 replies of 256 tokens at once, each after 8,000 tokens that had been "
    )


def test_both_servers_medians_are_said():
    said = Speeds(4, 8000, 256, (1, 500, 501), (90, 250, 99)).sentences()
    assert "500 tokens/s with specontext, 99 with stock vLLM." in said


def test_servers_take_turns_and_the_first_round_does_not_count(monkeypatch):
    asked = []

    def answer_all(server, model, questions, tokens):
        asked.append(server)
        return len(asked), 100 + len(asked)

    monkeypatch.setattr(speed, "answer_all", answer_all)
    pipe = io.StringIO()
    measured = speed.measure(
        Console(file=pipe, width=160), Servers("ours", "theirs", "demo"), [None], rounds=2, tokens=9
    )
    assert asked == ["ours", "theirs"] * 3
    assert measured == Speeds(1, 106, 9, (3, 5), (4, 6))
    assert "round 2 of 2: specontext 5 tokens/s, dense 6 tokens/s\n" in pipe.getvalue()
