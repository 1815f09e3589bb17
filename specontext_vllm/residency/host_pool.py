"""Pinned host memory of exactly the size asked for."""

from __future__ import annotations

import weakref
from contextlib import suppress
from pathlib import Path

import torch
from torch import Tensor

from specontext_vllm.sizes import in_gib

CGROUP = Path("/sys/fs/cgroup")
"""Where a container sees its own limits."""
CGROUP_FILES = (
    ("memory.max", "memory.current", "memory.stat", "inactive_file"),
    (
        "memory/memory.limit_in_bytes",
        "memory/memory.usage_in_bytes",
        "memory/memory.stat",
        "total_inactive_file",
    ),
)
"""Of both versions: the limit, what is used of it, statistics, and their entry that can be had
back. One is missing, or its limit is "max", where there is none.
"""


class HostPoolError(RuntimeError):
    """The pool cannot be had; its message is one sentence with the numbers."""


def free_host_memory() -> int:
    """Bytes that this process may still take: the machine's available memory, or less where a
    control group (a container's limit) allows less.

    Page cache that the kernel would give back counts as free, as in the machine's own figure.
    """
    import psutil

    free = psutil.virtual_memory().available
    for limit, usage, stat, cached in CGROUP_FILES:
        try:
            allowed, used = int((CGROUP / limit).read_text()), int((CGROUP / usage).read_text())
            reclaimable = dict(line.split() for line in (CGROUP / stat).read_text().splitlines())
        except (OSError, ValueError):
            continue
        free = min(free, max(0, allowed - used + int(reclaimable.get(cached, 0))))
    return free


def machine_memory() -> int:
    """Bytes of memory that the machine has, or that a control group grants of them."""
    import psutil

    total = psutil.virtual_memory().total
    for limit, *_ in CGROUP_FILES:
        with suppress(OSError, ValueError):
            total = min(total, int((CGROUP / limit).read_text()))
    return total


def allocate_host_pool(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Zeroed host memory, page-locked when ``device`` is a GPU, so that its kernels may read and
    write it.

    Pinned through ``cudaHostRegister``: torch's own pinned allocator rounds up to a power of two,
        which at 80 GiB would
    take 128.

    Raises:
        HostPoolError: the machine or its container has less free memory, or refuses to give or to
            lock so much.
    """
    size = torch.Size(shape).numel() * dtype.itemsize
    free = free_host_memory()
    if size > free:
        needed, there = in_gib(size, free)
        raise HostPoolError(
            f"host_kv_gib: the pool needs {needed} GiB and this machine has {there} GiB of memory "
            "free; lower it."
        )
    try:
        pool = torch.zeros(shape, dtype=dtype)
    except (MemoryError, RuntimeError):  # a limit on address space, or no overcommitment
        raise HostPoolError(
            f"host_kv_gib: the system refused {in_gib(size)[0]} GiB of memory (ulimit -v?); lower "
            "it."
        ) from None
    if device.type == "cuda" and size:
        runtime = torch.cuda.cudart()
        code = runtime.cudaHostRegister(pool.data_ptr(), size, 0)
        if int(code) != 0:
            raise HostPoolError(
                f"host_kv_gib: the driver refused to lock {in_gib(size)[0]} GiB of memory "
                f"({code}); raise the limit on locked "
                f"memory (ulimit -l) or lower host_kv_gib."
            )
        weakref.finalize(pool.untyped_storage(), runtime.cudaHostUnregister, pool.data_ptr())
    return pool
