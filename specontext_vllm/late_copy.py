"""Device tensors that the host reads without waiting for them."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor


class LateCopy:
    """A copy of small device tensors that is asked for in one step and taken in a later one.

    Args:
        sources: tensors of one device. ``ask`` enqueues the copy on the current stream.
    """

    def __init__(self, *sources: Tensor) -> None:
        self._sources = sources
        self._cuda = sources[0].is_cuda
        self._copies = [
            torch.zeros(source.shape, dtype=source.dtype, pin_memory=self._cuda)
            for source in sources
        ]
        self._asked = False
        self._copied: torch.cuda.Event | None = None

    def ask(self) -> bool:
        """Start a copy; False when the last one has not been taken yet."""
        if self._asked:
            return False
        for copy, source in zip(self._copies, self._sources, strict=True):
            copy.copy_(source, non_blocking=self._cuda)
        if self._cuda:
            self._copied = torch.cuda.Event()
            self._copied.record()
        self._asked = True
        return True

    def take(self) -> list[np.ndarray] | None:
        """The copy that was asked for, when it has arrived and was not taken yet; else None."""
        if not self._asked or (self._copied is not None and not self._copied.query()):
            return None
        self._asked = False
        return [copy.numpy().copy() for copy in self._copies]

    def wait(self) -> list[np.ndarray]:
        """The tensors' present values; waits for the device. Drops a copy that was asked for."""
        if self._copied is not None:
            self._copied.synchronize()
        self._asked = False
        return [source.cpu().numpy().copy() for source in self._sources]
