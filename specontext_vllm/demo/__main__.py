"""`python -m specontext_vllm.demo`: asks for facts and a passage out of 8,000 tokens, with sparse
and with dense attention.

Starts `vllm serve` with the specontext backend and once more with vLLM's own, asks both in turns
through the OpenAI client, then measures how fast each answers all questions at once. Exit code 0:
every answer of the specontext server was right, however fast; 1: one was not, or a server failed.
"""

from __future__ import annotations

import itertools
import signal
import sys
from functools import partial
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from specontext_vllm.config import ConfigError
from specontext_vllm.demo.asking import Question, ask_both, both_servers, compare
from specontext_vllm.demo.server import device_arguments
from specontext_vllm.demo.speed import measure
from specontext_vllm.extras import require_extra
from specontext_vllm.synthetic.tasks import Problem, make_problem, score

ASKED = (
    ("needle", "question_last"),
    ("needle", "question_first"),
    ("needle", "multi_turn"),
    ("recitation", "question_last"),
)
RIGHT = {"needle": 1.0, "recitation": 0.9}
"""Lowest score of a right answer: a needle's whole value; nine in ten words of a passage, counted
from its start.
"""

SPARE_TOKENS = 32
"""Tokens a reply may have on top of two for each word that is asked for."""

MIN_TOKENS, MAX_TOKENS = 256, 32768
"""Of a prompt: it must hold a question and its answer, and there are names for so many facts."""

WARM_UP_SEED = 1_000_000


def question(problem: Problem) -> Question:
    """How a problem is asked."""
    lines = problem.messages[-1]["content"].splitlines()
    return Question(
        lines[0] if problem.layout == "question_first" else lines[-1],
        problem.messages,
        problem.answer,
        partial(score, problem),
        RIGHT[problem.kind],
        2 * len(problem.answer.split()) + SPARE_TOKENS,
    )


def make_problems(tokens: int, seed: int) -> list[Problem]:
    """The problems of ``ASKED``, each over about ``tokens`` tokens.

    The model answers "The code of NAME is ..." to every question for a fact, whether it asks for
    the code or the number. Here all ask for the code, so that answers read naturally.
    """
    problems = []
    for number, (kind, layout) in enumerate(ASKED):
        made = (
            make_problem(kind, seed=at, approx_tokens=tokens, layout=layout)
            for at in itertools.count(1000 * seed + number, len(ASKED))
        )
        problems.append(
            next(
                problem
                for problem in made
                if kind != "needle" or " code " in question(problem).asked
            )
        )
    return problems


def main(
    model: Annotated[
        Path, typer.Option(help="Model folder with a retrieval_head/ folder in it.")
    ] = Path("models/demo"),
    config: Annotated[Path, typer.Option(help="vLLM's YAML for the specontext server.")] = Path(
        "configs/demo.yaml"
    ),
    tokens: Annotated[int, typer.Option(help="Approximate tokens of each prompt.")] = 8000,
    seed: Annotated[int, typer.Option(help="Chooses the texts and questions.")] = 0,
) -> None:
    """Ask a server with the specontext backend, and one with vLLM's own, for facts and a passage
    out of long prompts.
    """
    try:
        require_extra("openai", "demo", "The demo")
    except ConfigError as error:
        typer.echo(str(error), err=True)
        raise typer.Exit(1) from None
    for option, path in (("--model", model / "config.json"), ("--config", config)):
        if not path.exists():
            typer.echo(
                f"{option}: {path} does not exist; run the demo from the repository's root or name "
                "another.",
                err=True,
            )
            raise typer.Exit(1)
    if not MIN_TOKENS <= tokens <= MAX_TOKENS:
        typer.echo(f"--tokens: found {tokens}; give {MIN_TOKENS} to {MAX_TOKENS}.", err=True)
        raise typer.Exit(1)
    console = Console(width=None if sys.stdout.isatty() else 160, highlight=False)
    console.print(
        f"{len(ASKED)} questions over {tokens:,} tokens each, to a server with specontext and to "
        "one without; a few minutes in all."
    )
    problems = [question(problem) for problem in make_problems(tokens, seed)]
    warm_up = question(
        make_problem(
            "needle", seed=WARM_UP_SEED + seed, approx_tokens=tokens, layout="question_last"
        )
    )
    # SIGTERM ends the demo as Ctrl-C does, servers included.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    arguments = ["--config", str(config.resolve()), *device_arguments()]
    with both_servers(console, model, arguments) as servers:
        sparse, dense = ask_both(console, servers, problems, warm_up)
        speeds = measure(console, servers, problems)
    console.print(compare(problems, sparse, dense))
    wrong = sum(not answer.right for answer in sparse)
    console.print(
        f"{len(sparse) - wrong} of {len(sparse)} answers of the specontext server are right."
    )
    console.print(speeds.sentences())
    raise typer.Exit(1 if wrong else 0)


if __name__ == "__main__":
    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
    app.command()(main)
    app()
