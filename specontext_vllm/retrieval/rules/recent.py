"""``recent``: a page's score grows with its position. With the sinks that every selection keeps,
that is StreamingLLM (arXiv 2309.17453).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from specontext_vllm.retrieval.rules import Rule

if TYPE_CHECKING:
    from specontext_vllm.retrieval.scoring import ScoreInputs
    from specontext_vllm.step_data import PageScores


class Recent(Rule):
    """The newest pages win, for comparison."""

    def score(self, inputs: ScoreInputs, scores: PageScores) -> PageScores:
        import torch

        # Rows of different lengths lie one after the other, but within a row the index grows with
        # the position, and only the order counts.
        used = inputs.workspace_used(scores)
        torch.arange(used, out=scores.page_max[0, :used])
        scores.page_max[1:, :used] = scores.page_max[0, :used]
        scores.page_lse[:, :used].zero_()
        return scores
