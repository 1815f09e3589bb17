"""`python -m specontext_vllm.demo`: asks for facts and a passage out of 8,000 tokens, with sparse
and with dense attention.

Starts `vllm serve` with the specontext backend, asks through the OpenAI client, stops the server,
and does the same with vLLM's own backend. Exit code 0: every answer of the specontext server was
right; 1: one was not, or a server failed.
"""

from __future__ import annotations

import itertools
import signal
import sys
import textwrap
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from specontext_vllm.config import ConfigError
from specontext_vllm.demo.server import ServerError, VllmServer, device_arguments, has_gpu
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

PROGRESS_SECONDS = 10.0
"""How often a line says that a step still runs, where there is no terminal for a spinner."""


@dataclass(frozen=True)
class Answer:
    """A streamed reply; times in seconds."""

    text: str
    right: bool
    first_token: float
    tokens: int
    prompt_tokens: int
    decode: float
    pages_read: float | None

    @property
    def tokens_per_second(self) -> float | None:
        """Of the decode, without the first token; None for a reply of one token."""
        return (self.tokens - 1) / self.decode if self.tokens > 1 and self.decode > 0 else None


def ask(
    server: VllmServer, model: str, problem: Problem, *, sparse: bool, max_tokens: int | None = None
) -> Answer:
    """Stream one reply and measure it."""
    from openai import OpenAI

    client = OpenAI(base_url=f"{server.url}/v1", api_key="none", timeout=600, max_retries=0)
    if sparse:
        server.rpc("specontext_stats", reset=True)
    begin = time.perf_counter()
    first = last = None
    text, usage = "", None
    messages: Any = problem.messages
    stream = client.chat.completions.create(
        model=model,
        messages=messages,
        temperature=0,
        stream=True,
        stream_options={"include_usage": True},
        max_tokens=max_tokens or 2 * len(problem.answer.split()) + SPARE_TOKENS,
    )
    for chunk in stream:
        usage = chunk.usage or usage
        if chunk.choices and chunk.choices[0].delta.content:
            last = time.perf_counter()
            first = first or last
            text += chunk.choices[0].delta.content
    end = time.perf_counter()
    if usage is None:
        raise ServerError("The server ended its reply without saying how many tokens it has.")
    share = None
    if sparse:
        stats = server.rpc("specontext_stats")
        share = stats["pages_read"] / stats["pages_total"] if stats["pages_total"] else None
    first, last = first or end, last or end
    right = score(problem, text) >= RIGHT[problem.kind]
    return Answer(
        text.strip(),
        right,
        first - begin,
        usage.completion_tokens,
        usage.prompt_tokens,
        last - first,
        share,
    )


def question(problem: Problem) -> str:
    """The line of the prompt that asks."""
    lines = problem.messages[-1]["content"].splitlines()
    return lines[0] if problem.layout == "question_first" else lines[-1]


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
            next(problem for problem in made if kind != "needle" or " code " in question(problem))
        )
    return problems


@contextmanager
def working(console: Console, what: str) -> Iterator[None]:
    """Show what is being done and for how long: with a spinner on a terminal, else with a line now
    and one every ten seconds.
    """
    begin, ended = time.monotonic(), threading.Event()

    def show_progress() -> None:
        while not ended.wait(1.0 if console.is_terminal else PROGRESS_SECONDS):
            text = f"{what} ... {time.monotonic() - begin:.0f} s"
            if console.is_terminal:
                status.update(text)
            else:
                console.print(text, markup=False, soft_wrap=True)

    with ExitStack() as stack:
        if console.is_terminal:
            status = stack.enter_context(console.status(f"{what} ..."))
        else:
            console.print(f"{what} ...", markup=False, soft_wrap=True)
        thread = threading.Thread(target=show_progress, daemon=True)
        thread.start()
        try:
            yield
        finally:
            ended.set()
            thread.join()


