"""How many tokens the lossless mode drafts: what the scheduler decides in each step, on the host
alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

MAX_DRAFTS = 6
"""Tokens that a row drafts at the most. At the acceptance and the costs that lossless steps pay at,
more gain no more.
"""
ALL_LENGTHS = tuple(range(MAX_DRAFTS + 1))
BY_USE = (0, 4, 2, 6, 1, 3, 5)
"""The lengths, those first that a choice among few should have."""
PRIOR = 0.8
"""Acceptance before any is measured."""
MEMORY, MEMORY_OF_A_ROW = 32, 8
"""Verdicts on drafts over which the acceptance is averaged: at least so many, and so many for each
row. Over fewer than come in a few steps the choice would follow chance.
"""
FORGET_STEPS = 500
"""Plain steps in which a measured acceptance fades to the prior, so that drafts are tried again."""
LEAST_GAIN = 1.05
"""Tokens per second, in those of plain steps, under which nothing is drafted."""


@dataclass(frozen=True)
class StepBytes:
    """What steps read, to which their time is taken to be proportional.

    Attributes:
        weights: bytes of the weights.
        kv: bytes of KV a token, all layers.
        scores: bytes a token of what pages are scored by.
        budget: tokens that a sparse step reads of a longer context.
    """

    weights: int
    kv: float
    scores: float
    budget: int

    def sparse_share(self, contexts: Sequence[int]) -> float:
        """A sparse step's bytes over a dense one's, at these context lengths."""
        dense = self.weights + self.kv * sum(contexts)
        sparse = float(self.weights)
        for tokens in contexts:
            sparse += self.kv * min(tokens, self.budget)
            sparse += self.scores * tokens * (tokens > self.budget)
        return sparse / dense


def gain(drafts: int, acceptance: float, sparse_share: float) -> float:
    """Tokens per second in those of plain steps, with ``drafts`` of which each is accepted with
    probability ``acceptance`` if those before it were.

    A round is a dense step and ``drafts`` sparse ones; the tokens it gives are the expectation of
    Leviathan et al., arXiv 2211.17192, equation 1.
    """
    if acceptance >= 1:
        tokens = 1.0 + drafts
    else:
        tokens = (1 - acceptance ** (drafts + 1)) / (1 - acceptance)
    return tokens / (1 + drafts * sparse_share)


def best_length(
    acceptance: float, sparse_share: float, lengths: Sequence[int] = ALL_LENGTHS
) -> int:
    """Of ``lengths`` the one with the largest gain, 0 where none is worth its trouble."""
    best = max(lengths, key=lambda drafts: gain(drafts, acceptance, sparse_share))
    return best if gain(best, acceptance, sparse_share) >= LEAST_GAIN else 0


def lengths_by_batch(requests: int) -> list[tuple[int, int, int]]:
    """A schedule for vLLM, (first batch size, last, drafts), that names as many lengths as there
    are batch sizes: it captures graphs of the lengths that its schedule names, each up to the
    largest batch with it. Plain steps come first, for they are most of a round.
    """
    lengths = sorted(BY_USE[:requests])
    last = requests - len(lengths) + 1
    return [
        (1 if length == lengths[0] else last + place, last + place, length)
        for place, length in enumerate(lengths)
    ]


class DraftLength:
    """Follows the acceptance of an engine's drafts and chooses how many the next step makes.

    Args:
        step_bytes: what steps read.
        lengths: numbers of drafts to choose from, 0 among them.

    Attributes:
        acceptance: share of drafts that are accepted where those before them were.
    """

    def __init__(self, step_bytes: StepBytes, lengths: Sequence[int] = ALL_LENGTHS) -> None:
        self.step_bytes, self.lengths = step_bytes, lengths
        self.acceptance, self.memory = PRIOR, MEMORY

    def observe(self, drafted: int, accepted: int) -> None:
        """The verdicts on one row's drafts; of those after a rejected one nothing is known."""
        verdicts = min(drafted, accepted + 1)
        if verdicts > 0:
            weight = 1 - (1 - 1 / self.memory) ** verdicts
            self.acceptance += weight * (accepted / verdicts - self.acceptance)

    def choose(self, contexts: Sequence[int]) -> int:
        """Drafts for each row of the next step.

        Args:
            contexts: tokens of the requests that will decode.
        """
        if not contexts:
            return 0
        self.memory = max(MEMORY, MEMORY_OF_A_ROW * len(contexts))
        share = self.step_bytes.sparse_share(contexts)
        length = best_length(self.acceptance, share, self.lengths)
        if length == 0 and best_length(PRIOR, share, self.lengths) > 0:
            self.acceptance += (PRIOR - self.acceptance) / FORGET_STEPS
        return length
