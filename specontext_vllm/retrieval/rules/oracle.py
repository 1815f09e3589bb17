"""``oracle``: each layer's own attention scores its pages, with all keys read; an upper bound for
what scores with less can find.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from specontext_vllm.retrieval.rules import Rule

if TYPE_CHECKING:
    from specontext_vllm.retrieval.scoring import ScoreInputs
    from specontext_vllm.step_data import PageScores


class Oracle(Rule):
    """The largest attention weight of a page's tokens, in each layer."""

    per_layer = True

    def score(self, inputs: ScoreInputs, scores: PageScores) -> PageScores:
        inputs.score_keys(scores)
        return scores