def run(
    console: Console,
    name: str,
    model: Path,
    arguments: list[str],
    problems: list[Problem],
    warm_up: Problem,
    *,
    sparse: bool,
) -> list[Answer]:
    """Start one server, ask everything, stop it."""
    from openai import OpenAI

    console.print(f"{name}: vllm serve {model} {' '.join(arguments)}", markup=False, soft_wrap=True)
    with ExitStack() as stack:
        with working(console, f"{name}: starting the server"):
            server = stack.enter_context(VllmServer(model, arguments))
        console.print(
            f"{name}: ready after {server.start_seconds:.0f} s", markup=False, soft_wrap=True
        )
        served = OpenAI(base_url=f"{server.url}/v1", api_key="none").models.list().data[0].id
        with working(console, f"{name}: warming up"):
            ask(server, served, warm_up, sparse=sparse, max_tokens=16)
        answers = []
        for number, problem in enumerate(problems, 1):
            with working(console, f"{name}: question {number} of {len(problems)}"):
                answer = ask(server, served, problem, sparse=sparse)
            answers.append(answer)
            rate = answer.tokens_per_second
            console.print(
                f"{name}: {question(problem)} -> {_short(answer.text)} ({answer.prompt_tokens:,} "
                "tokens read in "
                f"{answer.first_token:.2f} "
                f"s{'' if rate is None else f', then {rate:.0f} tokens/s'})",
                markup=False,
                soft_wrap=True,
            )
        with working(console, f"{name}: stopping the server"):
            stack.close()
    return answers


def compare(problems: list[Problem], sparse: list[Answer], dense: list[Answer]) -> Table:
    """Both servers' answers, a row for each question."""
    table = Table(title="SpeContext and dense attention", title_justify="left", show_lines=True)
    table.add_column("question", ratio=3)
    table.add_column("specontext's answer", ratio=4)
    table.add_column("dense answer", ratio=4)
    table.add_column("right?", ratio=1)
    for heading in (
        "KV pages\nread",
        "specontext\nfirst token\ntokens/s",
        "dense\nfirst token\ntokens/s",
    ):
        table.add_column(heading, justify="right", no_wrap=True)
    for problem, ours, theirs in zip(problems, sparse, dense, strict=True):
        verdict = "yes" if ours.right else f"NO: {_short(problem.answer)}"
        if not theirs.right:
            verdict += " (dense: no)"
        share = "–" if ours.pages_read is None else f"{ours.pages_read:.1%}"
        table.add_row(
            question(problem),
            _short(ours.text),
            _short(theirs.text),
            verdict,
            share,
            _speed(ours),
            _speed(theirs),
        )
    return table


def _short(text: str) -> str:
    return textwrap.shorten(text, 160, placeholder=" ...")


def _speed(answer: Answer) -> str:
    rate = answer.tokens_per_second
    return f"{answer.first_token:.2f} s\n{'–' if rate is None else f'{rate:.0f}/s'}"


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
    from openai import OpenAIError

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
    problems = make_problems(tokens, seed)
    warm_up = make_problem(
        "needle", seed=WARM_UP_SEED + seed, approx_tokens=tokens, layout="question_last"
    )
    # SIGTERM ends the demo as Ctrl-C does, servers included.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    arguments = ["--config", str(config.resolve()), *device_arguments()]
    try:
        sparse = run(console, "specontext", model, arguments, problems, warm_up, sparse=True)
        # The same options, but for the backend: the later --attention-backend wins.
        dense = run(
            console,
            "dense",
            model,
            [*arguments, "--attention-backend", "auto"],
            problems,
            warm_up,
            sparse=False,
        )
    except (ServerError, OpenAIError, OSError) as error:
        console.print(str(error), markup=False, soft_wrap=True)
        raise typer.Exit(1) from None
    except KeyboardInterrupt:
        console.print("Interrupted; the server was stopped.")
        raise typer.Exit(130) from None
    console.print(compare(problems, sparse, dense))
    if not has_gpu():
        console.print(
            "The speeds above say nothing about a GPU: this is a model of a few million parameters "
            "on a CPU, where the specontext backend's attention is plain torch. "
            "benchmarks/results/ has measurements on a GPU."
        )
    else:
        console.print(
            "A model this small gains nothing from reading less KV; benchmarks/results/ shows "
            "where sparsity pays."
        )
    wrong = sum(not answer.right for answer in sparse)
    console.print(
        f"{len(sparse) - wrong} of {len(sparse)} answers of the specontext server are right."
    )
    raise typer.Exit(1 if wrong else 0)


if __name__ == "__main__":
    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
    app.command()(main)
    app()
