"""The variants of the loss, trained in lockstep."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.collectors import Collectors
from specontext_vllm.distillation.data import Sequences, sample_positions
from specontext_vllm.distillation.draft import DraftModel
from specontext_vllm.distillation.draft_trainer import DraftDistiller
from specontext_vllm.distillation.losses import AttentionTarget
from specontext_vllm.distillation.settings import Settings
from specontext_vllm.distillation.shape import DraftShape
from specontext_vllm.distillation.teacher import (
    Lesson,
    Teacher,
)

BUDGETS = (128, 256)
DRAFT_POSITIONS = 128
VARIANTS: dict[str, dict[str, Any]] = {
    "as `specontext distill` does": {},
    "the same, other initial weights": {"seed": 1},
    "draft loss only": {"loss": "draft"},
    "alignment only": {"loss": "align"},
    "weights not squared": {"align_sharpness": 1.0},
    "weights to the fourth": {"align_sharpness": 4.0},
    "one query head for all tokens": {"align_each_token": False},
    "not squared, one head for all": {"align_sharpness": 1.0, "align_each_token": False},
    "mean over layers": {"over_layers": "mean"},
    "first half of the layers": {"layers": "first half"},
    "last half of the layers": {"layers": "last half"},
    "every second layer": {"layers": "every second"},
    "alignment weight 1": {"align_weight": 1.0},
    "alignment weight 10": {"align_weight": 10.0},
    "no window": {"window": 0},
    "window 64": {"window": 64},
    "window 96": {"window": 96},
    "window 256": {"window": 256},
}
"""What is changed of `specontext distill`'s own settings; `layers`: those that teach."""
DECODED = tuple(
    name
    for name, changes in VARIANTS.items()
    if not changes or {"loss", "align_sharpness", "align_each_token"} & set(changes)
)
"""Variants whose answers are decoded as well, which costs as much as their training."""


@dataclass(frozen=True)
class Target:
    """An alignment target: newest tokens that it leaves out, "max" or "mean" over layers, and which
    layers.
    """

    window: int
    over_layers: str
    layers: range

    @classmethod
    def of(cls, window: int, over_layers: str, layers: str, count: int) -> Target:
        """Of a model of ``count`` layers."""
        half = count // 2
        ranges = {
            "all": range(count),
            "first half": range(half),
            "last half": range(half, count),
            "every second": range(1, count, 2),
        }
        return cls(window, over_layers, ranges[layers])


def collectors_of(targets: Sequence[Target]) -> Collectors[Target]:
    """An ``AttentionTarget`` for each, which watches its own layers."""
    return Collectors(
        {target: AttentionTarget(target.window, target.over_layers) for target in targets},
        {target: target.layers for target in targets},
    )


def lessons_of(lesson: Lesson, collectors: Collectors[Target]) -> dict[Target, Lesson]:
    """The lesson with each one's target."""
    return {
        target: replace(lesson, target=found, mass=mass)
        for target, (found, mass) in collectors.results().items()
    }


@dataclass(frozen=True)
class Variant:
    """A head in training and what it is aligned to."""

    run: DraftDistiller
    target: Target


def train(
    variants: dict[str, Variant], teacher: Teacher, data: Sequences, steps: int
) -> dict[str, dict[str, float]]:
    """All variants in lockstep, so that the teacher runs once a batch; their last losses."""
    targets = list(dict.fromkeys(variant.target for variant in variants.values()))
    found: dict[str, dict[str, float]] = {}
    begin = time.monotonic()
    for number in range(steps):
        ids, weights = (t.to(teacher.device) for t in data[number])
        sampler = next(iter(variants.values())).run
        at, _ = sample_positions(
            weights[:, 1:], sampler.settings.align_positions, sampler.generator(ids.device)
        )
        collectors = collectors_of(targets)
        lessons = lessons_of(teacher(ids, at, collectors), collectors)
        for name, variant in variants.items():
            generator = torch.Generator(device=ids.device).manual_seed(number)
            found[name] = variant.run.learn(lessons[variant.target], at, weights, generator)
        if (number + 1) % 20 == 0:
            print(f"step {number + 1} of {steps}, {time.monotonic() - begin:.0f} s", flush=True)
    return found


def make_variants(
    teacher: Teacher,
    shape: DraftShape,
    draft_ids: Tensor | None,
    data: Sequences,
    plain: Settings,
    out: Path,
    accelerator: Any,
) -> dict[str, Variant]:
    """Every variant before its first step.

    Args:
        plain: the settings that they change.
    """
    variants = {}
    for name, changes in VARIANTS.items():
        settings = replace(
            plain, **{name: value for name, value in changes.items() if name != "layers"}
        )
        target = Target.of(
            settings.window, settings.over_layers, changes.get("layers", "all"), len(teacher.layers)
        )
        torch.manual_seed(settings.seed)
        variants[name] = Variant(
            DraftDistiller(
                teacher, DraftModel(shape, draft_ids), data, data, settings, out, accelerator
            ),
            target,
        )
    return variants
