"""The page tables of all layers: each entry against the frame or hot slot it must point at."""

import torch

from specontext_vllm.config import PAGE_SIZE, pages_for
from specontext_vllm.tier_data import DecodeRows, TierTables
from specontext_vllm.triton_kernels.layer_tables import layer_tables
from tests.selections import (
    HEADS,
    LANES,
    MAX_PAGES,
    SLOTS,
    TABLE,
    random_selection,
    to_device,
)


def test_layer_tables_point_at_frames_or_hot_slots(device):
    layers, rows, resident = 3, 2, 1
    generator = torch.Generator().manual_seed(4)
    table = torch.stack([torch.randperm(MAX_PAGES, generator=generator) for _ in range(rows)]).int()
    lanes = torch.tensor([2, 0], dtype=torch.int32)
    selection = random_selection(generator, [2, 0], [90, 40])
    slots = torch.randint(0, SLOTS, (LANES * HEADS, TABLE), generator=generator).int()
    frames = torch.randperm(layers * MAX_PAGES, generator=generator).view(layers, MAX_PAGES).int()
    hot = (
        torch.randperm(layers * LANES * SLOTS, generator=generator).view(layers, LANES, SLOTS).int()
        + 1000
    )
    out = torch.full((layers, LANES * HEADS, TABLE), -7, dtype=torch.int32, device=device)
    number = torch.tensor([resident], dtype=torch.int32)
    layer_tables(
        to_device(selection, device),
        slots.to(device),
        to_device(DecodeRows(lanes, torch.tensor([90, 40]).int(), table), device),
        to_device(TierTables(number, frames, hot, out), device),
        num_rows=rows,
        num_kv_heads=HEADS,
        page_size=PAGE_SIZE,
    )
    for layer in range(layers):
        for row in range(rows):
            for head in range(HEADS):
                sequence = row * HEADS + head
                for k in range(TABLE):
                    found = int(out[layer, sequence, k])
                    if k >= pages_for(int(selection.lengths[sequence])):
                        assert found == -7
                    elif layer < resident:
                        assert (
                            found
                            == frames[layer, table[row, selection.pages[sequence, k] // HEADS]]
                            * HEADS
                            + head
                        )
                    else:
                        assert found == hot[layer, lanes[row], slots[sequence, k]] * HEADS + head
