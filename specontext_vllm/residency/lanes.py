"""How many requests run at once beside two tiers: each has a lane, and with it hot buffers."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from specontext_vllm.config import PAGE_SIZE
from specontext_vllm.sizes import in_gib

if TYPE_CHECKING:
    from specontext_vllm.residency.memory_model import MemoryModel

MIN_GAIN = 1.02
"""A host pool must raise the number of pages by at least this factor, or it is refused."""

KEPT_GAIN = 0.5
"""Where the lanes are fewer than the requests in flight, they leave this share of the pages that
the host pool adds beside a single one.
"""


def most_lanes(model: MemoryModel, fits: Callable[[MemoryModel], bool]) -> MemoryModel:
    """``model`` with as many of its lanes as ``fits`` allows; as it is where not even one fits.

    Args:
        fits: whether a model with so many lanes does; true of fewer wherever it is of more.
    """
    if fits(model) or not fits(model.with_lanes(1)):
        return model
    low, high = 1, model.lanes
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(model.with_lanes(middle)) else (low, middle)
    return model.with_lanes(low)


def paying_lanes(model: MemoryModel, gpu_bytes: int, host_bytes: int, width: int) -> MemoryModel:
    """``model`` with all its lanes where a host pool pays beside their hot buffers of ``width``
    pages; else with as many as leave ``KEPT_GAIN`` of what the pool adds.
    """

    def pages(lanes: int) -> int:
        return model.with_lanes(lanes).largest(gpu_bytes, host_bytes, width).num_pages

    alone, best = model.largest(gpu_bytes, 0, width).num_pages, pages(1)
    # The longest request and vLLM's null block must fit, if they can.
    least = max(1, MIN_GAIN * alone, min(best, model.block_pages + model.max_pages))
    if not host_bytes or best < least or pages(model.lanes) >= least:
        return model
    least = max(least, alone + KEPT_GAIN * (best - alone))
    return most_lanes(model, lambda fewer: pages(fewer.lanes) >= least)


def no_gain(model: MemoryModel, gpu_bytes: int, host_bytes: int, width: int) -> str:
    """Why a host pool is refused, which gains nothing beside the hot buffer of a single request."""
    alone = model.largest(gpu_bytes, 0, width).num_pages
    gpu, host = in_gib(gpu_bytes, host_bytes)
    smallest = model.with_lanes(1, budget_pages=1, table_pages=1)
    if smallest.largest(gpu_bytes, host_bytes, 1).num_pages < MIN_GAIN * alone:
        return (
            f"{host} GiB of host memory add less than {MIN_GAIN - 1:.0%} to what {gpu} GiB "
            "of memory for KV hold, however small the hot buffers; give "
            f"more, or set host_kv_gib to 0."
        )
    return (
        f"the hot buffer of a single request takes so much of the {gpu} GiB of memory for KV that "
        f"{host} GiB of host memory gain nothing; lower the budget (a buffer holds "
        f"{width * PAGE_SIZE} tokens), or set host_kv_gib to 0."
    )
