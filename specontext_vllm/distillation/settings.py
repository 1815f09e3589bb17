"""How a head is trained, and how far a run has come."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from specontext_vllm.distillation.losses import SHARPNESS, WINDOW

Loss = Literal["both", "draft", "align"]
Format = Literal["specontext", "eagle3"]
"""A head for retrieval alone, or a whole EAGLE-3 draft model."""
WARMUP_STEPS, WARMUP_SHARE = 100, 0.05
"""The learning rate reaches its peak after this many steps or this share of the run, whichever is
sooner.
"""


@dataclass(frozen=True)
class Settings:
    """How a head is trained.

    Attributes:
        context: longest sequence, tokens; half and a quarter of it are trained on as well.
        batch_tokens: tokens of a step on each process.
        hours: training time in all, resumed runs included; measuring does not count.
        steps: of training in all; if given, steps and not the clock decide the learning rate and
            the end.
        loss: what is minimised.
        learning_rate: peak; then a cosine down to a tenth, over the hours or steps.
        freeze_retrieval: train what drafts alone, and leave what chooses pages as it is.
        draft_positions, align_positions: sampled tokens of a sequence that each loss looks at.
        steps_ahead: drafts in a row that a draft model is trained for.
        chain_positions: how many of ``draft_positions`` go on after the first draft.
        window: newest tokens that alignment leaves out.
        positions: sampled tokens of a sequence that a head for retrieval alone looks at.
        stretch: tokens side by side at which it looks as well, with the states of a run that reads
            what it chooses.
        stretch_halvings: that run's budget is the context, halved at least and at most so often.
        recents: newest pages that it does not learn to choose.
        sharp: the squares' share of its target (``page_loss``).
        copies: share of plain documents in which passages are written again further down.
        align_weight: factor of the alignment loss (docs/results/distillation.md, losses).
        align_sharpness, align_each_token: how heavy tokens and the query heads of a group count in
            it (losses.py).
        over_layers: "max" or "mean" over the teacher's layers.
        budget: tokens of the recall figure.
        report_seconds, save_seconds: how often to measure and to save.
        measuring_share: a measurement waits until the one before took no more than this share of
            the training in between. The teacher's pass over the held-out sequences, once a run,
            does not count.
        loaders: processes that make batches; 0: the training process does.
        seed: of weights, data and sampling.
    """

    context: int
    batch_tokens: int
    budget: int
    hours: float = 1.0
    steps: int | None = None
    loss: Loss = "both"
    learning_rate: float = 1e-3
    freeze_retrieval: bool = False
    draft_positions: int = 512
    align_positions: int = 64
    steps_ahead: int = 7
    chain_positions: int = 128
    positions: int = 192
    stretch: int = 64
    stretch_halvings: tuple[int, int] = (4, 6)
    recents: int = 2
    sharp: float = 0.75
    copies: float = 0.5
    window: int = WINDOW
    align_weight: float = 3.0
    align_sharpness: float = SHARPNESS
    align_each_token: bool = True
    over_layers: str = "max"
    report_seconds: float = 30.0
    save_seconds: float = 300.0
    measuring_share: float = 0.1
    loaders: int = 0
    seed: int = 0

    @property
    def lengths(self) -> list[int]:
        """Sequence lengths, taken in turn."""
        return [n for n in (self.context, self.context // 2, self.context // 4) if n >= 256] or [
            self.context
        ]


@dataclass
class Progress:
    """How far a run has come; saved with its state. ``seconds`` include saving, not measuring."""

    step: int = 0
    tokens: int = 0
    seconds: float = 0.0

    def share(self, settings: Settings) -> float:
        """Share of the run that is done; 1 or more at its end."""
        return (
            self.seconds / (3600 * settings.hours)
            if settings.steps is None
            else self.step / settings.steps
        )


def rate_at(settings: Settings, progress: Progress) -> float:
    """Learning rate of the next step: warm-up, then a cosine to a tenth."""
    share = min(1.0, progress.share(settings))
    warm = min(1.0, max((progress.step + 1) / WARMUP_STEPS, share / WARMUP_SHARE))
    return settings.learning_rate * warm * (0.1 + 0.45 * (1 + math.cos(math.pi * share)))
