"""The variants: each changes one thing of the head that `specontext distill` trains."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields, replace
from fnmatch import fnmatchcase
from typing import Any

import torch

from benchmarks.heads.trainers import AdamWHead, AlignedHead
from benchmarks.real.settings import OptionError
from specontext_vllm.distillation.head_model import HeadModel
from specontext_vllm.distillation.head_shape import AUX_LAYERS, HeadShape
from specontext_vllm.distillation.head_trainer import HeadDistiller
from specontext_vllm.distillation.options import DEMO_RATE, DEMO_WIDTH
from specontext_vllm.distillation.settings import Settings
from specontext_vllm.distillation.shape import DraftShape, aux_layers_for

Change = Callable[[Any, Any], Any]
"""From what the default has and the target's transformers config to what the variant has."""


@dataclass(frozen=True)
class Variant:
    """What is changed of the default.

    Attributes:
        changes: values of ``HeadShape`` or ``Settings`` by field, or how each becomes another.
        trainer: how it learns.
    """

    changes: Mapping[str, Any] = field(default_factory=dict)
    trainer: type[HeadDistiller] = HeadDistiller

    @property
    def aligned(self) -> bool:
        """Its target is of tokens."""
        return issubclass(self.trainer, AlignedHead)

    def settings(self, plain: Settings, config: Any) -> Settings:
        """How it is trained."""
        return replace(plain, **self._of(plain, config))

    def head(self, plain: HeadShape, config: Any, seed: int) -> HeadModel:
        """It, before its first step."""
        torch.manual_seed(seed)
        return HeadModel(replace(plain, **self._of(plain, config)))

    def differs(self, shape: HeadShape, settings: Settings, config: Any) -> bool:
        """Whether anything is other than these defaults."""
        return (
            self.trainer is not HeadDistiller
            or self.settings(settings, config) != settings
            or replace(shape, **self._of(shape, config)) != shape
        )

    def _of(self, plain: HeadShape | Settings, config: Any) -> dict[str, Any]:
        known = {f.name for f in fields(plain)}
        return {
            name: change(getattr(plain, name), config) if callable(change) else change
            for name, change in self.changes.items()
            if name in known
        }


def times(factor: float) -> Change:
    """A multiple of the default's, of the same type."""
    return lambda value, _: type(value)(value * factor)


def layers(count: int, first: float = 0.0, last: float = 1.0) -> Change:
    """So many layers at equal distances in a part of the default's reach."""

    def change(reach: tuple[int, ...], _: Any) -> tuple[int, ...]:
        low, high = (reach[0] + (reach[-1] - reach[0]) * share for share in (first, last))
        found = (round(low + i * (high - low) / (count - 1)) for i in range(count))
        # A shallow model has fewer.
        return tuple(dict.fromkeys(found))

    return change


def _at_most_layers(groups: int) -> Change:
    return lambda _, config: min(groups, config.num_hidden_layers)


def _own(name: str) -> Change:
    return lambda _, config: getattr(DraftShape.for_target(config, max_position=1), name)


_EAGLE3 = {
    "mlp": 0,
    "own_states": False,
    "head_dim": _own("head_dim"),
    "hidden": _own("hidden"),
    "aux_layers": lambda _, config: aux_layers_for(config.num_hidden_layers),
    "rotary_share": 1.0,
}
_ADAMW_RATE: Change = lambda _, config: DEMO_RATE * min(1.0, DEMO_WIDTH / config.hidden_size)  # noqa: E731

DEFAULT = "default"
VARIANTS: dict[str, Variant] = {
    DEFAULT: Variant(),
    "other-seed": Variant({"seed": lambda seed, _: seed + 1}),
    "eagle3-shape": Variant(_EAGLE3),
    "previous-states": Variant({"own_states": False}),
    **{f"head-dim-{d}": Variant({"head_dim": d}) for d in (64, 128, 256)},
    **{f"rotary-{share:g}": Variant({"rotary_share": share}) for share in (1.0, 0.5, 0.25)},
    "mlp-none": Variant({"mlp": 0}),
    "mlp-double": Variant({"mlp": times(2)}),
    "hidden-half": Variant({"hidden": times(0.5)}),
    "hidden-double": Variant({"hidden": times(2)}),
    "aux-3": Variant({"aux_layers": layers(3)}),
    "aux-7": Variant({"aux_layers": layers(7)}),
    "aux-low": Variant({"aux_layers": layers(AUX_LAYERS, last=0.4)}),
    "aux-last": Variant({"aux_layers": layers(AUX_LAYERS, first=0.6)}),
    "stretch-none": Variant({"stretch": 0}),
    "stretch-128": Variant({"stretch": 128}),
    "stretch-small-budgets": Variant({"stretch_halvings": (6, 7)}),
    "stretch-large-budgets": Variant({"stretch_halvings": (3, 4)}),
    **{f"sharp-{share:g}": Variant({"sharp": share}) for share in (0.0, 0.5, 0.75, 1.0)},
    **{f"recents-{pages}": Variant({"recents": pages}) for pages in (1, 2, 5)},
    **{f"copies-{share:g}": Variant({"copies": share}) for share in (0.0, 0.25, 0.5)},
    **{f"positions-{count}": Variant({"positions": count}) for count in (64, 192, 512)},
    **{f"groups-{count}": Variant({"groups": _at_most_layers(count)}) for count in (3, 5)},
    "rate-half": Variant({"learning_rate": times(0.5)}),
    "rate-double": Variant({"learning_rate": times(2.0)}),
    "adamw": Variant({"learning_rate": _ADAMW_RATE}, AdamWHead),
    "adamw-muon-rate": Variant(trainer=AdamWHead),
    "alignment-loss": Variant(trainer=AlignedHead),
}
"""By the name that `--variants` takes. ``other-seed`` shows what the initial weights alone
change.
"""


def picked(text: str, shape: HeadShape, settings: Settings, config: Any) -> dict[str, Variant]:
    """The default, and the variants that ``text`` names or matches (`head-dim-*,sharp-0`).

    Those that match and differ in nothing from the default are left out.

    Raises:
        OptionError: a name or pattern that is nothing's.
    """
    found = {DEFAULT: VARIANTS[DEFAULT]}
    for pattern in (part.strip() for part in text.split(",")):
        names = [name for name in VARIANTS if fnmatchcase(name, pattern)]
        if not names:
            raise OptionError(
                f"--variants: found {pattern!r}; use names or patterns of {', '.join(VARIANTS)}."
            )
        found |= {name: VARIANTS[name] for name in names}
    return {
        name: variant
        for name, variant in found.items()
        if name == DEFAULT or variant.differs(shape, settings, config)
    }
