"""How many drafts a model accepts, from the verdicts on rounds of the most drafts; the prompts of
chats and the picture. Engines are not started.
"""

from __future__ import annotations

import random

import pytest
from typer.testing import CliRunner

from benchmarks.__main__ import app
from benchmarks.acceptance import plots
from benchmarks.acceptance.chat import QUESTIONS, chat_group
from benchmarks.acceptance.command import LENGTHS, accepted_rows
from benchmarks.real.prompts import PromptError, Writer
from benchmarks.real.texts import Texts
from benchmarks.shapes import DEMO_MODEL
from specontext_vllm.engine.draft_length import MAX_DRAFTS


@pytest.fixture(scope="module")
def writer():
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(str(DEMO_MODEL))
    words = random.Random(5).choices(
        "the amber key of Osric lies in Quenby, far away.".split(), k=4000
    )
    return Writer(tokenizer, Texts([[" ".join(words)]], tokenizer))


def test_a_shorter_round_accepts_what_the_longer_one_does_up_to_its_end():
    draws = random.Random(3)
    verdicts = [draws.randint(0, MAX_DRAFTS) for _ in range(200)]
    row = accepted_rows(verdicts)
    assert row["rounds"] == 200
    for k in LENGTHS:
        assert row[f"accepted_{k}"] == pytest.approx(sum(min(v, k) for v in verdicts) / 200)
        asked = [v for v in verdicts if v >= k - 1]
        assert row[f"share_{k}"] == pytest.approx(sum(v >= k for v in asked) / len(asked))


def test_where_nothing_is_accepted_later_positions_have_no_share():
    row = accepted_rows([0, 0, 0])
    assert row["accepted_6"] == 0 and row["share_1"] == 0 and row["share_2"] is None
    assert accepted_rows([])["rounds"] == 0


def test_a_chat_asks_about_a_text_and_leaves_room_for_the_answer(writer):
    group = chat_group(writer, 1024, len(QUESTIONS) + 1, answer=96, seed=0)
    (text,) = writer.texts.sources[0]
    for number, prompt in enumerate(group.prompts):
        assert 1024 - 96 - 8 <= len(prompt.tokens) <= 1024 - 96
        question = QUESTIONS[number % len(QUESTIONS)]
        asked = writer.tokenizer.decode(prompt.tokens)
        before, after = asked.split(question)
        # As the chat template has it: the text in the user's turn, and the answer's turn begun.
        opened = writer.tokenizer.apply_chat_template(
            [{"role": "user", "content": "@"}], add_generation_prompt=True, tokenize=False
        )
        start, end = opened.split("@")
        assert before.startswith(start) and after == end
        assert before.removeprefix(start).rstrip() in text
    assert group.prompts[0] != group.prompts[len(QUESTIONS)], "another text each time"
    assert group == chat_group(writer, 1024, len(QUESTIONS) + 1, answer=96, seed=0)
    assert group != chat_group(writer, 1024, len(QUESTIONS) + 1, answer=96, seed=1)


def test_a_context_without_room_for_a_text_is_refused(writer):
    with pytest.raises(PromptError, match="^--contexts: found 160, too few tokens for chat with"):
        chat_group(writer, 160, 1, answer=96, seed=0)


def test_the_picture_has_a_panel_for_each_task_and_a_curve_for_each_context(tmp_path):
    rows = [
        {"task": task, "context": context, **accepted_rows([context % 7, 3, 6])}
        for context in (2048, 4096)
        for task in ("text", "chat")
    ]
    figure = plots.draw(rows, LENGTHS, "A title", tmp_path / "curve.png")
    assert (tmp_path / "curve.png").read_bytes().startswith(b"\x89PNG")
    assert [axis.get_title() for axis in figure.axes] == ["text", "chat"]
    for axis in figure.axes:
        labels = [line.get_label() for line in axis.get_lines()]
        assert labels == ["all of them", "2,048 tokens", "4,096 tokens"]
        drawn = axis.get_lines()[2].get_ydata()
        assert list(drawn) == [rows[2][f"accepted_{k}"] for k in LENGTHS]


def test_an_unknown_task_is_refused(tmp_path):
    (tmp_path / "a.txt").write_text("text " * 100)
    options = ["--model", str(tmp_path), "--texts", str(tmp_path / "a.txt"), "--head", "x"]
    done = CliRunner().invoke(app, ["acceptance", *options, "--tasks", "poems"])
    assert done.exit_code == 2 and done.output.startswith("--tasks: found 'poems'; use text")
