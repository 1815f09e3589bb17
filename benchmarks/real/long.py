"""Long replies to a passage of real text: whether they repeat themselves, how long they are those
of dense attention, and how probable dense attention finds what was written.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from random import Random

from benchmarks.real.forced import mean_log_prob
from benchmarks.real.prompts import Prompt, PromptError, Task, Writer

LEAST_PROMPT = 64
NGRAM = 4


def _make(writer: Writer, rng: Random, context: int, number: int) -> Prompt:
    length = context - writer.long_tokens
    if length < LEAST_PROMPT:
        raise PromptError(
            f"--contexts: found {context}, but long writes {writer.long_tokens} tokens; use a "
            "longer one or fewer --long-tokens."
        )
    return Prompt(writer.passage(rng, length), reply_tokens=writer.long_tokens)


def repeated(tokens: Sequence[int]) -> float:
    """Share of the n-grams that stood in the text before."""
    grams = list(zip(*(tokens[offset:] for offset in range(NGRAM))))
    return 1 - len(set(grams)) / len(grams) if grams else 0.0


def equal_tokens(tokens: Sequence[int], others: Sequence[int]) -> int:
    """Tokens before the first difference."""
    return next((i for i, (a, b) in enumerate(zip(tokens, others)) if a != b), len(tokens))


def positions(length: int) -> list[int]:
    """Where it is asked whether replies of that length are still equal: 16, 64, 256, ..."""
    out = [16]
    while 4 * out[-1] <= length:
        out.append(4 * out[-1])
    return out


def perplexity(scores: Sequence[float]) -> float:
    """Of mean log-probabilities."""
    return math.exp(-sum(scores) / len(scores))


TASKS = {
    "long": Task(
        "long",
        "long",
        _make,
        mean_log_prob,
        "free replies to the beginning of a real text; the score is what dense attention gives "
        "them, log-probability a token",
    )
}
