"""Questions to a server, their answers and times, and both servers' answers in a table."""

from __future__ import annotations

import textwrap
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import typer
from rich.console import Console
from rich.table import Table

from specontext_vllm.demo.server import ServerError, VllmServer

PROGRESS_SECONDS = 10.0
"""How often a line says that a step still runs, where there is no terminal for a spinner."""


@dataclass(frozen=True)
class Question:
    """What is asked, and what is a right answer.

    Attributes:
        asked: the line that asks, as it is shown.
        messages: the prompt. Where the last one is the assistant's, the answer continues it.
        expected: a right answer.
        score: share of the expected answer that a reply gives, 0..1.
        least: score of a right reply.
        max_tokens: longest reply.
    """

    asked: str
    messages: list[dict[str, str]]
    expected: str
    score: Callable[[str], float]
    least: float
    max_tokens: int


@dataclass(frozen=True)
class Answer:
    """A streamed reply; times in seconds, ``log_prob`` the mean of its tokens' natural logarithms
    of their probabilities, for the server that chose them.
    """

    text: str
    score: float
    right: bool
    log_prob: float
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
    server: VllmServer,
    model: str,
    question: Question,
    *,
    sparse: bool,
    max_tokens: int | None = None,
) -> Answer:
    """Stream one reply and measure it."""
    from openai import OpenAI

    client = OpenAI(base_url=f"{server.url}/v1", api_key="none", timeout=600, max_retries=0)
    if sparse:
        server.rpc("specontext_stats", reset=True)
    begin = time.perf_counter()
    first = last = None
    text, usage = "", None
    log_probs: list[float] = []
    messages: Any = question.messages
    continues = messages[-1]["role"] == "assistant"
    stream = client.chat.completions.create(
        model=model,
        messages=messages,
        temperature=0,
        stream=True,
        stream_options={"include_usage": True},
        logprobs=True,
        max_tokens=max_tokens or question.max_tokens,
        extra_body={"add_generation_prompt": not continues, "continue_final_message": continues},
    )
    for chunk in stream:
        usage = chunk.usage or usage
        if chunk.choices and chunk.choices[0].delta.content:
            last = time.perf_counter()
            first = first or last
            text += chunk.choices[0].delta.content
        if chunk.choices and chunk.choices[0].logprobs:
            log_probs += [token.logprob for token in chunk.choices[0].logprobs.content or ()]
    end = time.perf_counter()
    if usage is None:
        raise ServerError("The server ended its reply without saying how many tokens it has.")
    share = None
    if sparse:
        stats = server.rpc("specontext_stats")
        share = stats["pages_read"] / stats["pages_total"] if stats["pages_total"] else None
    first, last = first or end, last or end
    score = question.score(text)
    return Answer(
        text.strip(),
        score,
        score >= question.least,
        sum(log_probs) / max(1, len(log_probs)),
        first - begin,
        usage.completion_tokens,
        usage.prompt_tokens,
        last - first,
        share,
    )


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
    questions: Sequence[Question],
    warm_up: Question,
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
        for number, question in enumerate(questions, 1):
            with working(console, f"{name}: question {number} of {len(questions)}"):
                answer = ask(server, served, question, sparse=sparse)
            answers.append(answer)
            rate = answer.tokens_per_second
            console.print(
                f"{name}: {shortened(question.asked)} -> {shortened(answer.text)} "
                f"({answer.prompt_tokens:,} tokens read in {answer.first_token:.2f} "
                f"s{'' if rate is None else f', then {rate:.0f} tokens/s'})",
                markup=False,
                soft_wrap=True,
            )
        with working(console, f"{name}: stopping the server"):
            stack.close()
    return answers


def ask_both(
    console: Console,
    model: Path,
    arguments: list[str],
    questions: Sequence[Question],
    warm_up: Question,
    *,
    sparse_only: Sequence[str] = (),
) -> tuple[list[Answer], list[Answer]]:
    """The answers of a server with specontext, and of one without, by the same arguments.

    Args:
        sparse_only: more arguments of the first.
    Raises:
        typer.Exit: a server failed, or the user interrupted; the console says so.
    """
    from openai import OpenAIError

    try:
        sparse = run(
            console,
            "specontext",
            model,
            [*arguments, *sparse_only],
            questions,
            warm_up,
            sparse=True,
        )
        # The same options, but for the backend: the later --attention-backend wins.
        plain = [*arguments, "--attention-backend", "auto"]
        dense = run(console, "dense", model, plain, questions, warm_up, sparse=False)
    except (ServerError, OpenAIError, OSError) as error:
        console.print(str(error), markup=False, soft_wrap=True)
        raise typer.Exit(1) from None
    except KeyboardInterrupt:
        console.print("Interrupted; the server was stopped.")
        raise typer.Exit(130) from None
    return sparse, dense


def compare(
    questions: Sequence[Question], sparse: Sequence[Answer], dense: Sequence[Answer]
) -> Table:
    """Both servers' answers, a row for each question."""
    table = Table(title="SpeContext and dense attention", title_justify="left", show_lines=True)
    table.add_column("question", ratio=3)
    table.add_column("specontext's answer", ratio=4)
    table.add_column("dense answer", ratio=4)
    table.add_column("right?", ratio=1)
    for heading in (
        "KV pages\nread",
        "specontext\nfirst token\ntokens/s\nlog-prob",
        "dense\nfirst token\ntokens/s\nlog-prob",
    ):
        table.add_column(heading, justify="right", no_wrap=True)
    for question, ours, theirs in zip(questions, sparse, dense, strict=True):
        verdict = "yes" if ours.right else f"NO: {shortened(question.expected)}"
        if not theirs.right:
            verdict += " (dense: no)"
        share = "–" if ours.pages_read is None else f"{ours.pages_read:.1%}"
        table.add_row(
            shortened(question.asked),
            shortened(ours.text),
            shortened(theirs.text),
            verdict,
            share,
            _figures(ours),
            _figures(theirs),
        )
    return table


def shortened(text: str) -> str:
    """One line of 160 characters at most."""
    return textwrap.shorten(text, 160, placeholder=" ...")


def _figures(answer: Answer) -> str:
    rate = answer.tokens_per_second
    rate_text = "–" if rate is None else f"{rate:.0f}/s"
    return f"{answer.first_token:.2f} s\n{rate_text}\n{answer.log_prob:.3f}"
