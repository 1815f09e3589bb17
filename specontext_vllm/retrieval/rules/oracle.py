"""``oracle``: each layer by its own attention, with all keys read."""

from __future__ import annotations

from typing import TYPE_CHECKING

from specontext_vllm.retrieval.rules import Rule

if TYPE_CHECKING:
    from specontext_vllm.retrieval.scoring import ScoreInputs
    from specontext_vllm.step_data import PageScores


class Oracle(Rule):
    """The heaviest token of the page under each layer's own attention; an upper bound, for
    comparison. Works without a host pool only.
    """

    per_layer = True

    def score(self, inputs: ScoreInputs, scores: PageScores) -> PageScores:
        inputs.score_keys(scores)
        return scores
