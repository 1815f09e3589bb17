"""`make demo`: what it asks, and that it always says what it is doing."""

from __future__ import annotations

import io
import time

import pytest
from rich.console import Console
from typer.testing import CliRunner

from specontext_vllm.demo import __main__ as demo
from specontext_vllm.demo import asking, train
from specontext_vllm.demo.model import Model
from specontext_vllm.demo.sizes import SIZES
from specontext_vllm.distillation.draft import DraftModel
from specontext_vllm.synthetic.tasks import FACT_ANSWER


@pytest.mark.parametrize("seed", range(4))
def test_facts_are_asked_for_by_the_word_that_the_model_answers_with(seed: int):
    word = FACT_ANSWER.split()[1]
    problems = demo.make_problems(1000, seed)
    assert [(problem.kind, problem.layout) for problem in problems] == list(demo.ASKED)
    assert len({problem.answer for problem in problems}) == len(problems)
    for problem in problems:
        asked = demo.question(problem).asked
        assert problem.kind != "needle" or (f" {word} " in asked and "number" not in asked)
    assert problems == demo.make_problems(1000, seed) != demo.make_problems(1000, seed + 1)


def test_a_pipe_reads_at_once_what_is_being_done_and_then_for_how_long(monkeypatch):
    monkeypatch.setattr(asking, "PROGRESS_SECONDS", 0.05)
    pipe = io.StringIO()
    with asking.working(Console(file=pipe, width=160, highlight=False), "the server starts"):
        assert pipe.getvalue() == "the server starts ...\n"
        while pipe.getvalue().count("\n") < 3:
            time.sleep(0.01)
    said = pipe.getvalue()
    assert said.splitlines()[1:3] == ["the server starts ... 0 s"] * 2
    time.sleep(0.2)
    assert pipe.getvalue() == said


def test_a_failure_while_working_comes_through():
    with (
        pytest.raises(OSError, match="gone"),
        asking.working(Console(file=io.StringIO()), "asking"),
    ):
        raise OSError("gone")


@pytest.mark.parametrize("tokens", [0, -5, 60000])
def test_prompts_that_cannot_be_made_are_refused_in_one_sentence(tokens: int):
    import typer

    app = typer.Typer()
    app.command()(demo.main)
    result = CliRunner().invoke(app, ["--tokens", str(tokens)])
    assert (
        result.exit_code == 1
        and result.stderr == f"--tokens: found {tokens}; give 256 to 32768.\n"
        and result.stdout == ""
    )


def test_a_training_without_time_for_the_head_ends_in_a_sentence():
    size = SIZES["smoke"]
    model = Model(size, 64)
    draft = DraftModel(train.draft_shape(size, 64))
    with pytest.raises(train.TrainingError, match="no time for a step of the head; give"):
        train.train_head(model, draft, {}, -1.0, "cpu", print)
