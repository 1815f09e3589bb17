"""``mass``: the retrieval head scores all tokens of a page together."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from specontext_vllm.retrieval.rules import Rule

if TYPE_CHECKING:
    from specontext_vllm.retrieval.scoring import ScoreInputs
    from specontext_vllm.step_data import PageScores


class Mass(Rule):
    """The retrieval head's attention on all tokens of the page together; keeps more of it than
    `dlm`, but a page with one heavy token may lose to one with many light ones.
    """

    needs_head = True

    def score(self, inputs: ScoreInputs, scores: PageScores) -> PageScores:
        inputs.score_keys(scores)
        return replace(scores, page_max=scores.page_lse)
