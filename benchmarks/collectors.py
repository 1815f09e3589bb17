"""Several collectors of the teacher's attention in one pass."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from typing import Generic, TypeVar

from torch import Tensor

from specontext_vllm.distillation.losses import AttentionCollector

Name = TypeVar("Name", bound=Hashable)


class Collectors(Generic[Name]):
    """Collectors that watch one forward pass.

    Args:
        each: by name.
        layers: those that one of them watches; all, if it is not named.
    """

    def __init__(
        self,
        each: Mapping[Name, AttentionCollector],
        layers: Mapping[Name, range] | None = None,
    ) -> None:
        self.each, self._layers = dict(each), dict(layers or {})
        self._layer = 0

    def observe(self, query: Tensor, key: Tensor, at: Tensor, scale: float | None = None) -> None:
        """The next layer's; see ``AttentionCollector``."""
        for name, collector in self.each.items():
            if name not in self._layers or self._layer in self._layers[name]:
                collector.observe(query, key, at, scale)
        self._layer += 1

    def result(self) -> tuple[Tensor, Tensor]:
        """The first one's."""
        return next(iter(self.each.values())).result()

    def results(self) -> dict[Name, tuple[Tensor, Tensor]]:
        """Each one's."""
        return {name: collector.result() for name, collector in self.each.items()}
