"""Memory that the processor addresses in large pieces.

A decode step on a CPU reads pages of KV that lie anywhere in gigabytes, each as large as a page of
the system's memory: so for each of them the processor must look up where it is. In pieces of 2 MiB
the map of all KV fits its caches.
"""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Iterable
from pathlib import Path

from torch import Tensor

SETTING = Path("/sys/kernel/mm/transparent_hugepage/enabled")
"""Whether Linux hands out large pieces to all, to those who ask, or to nobody."""
_PIECE = 2**21
_DONTNEED, _HUGEPAGE = 4, 14  # sys/mman.h, on all of Linux's machines that torch runs on.


def use_huge_pages(tensors: Iterable[Tensor]) -> int:
    """Fill the storages of ``tensors`` with zeros, in pieces of 2 MiB where Linux gives them to who
    asks; elsewhere nothing happens, and nothing is lost but speed.

    Args:
        tensors: on a CPU, in memory that nobody has written to yet.
    Returns:
        Bytes that were asked for.
    """
    if sys.platform != "linux" or not SETTING.exists() or "[madvise]" not in SETTING.read_text():
        return 0
    madvise = ctypes.CDLL(None, use_errno=True).madvise
    madvise.argtypes = ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int
    asked, done = 0, set()
    for tensor in tensors:
        storage = tensor.untyped_storage()
        begin = -(-storage.data_ptr() // _PIECE) * _PIECE
        end = (storage.data_ptr() + storage.nbytes()) // _PIECE * _PIECE
        if begin >= end or begin in done:
            continue
        done.add(begin)
        # Pages that exist stay small: they are given back first, and made anew by being written.
        if madvise(begin, end - begin, _HUGEPAGE) == 0:
            madvise(begin, end - begin, _DONTNEED)
            asked += end - begin
            ctypes.memset(begin, 0, end - begin)
    return asked
