"""Prompt rows of offloaded layers: their context passes through two staging areas on the GPU."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from specontext_vllm.config import PAGE_SIZE, pages_for
from specontext_vllm.residency.copy_stream import CopyStream
from specontext_vllm.residency.transfer import upload
from specontext_vllm.step_data import Misses, StepBatch


@dataclass(frozen=True)
class StagedRows:
    """Prompt rows whose whole context lies in a staging area for one layer.

    Attributes:
        rows: the rows, counted from the first prompt row.
        tokens: their query tokens, counted from the first prompt token.
        block_table: ``[R, W]`` int32 frames of their pages.
        slots: ``[N]`` int64 places of their query tokens in the arena.
    """

    rows: slice
    tokens: slice
    block_table: Tensor
    slots: Tensor


@dataclass(frozen=True)
class _Group:
    """Rows that share a staging area, with places counted from the area's start, and the head pages
    of their history.
    """

    rows: slice
    tokens: slice
    pages: Tensor
    slots: Tensor
    history: Misses
    num_head_pages: int


class Staging:
    """Brings the history of prompt rows to offloaded layers, one group of rows at a time.

    The two areas take turns, and a turn is one group in one layer: while that group attends, the
    history of the next group, or of the first one in the next layer, is copied into the other area.

    Args:
        first_frame: first frame of the two areas, which lie one after the other.
        area_pages: pages of each area.
        num_layers: L.
        num_kv_heads: H.
        copies: the side stream.
        fetch_layer: ``fetch_layer(layer, misses, places)`` copies head pages of one layer from the
            host pool.

    Attributes:
        loaded_head_pages: head pages copied so far.
    """

    def __init__(
        self,
        first_frame: int,
        area_pages: int,
        *,
        num_layers: int,
        num_kv_heads: int,
        copies: CopyStream,
        fetch_layer: Callable[[int, Misses, Tensor], None],
        device: torch.device,
    ) -> None:
        self.loaded_head_pages = 0
        self._starts = first_frame, first_frame + area_pages
        self._areas = [
            torch.arange(start, start + area_pages, dtype=torch.int32, device=device)
            for start in self._starts
        ]
        self._area_pages, self._num_layers, self._num_kv_heads = (
            area_pages,
            num_layers,
            num_kv_heads,
        )
        self._copies, self._fetch_layer, self._device = copies, fetch_layer, device
        self._groups: list[_Group] = []
        self._first_layer = num_layers

    def stage(self, batch: StepBatch, first_layer: int) -> None:
        """Divide the prompt rows into groups and start to copy the history of the first two turns;
        nothing when no layer is offloaded.

        Args:
            first_layer: the first offloaded layer.
        """
        self._groups, self._first_layer = [], first_layer
        if first_layer == self._num_layers or batch.num_decodes == batch.num_rows:
            return
        pages = [pages_for(n) for n in batch.seq_lens_bound[batch.num_decodes :]]
        query_lens = batch.query_lens[batch.num_decodes :]
        first = tokens = 0
        while first < len(pages):
            stop, held = first, 0
            while stop < len(pages) and held + pages[stop] <= self._area_pages:
                held += pages[stop]
                stop += 1
            count = sum(query_lens[first:stop])
            group = self._group(batch, slice(first, stop), slice(tokens, tokens + count))
            self._groups.append(group)
            first, tokens = stop, tokens + count
        if self._groups:
            self._copies.fork()
            self._copy(0)
            self._copy(1)

    def rows(self, layer: int) -> Iterator[StagedRows]:
        """The prompt rows of an offloaded layer, group by group, each with its history in a staging
        area. The caller adds the new tokens, and attends before it asks for the next group.
        """
        for index, group in enumerate(self._groups):
            turn = (layer - self._first_layer) * len(self._groups) + index
            self._copies.wait_staged(turn)
            start = self._starts[turn % 2]
            yield StagedRows(
                group.rows, group.tokens, group.pages + start, group.slots + start * PAGE_SIZE
            )
            self._copies.release_staged(turn)
            self._copy(turn + 2)
        if layer == self._num_layers - 1:
            # A dummy batch runs the layers without ``stage``: it must not find this step's groups.
            self._groups = []

    def _copy(self, turn: int) -> None:
        groups = self._groups
        if not groups or turn >= (self._num_layers - self._first_layer) * len(groups):
            return
        layer, group = self._first_layer + turn // len(groups), groups[turn % len(groups)]
        self.loaded_head_pages += group.num_head_pages
        with self._copies.staging(turn):
            self._fetch_layer(layer, group.history, self._areas[turn % 2])

    def _group(self, batch: StepBatch, rows: slice, tokens: slice) -> _Group:
        heads, device = self._num_kv_heads, self._device
        first_row = batch.num_decodes
        first_token = batch.num_tokens - sum(batch.query_lens[first_row:])
        of_batch = slice(first_row + rows.start, first_row + rows.stop)
        seq_lens, query_lens = batch.seq_lens_bound[of_batch], batch.query_lens[of_batch]
        positions = batch.positions[first_token + tokens.start : first_token + tokens.stop]
        pages = [pages_for(n) for n in seq_lens]
        offsets = np.concatenate([[0], np.cumsum(pages)])[:-1]
        history = [pages_for(n - q) for n, q in zip(seq_lens, query_lens, strict=True)]
        owner = np.repeat(np.arange(len(pages)), history)
        page = np.concatenate([np.arange(n) for n in history]) if sum(history) else np.zeros(0, int)
        head = torch.arange(heads, dtype=torch.int32, device=device)
        blocks = batch.block_table[of_batch][
            upload(owner.astype(np.int64), device), upload(page.astype(np.int64), device)
        ]
        places = upload((offsets[owner] + page).astype(np.int32), device)
        starts = upload(np.repeat(offsets, query_lens).astype(np.int64), device)
        columns = torch.arange(max(pages), dtype=torch.int32, device=device)
        return _Group(
            rows=rows,
            tokens=tokens,
            pages=upload(offsets.astype(np.int32), device)[:, None] + columns,
            slots=starts * PAGE_SIZE + positions,
            history=Misses(
                sources=(blocks[:, None] * heads + head).flatten(),
                targets=(places[:, None] * heads + head).flatten(),
                count=upload(np.array([len(page) * heads], np.int32), device),
            ),
            num_head_pages=len(page) * heads,
        )
