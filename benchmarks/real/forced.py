"""Real text that decode steps emit by force: how probable it is when they read only a selection."""

from __future__ import annotations

from random import Random
from typing import Any

from benchmarks.real.prompts import Prompt, PromptError, Task, Writer

AGAIN = "\n\n----\n\nHere is an excerpt from the text above, repeated:\n\n"
"""Between a text and the copy of one of its passages."""

SHOWN = 12
"""First tokens of a copy, which stand in the prompt: they say which passage it is."""


def mean_log_prob(prompt: Prompt, replies: list[Any]) -> float:
    """Of the forced tokens behind the first, natural logarithm a token."""
    (reply,) = replies
    return sum(reply) / len(reply)


def _text(writer: Writer, rng: Random, context: int, number: int) -> Prompt:
    ids = writer.passage(rng, context)
    return Prompt(ids[: -writer.forced_tokens], [ids[-writer.forced_tokens :]])


def _copy(writer: Writer, rng: Random, context: int, number: int) -> Prompt:
    again, copied = writer.encode(AGAIN), SHOWN + writer.forced_tokens
    length = context - copied - len(again)
    # Neither where sinks are, nor so near the end that the newest tokens hold it.
    first, last = min(200, length // 8), length - copied - min(512, length // 8)
    if last <= first:
        raise PromptError(
            f"--contexts: found {context}, too few tokens for a copy of {copied}; use a longer one "
            "or fewer --forced."
        )
    body = writer.passage(rng, length)
    begin = rng.randrange(first, last)
    copy = body[begin : begin + copied]
    return Prompt(body + again + copy[:SHOWN], [copy[SHOWN:]])


TASKS = {
    task.name: task
    for task in (
        Task("text", "log-prob", _text, mean_log_prob, "the tokens that follow a real text"),
        Task(
            "copy",
            "log-prob",
            _copy,
            mean_log_prob,
            "a passage of the text, from anywhere in it, that stands again at its end",
        ),
    )
}
