"""``dlm``: a page counts as much as its heaviest token under the retrieval head's attention
(paper C1).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from specontext_vllm.retrieval.rules import Rule

if TYPE_CHECKING:
    from specontext_vllm.retrieval.scoring import ScoreInputs
    from specontext_vllm.step_data import PageScores


class Dlm(Rule):
    """The largest attention weight of a page's tokens."""

    needs_head = True

    def score(self, inputs: ScoreInputs, scores: PageScores) -> PageScores:
        inputs.score_keys(scores)
        return scores
