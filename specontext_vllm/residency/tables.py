"""Where each layer's pages lie on the GPU: the ledger's tables on the device, and the page tables
made from them.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from specontext_vllm.config import PAGE_SIZE, pages_for
from specontext_vllm.residency.frames import Changes
from specontext_vllm.residency.transfer import upload
from specontext_vllm.step_data import Selection
from specontext_vllm.tier_data import DecodeRows, TierTables

NULL_FRAME = 0
"""The frame of every unused entry. Only captured graphs read it, when they warm up."""


class DeviceTables:
    """The tables that kernels read, brought up to the ledger once a step.

    Args:
        num_layers: L.
        num_pages: T, logical pages.
        num_kv_heads: H.
        num_lanes, hot_pages: lanes, and slots of a hot buffer.
        max_rows, table_pages: rows and columns of the page tables.

    Attributes:
        tensors: the tables.
        lanes: ``[max_rows]`` int32 lane of each decode row; -1 for padding.
    """

    def __init__(
        self,
        *,
        num_layers: int,
        num_pages: int,
        num_kv_heads: int,
        num_lanes: int,
        hot_pages: int,
        max_rows: int,
        table_pages: int,
        device: torch.device,
    ) -> None:
        def table(*shape: int) -> Tensor:
            return torch.full(shape, NULL_FRAME, dtype=torch.int32, device=device)

        self.num_kv_heads = num_kv_heads
        self.tensors = TierTables(
            resident=torch.full((1,), num_layers, dtype=torch.int32, device=device),
            frames=table(num_layers, num_pages),
            hot_frames=table(num_layers, num_lanes, hot_pages),
            pages=table(num_layers, max_rows * num_kv_heads, table_pages),
        )
        self.lanes = torch.full((max_rows,), -1, dtype=torch.int32, device=device)
        self._placed = [-1] * max_rows
        self._resident = num_layers

    def apply(self, changes: Changes) -> None:
        """Set the entries of both frame tables that changed."""
        frames, hot_frames = self.tensors.frames, self.tensors.hot_frames
        num_pages = frames.shape[1]
        _, num_lanes, num_slots = hot_frames.shape
        set_entries(
            frames,
            [(layers * num_pages + pages, values) for layers, pages, values in changes.frames],
        )
        set_entries(
            hot_frames,
            [
                ((layers * num_lanes + lanes) * num_slots + slots, values)
                for layers, lanes, slots, values in changes.hot
            ],
        )

    def set_resident(self, resident: int) -> int:
        """Set the number of resident layers; by how much it changed."""
        moved = abs(resident - self._resident)
        if moved:
            self._resident = resident
            self.tensors.resident.fill_(resident)
        return moved

    def place_rows(self, lanes: Sequence[int]) -> None:
        """Set the lanes of the first rows."""
        rows, placed = len(lanes), list(lanes)
        if placed != self._placed[:rows]:
            self._placed[:rows] = placed
            self.lanes[:rows].copy_(
                upload(np.array(placed, np.int32), self.lanes.device), non_blocking=True
            )

    def write_pages(
        self, selection: Selection, slots: Tensor, rows: DecodeRows, num_rows: int
    ) -> None:
        """Write the page table of every layer; runs on the device alone, so a graph may hold it.

        Args:
            selection: pages counted from the start of their request.
            slots: ``[rows * H, K]`` int32 hot slots of the same pages.
            num_rows: rows to write, padding included.
        """
        heads, tables = self.num_kv_heads, self.tensors
        if selection.pages.is_cuda:
            from specontext_vllm.triton_kernels.layer_tables import layer_tables

            layer_tables(
                selection,
                slots,
                rows,
                tables,
                num_rows=num_rows,
                num_kv_heads=heads,
                page_size=PAGE_SIZE,
            )
            return
        resident = self._resident
        for row in range(num_rows):
            lane = int(rows.lanes[row])
            for head in range(heads if lane >= 0 else 0):
                sequence = row * heads + head
                count = pages_for(int(selection.lengths[sequence]))
                positions = (selection.pages[sequence, :count] // heads).long()
                blocks = rows.block_table[row, positions].long()
                tables.pages[:resident, sequence, :count] = (
                    tables.frames[:resident, blocks] * heads + head
                )
                tables.pages[resident:, sequence, :count] = (
                    tables.hot_frames[resident:, lane, slots[sequence, :count].long()] * heads
                    + head
                )


def set_entries(table: Tensor, entries: Sequence[tuple[np.ndarray, np.ndarray]]) -> None:
    """Set entries of an int32 table on the device.

    Args:
        entries: pairs of flat indices and values; the last value of an index counts.
    """
    if entries:
        where = np.concatenate([index for index, _ in entries]).astype(np.int64)
        values = np.concatenate([value for _, value in entries]).astype(np.int32)
        where, last = np.unique(where[::-1], return_index=True)
        table.view(-1).scatter_(
            0, upload(where, table.device), upload(values[::-1][last], table.device)
        )
