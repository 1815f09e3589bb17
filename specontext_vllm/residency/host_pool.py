"""Pinned host memory of exactly the size asked for."""

from __future__ import annotations

import ctypes
import mmap
import sys
import weakref
from collections.abc import Callable

import torch

from specontext_vllm.residency.host_memory import free_host_memory
from specontext_vllm.sizes import in_gib


class HostPoolError(RuntimeError):
    """The pool cannot be allocated; the message is one sentence with the numbers."""


_DONTNEED = 4  # sys/mman.h, on all of Linux's machines that torch runs on.


class HostPool:
    """Zeroed host memory, page-locked when ``device`` is a GPU, so that its kernels may read and
    write it.

    Pinned through ``cudaHostRegister``: torch's own pinned allocator rounds up to a power of two,
    so that 80 GiB would take 128.

    Attributes:
        tensor: ``shape``, for as long as the pool lives.

    Raises:
        HostPoolError: the machine or its container has too little free memory, or refuses to
            allocate or to lock it.
    """

    def __init__(self, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> None:
        self._refuse_more_than_is_free(torch.Size(shape).numel() * dtype.itemsize)
        try:
            self.tensor = torch.zeros(shape, dtype=dtype)
        except (MemoryError, RuntimeError):  # a limit on address space, or no overcommitment
            size = torch.Size(shape).numel() * dtype.itemsize
            raise HostPoolError(
                f"host_kv_gib: the system refused {in_gib(size)[0]} GiB of memory (ulimit -v?); "
                "lower it."
            ) from None
        self._locks = device.type == "cuda" and self.tensor.nbytes > 0
        self._unlock: Callable[[], object] = self._lock()
        self._is_given_back = False

    def give_back(self) -> None:
        """Let the system have the memory; what it held is lost. The addresses stay, in graphs too,
        and nothing may use them before ``take_back``.
        """
        self._unlock()
        self._is_given_back = True
        if sys.platform != "linux":
            return
        begin, size = self.tensor.data_ptr(), self.tensor.nbytes
        first = -(-begin // mmap.PAGESIZE) * mmap.PAGESIZE
        end = (begin + size) // mmap.PAGESIZE * mmap.PAGESIZE
        if first < end:
            madvise = ctypes.CDLL(None).madvise
            madvise.argtypes = ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int
            madvise(first, end - first, _DONTNEED)

    def take_back(self) -> None:
        """Undo ``give_back``, if it was called; what the pool holds is not determined.

        Raises:
            HostPoolError: others have the memory now.
        """
        if self._is_given_back:
            self._refuse_more_than_is_free(self.tensor.nbytes)
            self._unlock, self._is_given_back = self._lock(), False

    def _lock(self) -> Callable[[], object]:
        """Lock the pages, and return what unlocks them, once; the end of the tensor does so too."""
        if not self._locks:
            return lambda: None
        runtime, size = torch.cuda.cudart(), self.tensor.nbytes
        code = runtime.cudaHostRegister(self.tensor.data_ptr(), size, 0)
        if int(code) != 0:
            raise HostPoolError(
                f"host_kv_gib: the driver refused to lock {in_gib(size)[0]} GiB of memory "
                f"({code}); raise the limit on locked "
                f"memory (ulimit -l) or lower host_kv_gib."
            )
        return weakref.finalize(
            self.tensor.untyped_storage(), runtime.cudaHostUnregister, self.tensor.data_ptr()
        )

    @staticmethod
    def _refuse_more_than_is_free(size: int) -> None:
        if size > (free := free_host_memory()):
            needed, there = in_gib(size, free)
            raise HostPoolError(
                f"host_kv_gib: the pool needs {needed} GiB and this machine has {there} GiB of "
                "memory free; lower it."
            )
