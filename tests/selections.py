"""Hot buffers and selections of a step, for the tests of the two tiers."""

from typing import Any

import torch

from specontext_vllm.config import PAGE_SIZE, pages_for
from specontext_vllm.residency.hot_buffers import HotBuffers
from specontext_vllm.step_data import Misses, Selection
from specontext_vllm.triton_kernels import counters

HEADS, SLOTS, LANES, MAX_PAGES, TABLE = 2, 6, 3, 30, 5
LAYERS, RESIDENT = 7, 3


def make_hot_buffers(device: torch.device) -> HotBuffers:
    resident = torch.tensor([RESIDENT], dtype=torch.int32, device=device)
    counts = torch.zeros(counters.COUNTERS, dtype=torch.int64, device=device)
    return HotBuffers(
        LANES,
        HEADS,
        SLOTS,
        MAX_PAGES,
        max_rows=LANES,
        table_pages=TABLE,
        num_layers=LAYERS,
        resident=resident,
        counts=counts,
        device=device,
    )


def random_selection(generator: torch.Generator, lanes: Any, seq_lens: list[int]) -> Selection:
    """A selection of sinks, the newest page and random ones; ids are page * H + head."""
    selection = torch.full((LANES * HEADS, TABLE), -7, dtype=torch.int32)
    lengths = torch.zeros(LANES * HEADS, dtype=torch.int32)
    for row, tokens in enumerate(seq_lens):
        count = pages_for(tokens)
        for head in range(HEADS if lanes[row] >= 0 else 0):
            kept = min(count, TABLE)
            middle = torch.randperm(max(count - 2, 0), generator=generator)[: kept - 2] + 1
            pages = (
                torch.cat([torch.tensor([0]), middle, torch.tensor([count - 1])])[-kept:]
                .unique()
                .sort()
                .values
            )
            kept = len(pages)
            selection[row * HEADS + head, :kept] = pages.int() * HEADS + head
            lengths[row * HEADS + head] = tokens - (count - kept) * PAGE_SIZE
    return Selection(selection, lengths, torch.ones(LANES, HEADS))


def to_device(data: Any, device: torch.device) -> Any:
    """A dataclass of tensors, on a device."""
    return type(data)(
        *(t.to(device) if isinstance(t, torch.Tensor) else t for t in vars(data).values())
    )


def listed(misses: Misses) -> list[tuple[int, int]]:
    """The valid (source, target) pairs, sorted."""
    count = int(misses.count)
    return sorted(zip(misses.sources[:count].tolist(), misses.targets[:count].tolist()))
