"""``random``: scores from a generator with a fixed seed."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from specontext_vllm.retrieval.rules import Rule

if TYPE_CHECKING:
    import torch

    from specontext_vllm.retrieval.scoring import ScoreInputs
    from specontext_vllm.step_data import PageScores


class Random(Rule):
    """Any page is as good as any other; a lower bound, for comparison."""

    capturable = False  # The generator's state is the host's.

    def __init__(self, settings: Mapping[str, Any], device: torch.device) -> None:
        import torch

        super().__init__(settings, device)
        self.generator = torch.Generator(device=device).manual_seed(0)

    def score(self, inputs: ScoreInputs, scores: PageScores) -> PageScores:
        used = inputs.workspace_used(scores)
        scores.page_max[:, :used].uniform_(-1.0, 0.0, generator=self.generator)
        scores.page_lse[:, :used].zero_()
        return scores
