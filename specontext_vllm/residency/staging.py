"""Prompt rows of offloaded layers: their context passes through two staging areas on the GPU."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
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
    """Rows that share a staging area, with places counted from the area's start."""

    rows: slice
    tokens: slice
    pages: Tensor
    slots: Tensor


class Staging:
    """Brings the history of prompt rows to offloaded layers, one group of rows at a time.

    The two areas take turns, and a turn is one group in one layer: while that group attends, the
    history of the next group, or of the first one in the next layer, is copied into the other area.

    A layer whose KV others read is staged for each of them: at once for those that follow it while
    the two areas hold all of its groups, else anew from its mirror, which has the step's tokens
    then.

    Args:
        first_frame: first frame of the two areas, which lie one after the other.
        area_pages: pages of each area.
        num_layers: L.
        order: the layers in the order in which they are read.
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
        order: Sequence[int],
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
        self._order = order
        self._copies, self._fetch_layer, self._device = copies, fetch_layer, device
        self._groups: list[_Group] = []
        self._turns: list[tuple[int, Misses]] = []
        """Of each turn the layer, and the head pages that it needs."""
        self._first_turns: dict[int, int] = {}
        """Of each place in the order whose layer is offloaded, the turn of its first group."""
        self._last_places: dict[int, int] = {}
        """Of each such turn the last place that it serves."""

    def stage(self, batch: StepBatch, first_layer: int) -> None:
        """Divide the prompt rows into groups and start to copy the history of the first two turns;
        nothing when no layer is offloaded.

        Args:
            first_layer: the first offloaded layer.
        """
        self._forget()
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
        self._take_turns(batch, first_layer)
        self._copies.fork()
        self._copy(0)
        self._copy(1)

    def rows(self, place: int) -> Iterator[StagedRows]:
        """The prompt rows of an offloaded layer, group by group, each with its history in a staging
        area. The first time that the layer is read the caller adds the new tokens, which are there
        afterwards. It attends before it asks for the next group.

        Args:
            place: in the order.
        """
        first = self._first_turns.get(place, 0)
        is_last = self._last_places.get(first) == place
        for turn, group in enumerate(self._groups, first):
            self._copies.wait_staged(turn)
            start = self._starts[turn % 2]
            yield StagedRows(
                group.rows, group.tokens, group.pages + start, group.slots + start * PAGE_SIZE
            )
            if is_last:
                self._copies.release_staged(turn)
                self._copy(turn + 2)
        if place == len(self._order) - 1:
            # A dummy batch runs the layers without ``stage``: it must not find this step's groups.
            self._forget()

    def _forget(self) -> None:
        self._groups, self._turns = [], []
        self._first_turns, self._last_places = {}, {}

    def _take_turns(self, batch: StepBatch, first_layer: int) -> None:
        """Settle which layer's groups come when."""
        histories = [self._head_pages(batch, group, whole=False) for group in self._groups]
        contexts: list[Misses] = []
        staged: list[int] = []
        for place, layer in enumerate(self._order):
            if layer < first_layer:
                continue
            # Where both areas together hold all groups, they still have what the layer before read.
            if staged[-1:] != [layer] or len(self._groups) > 2:
                if layer in staged and not contexts:
                    contexts = [
                        self._head_pages(batch, group, whole=True) for group in self._groups
                    ]
                needed = contexts if layer in staged else histories
                self._turns += [(layer, head_pages) for head_pages in needed]
            staged.append(layer)
            self._first_turns[place] = first = len(self._turns) - len(self._groups)
            self._last_places[first] = place

    def _copy(self, turn: int) -> None:
        """Copy what a turn needs. One that needs the step's own tokens is at least two turns behind
        the layer's first, whose area it, or one between them, waits for; they were written before
        that.
        """
        if turn >= len(self._turns):
            return
        layer, head_pages = self._turns[turn]
        self.loaded_head_pages += len(head_pages.sources)
        with self._copies.staging(turn):
            self._fetch_layer(layer, head_pages, self._areas[turn % 2])

    def _group(self, batch: StepBatch, rows: slice, tokens: slice) -> _Group:
        device, first_row = self._device, batch.num_decodes
        first_token = batch.num_tokens - sum(batch.query_lens[first_row:])
        of_batch = slice(first_row + rows.start, first_row + rows.stop)
        positions = batch.positions[first_token + tokens.start : first_token + tokens.stop]
        pages = [pages_for(n) for n in batch.seq_lens_bound[of_batch]]
        offsets = _starts_of(pages)
        starts = upload(np.repeat(offsets, batch.query_lens[of_batch]).astype(np.int64), device)
        columns = torch.arange(max(pages), dtype=torch.int32, device=device)
        return _Group(
            rows=rows,
            tokens=tokens,
            pages=upload(offsets.astype(np.int32), device)[:, None] + columns,
            slots=starts * PAGE_SIZE + positions,
        )

    def _head_pages(self, batch: StepBatch, group: _Group, *, whole: bool) -> Misses:
        """The head pages of a group's history, the step's tokens included or not."""
        heads, device, first_row = self._num_kv_heads, self._device, batch.num_decodes
        of_batch = slice(first_row + group.rows.start, first_row + group.rows.stop)
        seq_lens, query_lens = batch.seq_lens_bound[of_batch], batch.query_lens[of_batch]
        offsets = _starts_of([pages_for(n) for n in seq_lens])
        count = [
            pages_for(n if whole else n - q) for n, q in zip(seq_lens, query_lens, strict=True)
        ]
        owner = np.repeat(np.arange(len(count)), count)
        page = np.concatenate([np.arange(n) for n in count]) if sum(count) else np.zeros(0, int)
        head = torch.arange(heads, dtype=torch.int32, device=device)
        blocks = batch.block_table[of_batch][
            upload(owner.astype(np.int64), device), upload(page.astype(np.int64), device)
        ]
        places = upload((offsets[owner] + page).astype(np.int32), device)
        return Misses(
            sources=(blocks[:, None] * heads + head).flatten(),
            targets=(places[:, None] * heads + head).flatten(),
            count=upload(np.array([len(page) * heads], np.int32), device),
        )


def _starts_of(pages: Sequence[int]) -> np.ndarray:
    """Where rows of so many pages begin in an area."""
    return np.concatenate([[0], np.cumsum(pages)])[:-1]
