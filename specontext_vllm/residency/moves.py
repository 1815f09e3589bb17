"""Brings the device up to the ledger: tables, slot maps, and copies of whole pages where layers
move or a prefix hit has lost its frames.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from specontext_vllm.residency.copy_stream import CopyStream
from specontext_vllm.residency.frames import Changes
from specontext_vllm.residency.hot_buffers import HotBuffers
from specontext_vllm.residency.tables import DeviceTables, set_entries
from specontext_vllm.residency.transfer import fetch, upload
from specontext_vllm.step_data import Misses
from specontext_vllm.tier_data import KVPools
from specontext_vllm.triton_kernels.counters import FILLED


class Moves:
    """Applies the ledger's changes.

    Args:
        pools, tables, hot, copies: the parts of the tiers.
        counts: ``[COUNTERS]`` int64 counters of the meter.

    Attributes:
        moved_layers: layers that were offloaded or came back so far.
        loaded_head_pages: head pages copied for them and for prefix hits, without hot buffers.
    """

    def __init__(
        self,
        pools: KVPools,
        tables: DeviceTables,
        hot: HotBuffers,
        copies: CopyStream,
        counts: Tensor,
    ) -> None:
        self.moved_layers = self.loaded_head_pages = 0
        self._pools, self._tables, self._hot, self._copies = pools, tables, hot, copies
        self._counts = counts
        self._device = pools.arena.device
        self._no_resident = torch.zeros(1, dtype=torch.int32, device=self._device)
        """A number of resident layers with which every layer is copied."""
        self._returning: tuple[int, np.ndarray] | None = None
        self._read_on_side_stream: list[Misses] = []
        """Kept until the side stream has read them."""

    def apply(self, changes: Changes, resident: int) -> None:
        """Apply the changes of a step after which ``resident`` layers are resident.

        Raises:
            RuntimeError: ``copy_returning`` was not called in the step before.
        """
        if self._returning is not None:
            raise RuntimeError(
                "specontext: a layer on its way back was not copied in the step before; please "
                "report it."
            )
        # The copies of the step before read these tables; where no layer is offloaded nothing has
        # waited for them yet.
        self._copies.join()
        self._read_on_side_stream.clear()
        self._tables.apply(changes)
        if changes.capacities:
            lanes, slots = list(changes.capacities), list(changes.capacities.values())
            set_entries(self._hot.state.capacity, [(np.array(lanes), np.array(slots))])
        if changes.trimmed:
            self._hot.trim()
        if changes.lanes:
            self._hot.reset(upload(np.array(changes.lanes, np.int64), self._device))
        self.moved_layers += self._tables.set_resident(resident)
        if changes.offloaded:
            self._fill_hot_buffers(changes.offloaded)
        for layer, pages in changes.loads:
            if layer < resident:
                self._load(layer, self._list_pages(pages))
        self._returning = changes.returning

    def copy_returning(self) -> None:
        """Copy the step's share of a layer on its way back, on the side stream."""
        if self._returning is not None:
            layer, pages = self._returning
            listed = self._list_pages(pages)
            with self._copies.on_side_stream():
                self._load(layer, listed)
            self._read_on_side_stream.append(listed)
            self._returning = None

    def fetch_layer(self, layer: int, misses: Misses, places: Tensor) -> None:
        """Copy head pages of one layer, resident or not, on the current stream.

        Args:
            misses: ``targets`` are ``place * H + head``.
            places: ``[K]`` int32 frame of each place.
        """
        layers = range(layer, layer + 1)
        fetch(self._pools, misses, places[None], self._no_resident, layers=layers)

    def _fill_hot_buffers(self, layers: Sequence[int]) -> None:
        """Copy what the hot buffers hold to newly offloaded layers."""
        contents = self._hot.contents()
        self._counts[FILLED] += contents.count[0] * len(layers)
        # The step's misses come after these copies on the side stream, and every decode row that
        # reads one of the layers waits for its misses.
        with self._copies.on_side_stream():
            for layer in layers:
                places = self._tables.tensors.hot_frames[layer].view(-1)
                self.fetch_layer(layer, contents, places)
        self._read_on_side_stream.append(contents)

    def _list_pages(self, pages: np.ndarray) -> Misses:
        """All head pages of whole pages, whose places are columns of a frame table."""
        heads = self._tables.num_kv_heads
        listed = (pages[:, None] * heads + np.arange(heads)).astype(np.int32).ravel()
        self.loaded_head_pages += len(listed)
        head_pages = upload(listed, self._device)
        count = upload(np.array([len(listed)], np.int32), self._device)
        return Misses(head_pages, head_pages, count)

    def _load(self, layer: int, listed: Misses) -> None:
        self.fetch_layer(layer, listed, self._tables.tensors.frames[layer])
