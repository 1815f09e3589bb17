"""Hot buffers: the head pages of each request that offloaded layers keep on the GPU (elastic
loading; paper, section C2).
"""

from __future__ import annotations

import torch
from torch import Tensor

from specontext_vllm.config import PAGE_SIZE, pages_for
from specontext_vllm.step_data import Misses, Selection
from specontext_vllm.tier_data import DecodeRows, HotState
from specontext_vllm.triton_kernels.counters import FETCHED, MISSED, RETURNED, SELECTED


class HotBuffers:
    """The pages that each running request holds in every offloaded layer, by slot. All of it lives
    on the device; the host never reads it.

    Args:
        num_lanes: requests that may have a buffer.
        num_kv_heads: H.
        num_slots: S, slots per (lane, KV head).
        max_pages: pages of one request, at the most.
        max_rows, table_pages: shape of the selection, which bounds the misses of a step.
        num_layers: L.
        resident: ``[1]`` int32 number of resident layers, which fetch nothing.
        counts: ``[COUNTERS]`` int64 counters of the meter.

    Attributes:
        state: what the slots hold.
        misses: those of the step; ``resolve`` writes them.
    """

    def __init__(
        self,
        num_lanes: int,
        num_kv_heads: int,
        num_slots: int,
        max_pages: int,
        *,
        max_rows: int,
        table_pages: int,
        num_layers: int,
        resident: Tensor,
        counts: Tensor,
        device: torch.device,
    ) -> None:
        def full(value: int, *shape: int, dtype: torch.dtype = torch.int32) -> Tensor:
            return torch.full(shape, value, dtype=dtype, device=device)

        self.num_kv_heads, self.num_slots, self.num_layers = num_kv_heads, num_slots, num_layers
        self.resident, self.counts = resident, counts
        sequences = max_rows * num_kv_heads
        self.state = HotState(
            capacity=full(0, num_lanes),
            slot_of=full(-1, num_lanes, num_kv_heads, max_pages),
            page_of=full(-1, num_lanes, num_kv_heads, num_slots),
            source_of=full(-1, num_lanes, num_kv_heads, num_slots),
            stamp=full(-1, num_lanes, num_kv_heads, num_slots, dtype=torch.int64),
            step=full(0, 1, dtype=torch.int64),
            slots=full(0, sequences, table_pages),
            order=full(-1, sequences, 1 << (num_slots - 1).bit_length()),
        )
        self.misses = Misses(
            sources=full(0, sequences * table_pages),
            targets=full(0, sequences * table_pages),
            count=full(0, 1),
        )

    def reset(self, lanes: Tensor) -> None:
        """Forget what the given lanes (int64) hold."""
        state = self.state
        for tensor in (state.slot_of, state.page_of, state.source_of, state.stamp):
            tensor.index_fill_(0, lanes, -1)

    def forget(self) -> None:
        """Forget what all lanes hold. Runs on the device alone, so a graph may hold it."""
        state = self.state
        for tensor in (state.slot_of, state.page_of, state.source_of, state.stamp):
            tensor.fill_(-1)

    def trim(self) -> None:
        """Forget what lies in slots beyond the lanes' capacities."""
        state, capacity = self.state, self.state.capacity[:, None, None]
        state.slot_of.masked_fill_(state.slot_of >= capacity, -1)
        beyond = torch.arange(self.num_slots, device=capacity.device) >= capacity
        for tensor in (state.page_of, state.source_of, state.stamp):
            tensor.masked_fill_(beyond, -1)

    def resolve(self, selection: Selection, rows: DecodeRows, num_rows: int) -> None:
        """Give every selected page a slot and list the misses: hits keep their slot, misses take
        the least recently used ones. Runs on the device alone, so a graph may hold it.

        Args:
            selection: pages counted from the start of their request.
            num_rows: rows to resolve, padding included.
        """
        self.state.step.add_(1)
        self.misses.count.zero_()
        if selection.pages.is_cuda:
            from specontext_vllm.triton_kernels.resolve_pages import resolve_pages

            resolve_pages(
                selection,
                rows,
                self.state,
                self.misses,
                resident=self.resident,
                counts=self.counts,
                num_layers=self.num_layers,
                num_rows=num_rows,
                page_size=PAGE_SIZE,
            )
            return
        for row in range(num_rows):
            if rows.lanes[row] >= 0:
                for head in range(self.num_kv_heads):
                    self._resolve_one(selection, rows, row, head)

    def _resolve_one(self, selection: Selection, rows: DecodeRows, row: int, head: int) -> None:
        heads, state, misses, step = (
            self.num_kv_heads,
            self.state,
            self.misses,
            int(self.state.step),
        )
        lane, seq_len, sequence = int(rows.lanes[row]), int(rows.seq_lens[row]), row * heads + head
        count = pages_for(int(selection.lengths[sequence]))
        pages = (selection.pages[sequence, :count] // heads).long()
        slot_of, page_of, stamp = (
            state.slot_of[lane, head],
            state.page_of[lane, head],
            state.stamp[lane, head],
        )
        slots = slot_of[pages].long()
        hits = slots[slots >= 0]
        returned = int((stamp[hits] != step - 1).sum())
        stamp[hits] = step
        missing = pages[slots < 0]
        usable = int(state.capacity[lane])
        free = torch.nonzero(stamp[:usable] != step).flatten()
        # A stable sort: of equally old slots the first one goes first, as in the kernel.
        taken = free[stamp[free].sort(stable=True).indices][: len(missing)]
        evicted = page_of[taken]
        slot_of[evicted[evicted >= 0].long()] = -1
        sources = rows.block_table[row][missing] * heads + head
        page_of[taken], state.source_of[lane, head, taken], stamp[taken] = (
            missing.int(),
            sources.int(),
            step,
        )
        slot_of[missing] = taken.int()
        state.slots[sequence, : len(pages)] = slot_of[pages]
        # The pages that this step begins hold nothing to fetch yet.
        fetched = missing * PAGE_SIZE < seq_len - 1
        start = int(misses.count)
        end = start + int(fetched.sum())
        misses.sources[start:end] = sources[fetched].int()
        misses.targets[start:end] = ((lane * self.num_slots + taken[fetched]) * heads + head).int()
        misses.count[0] = end
        missed = end - start
        self.counts[SELECTED] += len(pages)
        self.counts[MISSED] += missed
        self.counts[RETURNED] += returned
        self.counts[FETCHED] += missed * (self.num_layers - int(self.resident))

    def contents(self) -> Misses:
        """Everything the slots hold, listed like the misses of a step. The lists are as long as
        there are slots, so that the host need not wait for the count.
        """
        state = self.state
        lanes, heads, slots = state.page_of.shape
        device = state.page_of.device
        held = (state.page_of >= 0) & (
            torch.arange(slots, device=device) < state.capacity[:, None, None]
        )
        lane, head, slot = (
            torch.arange(n, dtype=torch.int32, device=device) for n in (lanes, heads, slots)
        )
        targets = (lane[:, None, None] * slots + slot) * heads + head[:, None]
        # Entries that are not held all go to one place at the end, which is cut off.
        place = torch.where(
            held, held.flatten().cumsum(0).view_as(held) - 1, held.numel()
        ).flatten()

        def listed(values: Tensor) -> Tensor:
            found = torch.zeros(held.numel() + 1, dtype=torch.int32, device=device)
            return found.scatter_(0, place, values.flatten())[:-1]

        return Misses(
            sources=listed(state.source_of),
            targets=listed(targets),
            count=held.sum(dtype=torch.int32)[None],
        )
