"""Tokens a second of two servers that answer the same questions in turns, and what was seen."""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from rich.console import Console

from specontext_vllm.demo.asking import (
    Question,
    Servers,
    client_of,
    reply_arguments,
    working,
)
from specontext_vllm.demo.server import ServerError, VllmServer

if TYPE_CHECKING:
    from openai.types import CompletionUsage

ROUNDS = 5
"""Timed turns of each server, after one that is not timed."""

TOKENS = 256
"""Of each reply, whatever it says: the answers themselves are too short to be timed."""


@dataclass(frozen=True)
class Speeds:
    """Tokens a second of all replies together, a figure of each server for each round."""

    requests: int
    prompt_tokens: int
    tokens: int
    sparse: tuple[float, ...]
    dense: tuple[float, ...]

    def sentences(self) -> str:
        """What was measured, and what it shows: one server is called faster if it was in every
        round, to the hundredths that are printed.
        """
        ratios = [ours / theirs for ours, theirs in zip(self.sparse, self.dense, strict=True)]
        median, least, most = (
            round(ratio, 2) for ratio in (statistics.median(ratios), min(ratios), max(ratios))
        )
        span = f"{least:.2f} to {most:.2f}"
        if least > 1:
            seen = f"specontext was {median:.2f} times as fast ({span} in {len(ratios)} rounds)."
        elif most < 1:
            seen = (
                f"specontext was slower: {median:.2f} times stock vLLM's speed ({span} in "
                f"{len(ratios)} rounds)."
            )
        else:
            seen = (
                f"Neither was the faster one in all of {len(ratios)} rounds: specontext had {span} "
                "times stock vLLM's speed."
            )
        return (
            f"{self.requests} replies of {self.tokens} tokens at once, each after "
            f"{self.prompt_tokens:,} tokens that had been read before: "
            f"{statistics.median(self.sparse):.0f} tokens/s with specontext, "
            f"{statistics.median(self.dense):.0f} with stock vLLM. {seen}"
        )


def measure(
    console: Console,
    servers: Servers,
    questions: Sequence[Question],
    *,
    rounds: int = ROUNDS,
    tokens: int = TOKENS,
) -> Speeds:
    """Ask both servers all questions at once, in turns; the console says how far it is."""
    prompt_tokens, pairs = 0, []
    for number in range(rounds + 1):
        timed = f"round {number} of {rounds}" if number else "a round that is not timed"
        rates = []
        with working(console, f"{len(questions)} questions at once, {timed}"):
            for _, server in servers.named:
                rate, longest = answer_all(server, servers.model, questions, tokens)
                rates.append(rate)
                prompt_tokens = max(prompt_tokens, longest)
        if number:
            pairs.append(rates)
            said = ", ".join(
                f"{name} {rate:.0f} tokens/s"
                for (name, _), rate in zip(servers.named, rates, strict=True)
            )
            console.print(f"{timed}: {said}", soft_wrap=True)
    ours, theirs = zip(*pairs, strict=True)
    return Speeds(len(questions), prompt_tokens, tokens, ours, theirs)


def answer_all(
    server: VllmServer, model: str, questions: Sequence[Question], tokens: int
) -> tuple[float, int]:
    """A reply of ``tokens`` tokens to each question, all at once.

    Not streamed: on few cores the server's front end has no time to send each token when it is
    made.

    Returns:
        Tokens a second of all replies together, from sending the questions to the last reply, and
        the longest prompt's tokens.
    """
    client = client_of(server)

    def answer(question: Question) -> CompletionUsage:
        arguments: dict[str, Any] = reply_arguments(question)
        arguments["extra_body"] |= {"ignore_eos": True, "min_tokens": tokens}
        usage = client.chat.completions.create(model=model, max_tokens=tokens, **arguments).usage
        if usage is None:
            raise ServerError("The server sent a reply without saying how many tokens it has.")
        return usage

    with ThreadPoolExecutor(len(questions)) as threads:
        begin = time.perf_counter()
        usages = list(threads.map(answer, questions))
        seconds = time.perf_counter() - begin
    made = sum(usage.completion_tokens for usage in usages)
    return made / seconds, max(usage.prompt_tokens for usage in usages)
