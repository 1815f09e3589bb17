"""How much host memory a worker's pool of KV pages takes (host_kv_gib)."""

from __future__ import annotations

import logging
from typing import Literal

from specontext_vllm.config import CONFIG_KEY, ConfigError
from specontext_vllm.residency.host_memory import free_host_memory
from specontext_vllm.sizes import in_gib

logger = logging.getLogger("vllm.specontext")

RESERVE_SHARE = 0.1
"""Share of the machine's free memory that host_kv_gib "auto" leaves free."""

RESERVE_BYTES = 8 << 30
"""Bytes that it leaves free at least."""


def worker_host_bytes(
    asked: float | Literal["auto"], in_flight: int, *, workers: int, engines: int
) -> int:
    """Bytes of one worker's host pool. The setting is the machine's; the workers on it share it.

    Args:
        asked: host_kv_gib.
        in_flight: KV in bytes, on one worker, of as many and as long requests as may run at once.
        workers: workers of this engine on this machine.
        engines: data-parallel engines on this machine.
    Raises:
        ConfigError: the machine has too little memory free.
    """
    free, sharers = free_host_memory(), workers * engines
    if asked != "auto":
        return asked_host_bytes(asked, free, engines) // sharers
    total = recommended_host_bytes(free, sharers * in_flight)
    logger.info(
        "SpeContext tiers: host_kv_gib auto takes %.1f of %.1f GiB of free memory; at "
        "least %.1f are left alone, and no more is taken than "
        "--max-num-seqs requests of --max-model-len tokens fill.",
        total / 2**30,
        free / 2**30,
        host_reserve(free) / 2**30,
    )
    return total // sharers


def host_reserve(free: int) -> int:
    """Bytes of ``free`` host memory that host_kv_gib "auto" leaves free."""
    return max(RESERVE_BYTES, int(RESERVE_SHARE * free))


def recommended_host_bytes(free: int, in_flight: int) -> int:
    """The pools of host_kv_gib "auto" on this machine together, in bytes.

    Args:
        free: free memory.
        in_flight: KV of as many and as long requests as may run at once. A larger pool would only
            hold pages without a request, and each page takes GPU memory for the head's caches.
    Raises:
        ConfigError: nothing is free beyond the reserve.
    """
    if free <= host_reserve(free):
        there, reserve = in_gib(free, host_reserve(free))
        raise ConfigError(
            f"additional_config.{CONFIG_KEY}.host_kv_gib: found 'auto', but this machine has "
            f"{there} GiB of memory free, all within the "
            f"{reserve} GiB that auto leaves alone; give a number, or 0."
        )
    return min(free - host_reserve(free), in_flight)


def asked_host_bytes(gib: float, free: int, engines: int) -> int:
    """The pools of a host_kv_gib in numbers on this machine together, in bytes.

    Args:
        free: memory that is free now. Where other engines of this machine have yet to take their
            shares, the last one to allocate is refused.
        engines: data-parallel engines on this machine, which share the pool.
    Raises:
        ConfigError: this engine's share is not free.
    """
    if (share := gib * 2**30 / engines) > free:
        taken, there = in_gib(share, free)
        raise ConfigError(
            f"additional_config.{CONFIG_KEY}.host_kv_gib: found {gib}, of which this engine takes "
            f"{taken} GiB, but this machine has "
            f"{there} GiB of memory free; lower it."
        )
    return int(gib * 2**30)
