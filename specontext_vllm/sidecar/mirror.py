"""What the worker remembers of the actor's caches, to fill the next actor with."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from specontext_vllm.config import PAGE_SIZE
from specontext_vllm.retrieval.cache import HeadCache
from specontext_vllm.retrieval.checkpoint import HeadSpec
from specontext_vllm.sidecar.messages import Refill


class Mirror:
    """A host copy of the caches of a retrieval head, as far as the actor has acknowledged them.

    Args:
        num_blocks: pages.
        head: shape of the head.
        dtype, key_dtype: of its fused aux, and of its keys.
    """

    def __init__(
        self, num_blocks: int, head: HeadSpec, dtype: torch.dtype, key_dtype: torch.dtype
    ) -> None:
        self._cache = HeadCache.allocate(
            num_blocks,
            head.num_kv_heads,
            head.head_dim,
            head.hidden_size,
            dtype,
            key_dtype,
            torch.device("cpu"),
        )
        self._known = np.zeros(num_blocks, dtype=bool)

    @property
    def num_blocks(self) -> int:
        """Pages that there are."""
        return len(self._known)

    @property
    def num_known(self) -> int:
        """Pages that the actor has acknowledged."""
        return int(self._known.sum())

    def write_learned(self, keys: Tensor, slots: Tensor, fused: Tensor, pages: Tensor) -> None:
        """What the actor learned in a step, which makes the step's pages known.

        Args:
            keys, slots: ``[n, nkv, D]``, ``[n]`` of the step's tokens.
            fused, pages: ``[m, H]``, ``[m]`` of all pages that the step wrote.
        """
        self._cache.write_keys(keys, slots)
        self._cache.fused[pages] = fused
        self._known[pages.numpy()] = True

    def refills(self, max_bytes: int) -> Iterator[Refill]:
        """Messages of at most ``max_bytes``, or of one page, that tell an actor all known pages."""
        keys, fused = self._cache.keys, self._cache.fused
        pages_each = max(1, max_bytes // (keys[0].nbytes + fused[0].nbytes))
        for pages in torch.from_numpy(np.flatnonzero(self._known)).split(pages_each):
            yield Refill(pages, keys[pages], fused[pages])


def pages_of(slots: Tensor) -> Tensor:
    """The pages ``[m]`` that ``slots [n]`` lie in, ascending."""
    return (slots // PAGE_SIZE).unique()
