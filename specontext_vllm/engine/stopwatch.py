"""How long a stretch of a step takes on the device, sampled and read without waiting."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch

SAMPLED_STEPS = 16
"""One stretch in so many is timed."""


class Stopwatch:
    """A histogram of durations.

    On a GPU two events on the current stream enclose the stretch and are looked at in later steps;
    on a CPU the work is done when the call returns.

    Attributes:
        counts: ``[len(edges) + 1]`` observations in each bucket alone, the one above the last edge
            included.
        total: their sum in seconds.
    """

    def __init__(self, edges: Sequence[float], device: torch.device) -> None:
        self.counts, self.total = np.zeros(len(edges) + 1, np.int64), 0.0
        self._edges = np.array(edges)
        self._cuda = device.type == "cuda"
        self._laps = 0
        self._running: deque[tuple[torch.cuda.Event, torch.cuda.Event]] = deque()

    @contextmanager
    def lap(self) -> Iterator[None]:
        """Time the block, if it is its turn: the first is, and every SAMPLED_STEPS-th after it."""
        turn = self._laps % SAMPLED_STEPS == 0
        self._laps += 1
        if not turn:
            yield
        elif self._cuda:
            # Here too, since nobody else may ask: figures that are published nowhere are not read.
            self.collect()
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            yield
            end.record()
            self._running.append((start, end))
        else:
            begin = time.perf_counter()
            yield
            self._observe(time.perf_counter() - begin)

    def collect(self) -> None:
        """Take in the laps that the device has finished."""
        while self._running and self._running[0][1].query():
            start, end = self._running.popleft()
            self._observe(start.elapsed_time(end) / 1e3)

    def _observe(self, seconds: float) -> None:
        self.counts[np.searchsorted(self._edges, seconds)] += 1
        self.total += seconds
