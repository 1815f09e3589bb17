"""Questions to a server, their answers and times, and both servers' answers in a table."""

from __future__ import annotations

import textwrap
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer
from rich.console import Console
from rich.table import Table

from specontext_vllm.demo.server import ServerError, VllmServer

if TYPE_CHECKING:
    from openai import OpenAI

SPARSE, DENSE = "specontext", "dense"
"""The servers' names in what is printed."""

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
    """A streamed reply; ``first_token`` in seconds, ``log_prob`` the mean of its tokens' natural
    logarithms of their probabilities, for the server that chose them.
    """

    text: str
    score: float
    right: bool
    log_prob: float
    first_token: float
    prompt_tokens: int
    pages_read: float | None


def ask(
    server: VllmServer,
    model: str,
    question: Question,
    *,
    sparse: bool,
    max_tokens: int | None = None,
) -> Answer:
    """Stream one reply and measure it."""
    client = client_of(server)
    if sparse:
        server.rpc("specontext_stats", reset=True)
    begin = time.perf_counter()
    first, text, usage = None, "", None
    log_probs: list[float] = []
    arguments: Any = reply_arguments(question)
    stream = client.chat.completions.create(
        model=model,
        stream=True,
        stream_options={"include_usage": True},
        logprobs=True,
        max_tokens=max_tokens or question.max_tokens,
        **arguments,
    )
    for chunk in stream:
        usage = chunk.usage or usage
        if chunk.choices and chunk.choices[0].delta.content:
            first = first or time.perf_counter()
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
    score = question.score(text)
    return Answer(
        text.strip(),
        score,
        score >= question.least,
        sum(log_probs) / max(1, len(log_probs)),
        (first or end) - begin,
        usage.prompt_tokens,
        share,
    )


def client_of(server: VllmServer) -> OpenAI:
    """A client that asks once and waits."""
    from openai import OpenAI

    return OpenAI(base_url=f"{server.url}/v1", api_key="none", timeout=600, max_retries=0)


def reply_arguments(question: Question) -> dict[str, Any]:
    """What a reply to the question is asked for with, but for model and length."""
    continues = question.messages[-1]["role"] == "assistant"
    return {
        "messages": question.messages,
        "temperature": 0,
        "extra_body": {
            "add_generation_prompt": not continues,
            "continue_final_message": continues,
        },
    }


@dataclass(frozen=True)
class Servers:
    """Both servers, and the name under which they serve the model."""

    sparse: VllmServer
    dense: VllmServer
    model: str

    @property
    def named(self) -> tuple[tuple[str, VllmServer], ...]:
        return (SPARSE, self.sparse), (DENSE, self.dense)


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


@contextmanager
def both_servers(
    console: Console, model: Path, arguments: list[str], sparse_only: Sequence[str] = ()
) -> Iterator[Servers]:
    """A server with specontext and one without, by the same arguments. Both are there at once, so
    that they can take turns; one that is not asked waits without work.

    Args:
        sparse_only: more arguments of the first.
    Raises:
        typer.Exit: a server failed, here or in the body, or the user interrupted; the console says
            so.
    """
    from openai import OpenAIError

    # The same options, but for the backend: the later --attention-backend wins.
    options = {
        SPARSE: [*arguments, *sparse_only],
        DENSE: [*arguments, "--attention-backend", "auto"],
    }
    try:
        with ExitStack() as stack:
            servers = []
            for name, own in options.items():
                _say(console, name, f"vllm serve {model} {' '.join(own)}")
                with working(console, f"{name}: starting the server"):
                    servers.append(stack.enter_context(VllmServer(model, own)))
                _say(console, name, f"ready after {servers[-1].start_seconds:.0f} s")
            served = client_of(servers[0]).models.list().data[0].id
            sparse, dense = servers
            yield Servers(sparse, dense, served)
            with working(console, "stopping the servers"):
                stack.close()
    except (ServerError, OpenAIError, OSError) as error:
        console.print(str(error), markup=False, soft_wrap=True)
        raise typer.Exit(1) from None
    except KeyboardInterrupt:
        console.print("Interrupted; the servers were stopped.")
        raise typer.Exit(130) from None


def ask_both(
    console: Console, servers: Servers, questions: Sequence[Question], warm_up: Question
) -> tuple[list[Answer], list[Answer]]:
    """The answers of the server with specontext, and of the one without: one question after the
    other, each server in its turn.
    """
    answers: dict[str, list[Answer]] = {}
    for name, server in servers.named:
        with working(console, f"{name}: warming up"):
            ask(server, servers.model, warm_up, sparse=name == SPARSE, max_tokens=16)
        answers[name] = []
    for number, question in enumerate(questions, 1):
        for name, server in servers.named:
            with working(console, f"{name}: question {number} of {len(questions)}"):
                answer = ask(server, servers.model, question, sparse=name == SPARSE)
            answers[name].append(answer)
            _say(
                console,
                name,
                f"{shortened(question.asked)} -> {shortened(answer.text)} "
                f"({answer.prompt_tokens:,} tokens read in {answer.first_token:.2f} s)",
            )
    return answers[SPARSE], answers[DENSE]


def _say(console: Console, name: str, text: str) -> None:
    console.print(f"{name}: {text}", markup=False, soft_wrap=True)


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
        "specontext\nfirst token\nlog-prob",
        "dense\nfirst token\nlog-prob",
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
    return f"{answer.first_token:.2f} s\n{answer.log_prob:.3f}"
