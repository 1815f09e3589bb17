"""Pinned host memory of exactly the size asked for."""

from __future__ import annotations

import weakref

import torch
from torch import Tensor

from specontext_vllm.residency.host_memory import free_host_memory
from specontext_vllm.sizes import in_gib


class HostPoolError(RuntimeError):
    """The pool cannot be allocated; the message is one sentence with the numbers."""


def allocate_host_pool(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Zeroed host memory, page-locked when ``device`` is a GPU, so that its kernels may read and
    write it.

    Pinned through ``cudaHostRegister``: torch's own pinned allocator rounds up to a power of two,
    so that 80 GiB would take 128.

    Raises:
        HostPoolError: the machine or its container has too little free memory, or refuses to
            allocate or to lock it.
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
