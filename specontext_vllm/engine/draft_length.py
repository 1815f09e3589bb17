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
PRIOR = 0.8
"""Acceptance before any is measured."""
MEMORY = 32
"""Verdicts on drafts over which the acceptance is averaged."""
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


def best_length(acceptance: float, sparse_share: float) -> int:
    """Drafts with the largest gain, 0 where none is worth its trouble."""
    best = max(range(1, MAX_DRAFTS + 1), key=lambda k: gain(k, acceptance, sparse_share))
    return best if gain(best, acceptance, sparse_share) >= LEAST_GAIN else 0


class DraftLength:
    """Follows the acceptance of an engine's drafts and chooses how many the next step makes.

    Attributes:
        acceptance: share of drafts that are accepted where those before them were.
    """

    def __init__(self, step_bytes: StepBytes) -> None:
        self.step_bytes = step_bytes
        self.acceptance = PRIOR

    def observe(self, drafted: int, accepted: int) -> None:
        """The verdicts on one row's drafts; of those after a rejected one nothing is known."""
        verdicts = min(drafted, accepted + 1)
        if verdicts > 0:
            weight = 1 - (1 - 1 / MEMORY) ** verdicts
            self.acceptance += weight * (accepted / verdicts - self.acceptance)

    def choose(self, contexts: Sequence[int]) -> int:
        """Drafts for each row of the next step.

        Args:
            contexts: tokens of the requests that will decode.
        """
        if not contexts:
            return 0
        share = self.step_bytes.sparse_share(contexts)
        length = best_length(self.acceptance, share)
        if length == 0 and best_length(PRIOR, share) > 0:
            self.acceptance += (PRIOR - self.acceptance) / FORGET_STEPS
        return length
