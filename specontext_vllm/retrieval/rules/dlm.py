"""``dlm``: once a step, by the retrieval head, which is cut out of a distilled language model (DLM;
arXiv 2512.00722, section on the retrieval head).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from specontext_vllm.retrieval.rules import Rule

if TYPE_CHECKING:
    from specontext_vllm.retrieval.scoring import ScoreInputs
    from specontext_vllm.step_data import PageScores


class Dlm(Rule):
    """The heaviest token of the page under the attention of the retrieval head, which is cut out of
    a distilled language model, in each step for all layers at once.
    """

    needs_head = True

    def score(self, inputs: ScoreInputs, scores: PageScores) -> PageScores:
        inputs.score_keys(scores)
        return scores
