"""Pinned host memory of exactly the size asked for."""

from __future__ import annotations

import weakref

import torch
from torch import Tensor


class HostPoolError(RuntimeError):
    """The pool cannot be had; its message is one sentence with the numbers."""


def allocate_host_pool(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Zeroed host memory, page-locked when ``device`` is a GPU, so that its kernels may read and write it.

    Pinned through ``cudaHostRegister``: torch's own pinned allocator rounds up to a power of two, which at 80 GiB would
    take 128.

    Raises:
        HostPoolError: the machine has less free memory, or refuses to lock so much.
    """
    import psutil

    size = torch.Size(shape).numel() * dtype.itemsize
    free = psutil.virtual_memory().available
    if size > free:
        raise HostPoolError(
            f"host_kv_gib: the pool needs {size / 2**30:.2f} GiB and this machine has {free / 2**30:.2f} GiB of memory free; lower it."
        )
    pool = torch.zeros(shape, dtype=dtype)
    if device.type == "cuda" and size:
        runtime = torch.cuda.cudart()
        code = runtime.cudaHostRegister(pool.data_ptr(), size, 0)
        if int(code) != 0:
            raise HostPoolError(
                f"host_kv_gib: the driver refused to lock {size / 2**30:.2f} GiB of memory ({code}); raise the limit on locked "
                f"memory (ulimit -l) or lower host_kv_gib."
            )
        weakref.finalize(pool.untyped_storage(), runtime.cudaHostUnregister, pool.data_ptr())
    return pool
