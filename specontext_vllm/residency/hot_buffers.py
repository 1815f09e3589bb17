"""Hot buffers: per request and KV head, the head pages that offloaded layers keep on the GPU (paper
C2, elastic loading).
"""

from __future__ import annotations

import torch
from torch import Tensor

from specontext_vllm.config import PAGE_SIZE, pages_for
from specontext_vllm.triton_kernels.counters import FETCHED, MISSED, RETURNED, SELECTED


class HotBuffers:
    """One slot map for all offloaded layers, since they share the selection; lives on the device,
    never read by the host.

    Args:
        lanes: requests that may have a buffer.
        num_kv_heads: H.
        slots: S, slots per (lane, KV head).
        max_pages: most pages of one request.
        max_rows, table_pages: shape of the selection, which bounds the misses of a step.
        num_layers: L. resident: ``[1]`` int32, layers that need no misses. counts: the meter's
            counters.

    Attributes:
        capacity: ``[lanes]`` int32 usable slots.
        slot_of: ``[lanes, H, max_pages]`` int32 slot of a page, or -1.
        page_of, source_of, stamp: ``[lanes, H, S]`` int32: the page a slot holds (-1: none), its
            head page in the host pool, and the step that last read it.
        slots: ``[max_rows * H, K]`` int32 slots of the step's selection.
        sources, targets, count: the step's misses: ``sources`` are head pages of the host pool,
            ``targets`` ``(lane * S + slot) * H + head``; ``count [1]``.
    """

    def __init__(
        self,
        lanes: int,
        num_kv_heads: int,
        slots: int,
        max_pages: int,
        *,
        max_rows: int,
        table_pages: int,
        num_layers: int,
        resident: Tensor,
        counts: Tensor,
        device: torch.device,
    ) -> None:
        def cells(*shape: int, value: int = -1) -> Tensor:
            return torch.full(shape, value, dtype=torch.int32, device=device)

        self.num_kv_heads, self.num_slots, self.num_layers = num_kv_heads, slots, num_layers
        self.resident, self.counts = resident, counts
        self.capacity = cells(lanes, value=0)
        self.slot_of = cells(lanes, num_kv_heads, max_pages)
        self.page_of, self.source_of, self.stamp = (
            cells(lanes, num_kv_heads, slots) for _ in range(3)
        )
        self.slots = cells(max_rows * num_kv_heads, table_pages, value=0)
        misses = max_rows * num_kv_heads * table_pages
        self.sources, self.targets, self.count = (
            cells(misses, value=0),
            cells(misses, value=0),
            cells(1, value=0),
        )
        self._order = cells(max_rows * num_kv_heads, 1 << (slots - 1).bit_length())
        # On the device, since a captured step counts on.
        self.step = cells(1, value=0)

    def reset(self, lanes: Tensor) -> None:
        """Forget what the given lanes (int64) hold."""
        for state in (self.slot_of, self.page_of, self.source_of, self.stamp):
            state.index_fill_(0, lanes, -1)

    def trim(self) -> None:
        """Forget what lies in slots beyond the lanes' capacities."""
        self.slot_of.masked_fill_(self.slot_of >= self.capacity[:, None, None], -1)
        beyond = (
            torch.arange(self.num_slots, device=self.capacity.device)
            >= self.capacity[:, None, None]
        )
        for state in (self.page_of, self.source_of, self.stamp):
            state.masked_fill_(beyond, -1)

    def resolve(
        self,
        selection: Tensor,
        lengths: Tensor,
        seq_lens: Tensor,
        lanes: Tensor,
        block_table: Tensor,
        rows: int,
    ) -> None:
        """Give every selected page a slot: hits keep theirs, misses take the least recently used;
        list the misses.

        Args:
            selection: ``[>= rows * H, K]`` int32 ``page * H + head``, the page counted from the
                request's start.
            lengths: ``[>= rows * H]`` int32 tokens selected; 0 for padding.
            seq_lens: ``[>= rows]`` int32, the new token included.
            lanes: ``[>= rows]`` int32, -1 for padding.
            block_table: ``[>= rows, W]`` int32 logical pages.
        """
        self.step.add_(1)
        self.count.zero_()
        if selection.is_cuda:
            from specontext_vllm.triton_kernels.resolve_pages import resolve_pages

            resolve_pages(
                selection,
                lengths,
                seq_lens,
                lanes,
                block_table,
                self.capacity,
                self.slot_of,
                self.page_of,
                self.source_of,
                self.stamp,
                self.slots,
                self._order,
                self.sources,
                self.targets,
                self.count,
                self.resident,
                self.counts,
                self.step,
                num_layers=self.num_layers,
                num_rows=rows,
                page_size=PAGE_SIZE,
            )
            return
        for row in range(rows):
            if lanes[row] >= 0:
                for head in range(self.num_kv_heads):
                    self._resolve_one(
                        selection,
                        lengths,
                        int(seq_lens[row]),
                        int(lanes[row]),
                        block_table[row],
                        row,
                        head,
                    )

    def _resolve_one(
        self,
        selection: Tensor,
        lengths: Tensor,
        seq_len: int,
        lane: int,
        table: Tensor,
        row: int,
        head: int,
    ) -> None:
        heads, step = self.num_kv_heads, int(self.step)
        sequence = row * heads + head
        pages = (selection[sequence, : pages_for(int(lengths[sequence]))] // heads).long()
        slot_of, page_of, stamp = (
            self.slot_of[lane, head],
            self.page_of[lane, head],
            self.stamp[lane, head],
        )
        slots = slot_of[pages].long()
        hits = slots[slots >= 0]
        returned = int((stamp[hits] != step - 1).sum())
        stamp[hits] = step
        misses = pages[slots < 0]
        usable = int(self.capacity[lane])
        free = torch.nonzero(stamp[:usable] != step).flatten()
        # Stable: of equally old slots the first goes first, as in the kernel.
        taken = free[stamp[free].sort(stable=True).indices][: len(misses)]
        evicted = page_of[taken]
        slot_of[evicted[evicted >= 0].long()] = -1
        sources = table[misses] * heads + head
        page_of[taken], self.source_of[lane, head, taken], stamp[taken] = (
            misses.int(),
            sources.int(),
            step,
        )
        slot_of[misses] = taken.int()
        self.slots[sequence, : len(pages)] = slot_of[pages]
        # A page whose first token this step writes has nothing to fetch.
        fetched = (misses != (seq_len - 1) // PAGE_SIZE) | ((seq_len - 1) % PAGE_SIZE != 0)
        start = int(self.count)
        end = start + int(fetched.sum())
        self.sources[start:end] = sources[fetched].int()
        self.targets[start:end] = ((lane * self.num_slots + taken[fetched]) * heads + head).int()
        self.count[0] = end
        missed = end - start
        self.counts[SELECTED] += len(pages)
        self.counts[MISSED] += missed
        self.counts[RETURNED] += returned
        self.counts[FETCHED] += missed * (self.num_layers - int(self.resident))

    def contents(self) -> tuple[Tensor, Tensor, Tensor]:
        """Everything the slots hold, as ``(sources, targets, count)`` like the misses of a step;
        behind ``count`` entries mean nothing.

        The lists are as long as the slots are many, so that the host need not wait to hear how many
        are in use.
        """
        lanes, heads, slots = self.page_of.shape
        device = self.page_of.device
        held = (self.page_of >= 0) & (
            torch.arange(slots, device=device) < self.capacity[:, None, None]
        )
        lane, head, slot = (
            torch.arange(n, dtype=torch.int32, device=device) for n in (lanes, heads, slots)
        )
        targets = (lane[:, None, None] * slots + slot) * heads + head[:, None]
        # Those that are not held all go to one place behind the list.
        place = torch.where(
            held, held.flatten().cumsum(0).view_as(held) - 1, held.numel()
        ).flatten()
        listed = (
            torch.zeros(held.numel() + 1, dtype=torch.int32, device=device).scatter_(
                0, place, values.flatten()
            )[:-1]
            for values in (self.source_of, targets)
        )
        return *listed, held.sum(dtype=torch.int32)[None]
