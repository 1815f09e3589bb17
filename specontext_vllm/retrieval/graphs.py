"""CUDA graphs of what a decode step does outside the forward pass."""

from __future__ import annotations

import gc
import logging
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

logger = logging.getLogger("vllm.specontext")

GRAPH_BYTES = 256 << 20
"""GPU memory that graphs may take, temporaries and the driver's own included; a step that would
need more runs eagerly.

vLLM's memory profile counts it, so that KV does not take it; graphs are captured later, while the
engine serves. A graph of a small model took 0.09 MiB on an H200, beside 34 MiB for the first; there
are some 490 at most.
"""

REMEMBERED = 64
"""Keys that have come up once: those whose addresses never return must not take the place of
others.
"""


def bucket(pages: int) -> int:
    """The least of 1, 2, 3, 4, 6, 8, 12, 16, 24, ... that is not below ``pages``, so that steps
    with longer and longer contexts need few graphs.

    Programs for pages beyond a row's end return at once: half as many more are microseconds.
    """
    step = max(1, (1 << (pages - 1).bit_length()) // 4)
    return -(-pages // step) * step


class StepGraphs:
    """Work that is launched once a step, replayed as one launch.

    A dozen kernels cost the host most of a millisecond, which the step waits for where the model is
    small (benchmarks/host.py). A piece of work is run eagerly the first time its key comes up,
    which loads its kernels, captured the second time, and replayed from then on. A capture takes
    about as long as one eager step. The key holds the addresses of all inputs, so a replay reads
    what an eager run would.

    Args:
        device: a CUDA device.
        most_bytes: GPU memory that the graphs may take together. It is measured around each capture
            and its first replay, when the driver takes its part, as what is free on the whole
            device; other processes on it that allocate just then are counted too.

    Attributes:
        taken: bytes that the graphs have taken.
    """

    def __init__(self, device: torch.device, most_bytes: int = GRAPH_BYTES) -> None:
        self.most_bytes, self.taken = most_bytes, 0
        self._graphs: dict[Hashable, torch.cuda.CUDAGraph] = {}
        self._once: dict[Hashable, None] = {}
        self._largest = 0
        self._full = False
        self._device = device
        # One after the other on one stream, so their temporaries may share memory.
        self._pool = torch.cuda.graph_pool_handle()
        self._stream = torch.cuda.Stream(device)

    def run(self, name: Hashable, inputs: Sequence[Tensor], work: Callable[[], None]) -> None:
        """Do ``work``, which enqueues the same for the same name and addresses.

        Args:
            name: everything that ``work`` depends on but the contents of tensors.
            inputs: every tensor it reads or writes that may be another one with the same name.
        """
        key = name, *(tensor.data_ptr() for tensor in inputs)
        graph = self._graphs.get(key)
        if graph is not None:
            graph.replay()
            return
        if key not in self._once or self._full:
            self._once[key] = None
            if len(self._once) > REMEMBERED:
                del self._once[next(iter(self._once))]
            work()
            return
        del self._once[key]
        before = self._free_bytes()
        try:
            graph = self._graphs[key] = self._capture(work)
        except torch.OutOfMemoryError:
            # Nothing was done yet, and an eager run may free what torch's cache holds; a capture
            # may not.
            self._stop("the GPU has no memory for more")
            work()
            return
        graph.replay()
        took = max(0, before - self._free_bytes())
        self.taken, self._largest = self.taken + took, max(self._largest, took)
        # The next one may be as large.
        if self.taken + self._largest > self.most_bytes:
            self._stop(
                f"another may exceed the {self.most_bytes / 2**20:.0f} MiB that are set aside for "
                "them"
            )

    def _stop(self, why: str) -> None:
        self._full = True
        logger.warning(
            "SpeContext: there are %d graphs of decode steps in %.0f MiB and %s; steps that would "
            "need others run eagerly.",
            len(self._graphs),
            self.taken / 2**20,
            why,
        )

    def clear(self) -> None:
        """Forget everything: the settings that ``work`` follows have changed."""
        self._once.clear()
        if self._graphs:
            torch.cuda.synchronize(self._device)
            # What torch's cache holds besides goes first, so that only what the graphs give back is
            # counted.
            torch.cuda.empty_cache()
            before = self._free_bytes()
            self._graphs.clear()
            # The allocator forgets a pool with the last graph that used it, but keeps its memory,
            # which is no use to a new one.
            torch.cuda.empty_cache()
            self._pool = torch.cuda.graph_pool_handle()
            # The driver may keep its part, for the graphs to come.
            self.taken = max(0, self.taken - max(0, self._free_bytes() - before))
            self._full = self.taken + self._largest > self.most_bytes

    def __len__(self) -> int:
        return len(self._graphs)

    def _free_bytes(self) -> int:
        return torch.cuda.mem_get_info(self._device)[0]

    def _capture(self, work: Callable[[], None]) -> torch.cuda.CUDAGraph:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.stream(self._stream), _no_garbage_collected():
            # Other threads copy outputs meanwhile. torch.cuda.graph would collect garbage and wait
            # for the GPU first.
            graph.capture_begin(pool=self._pool, capture_error_mode="thread_local")
            try:
                work()
            finally:
                graph.capture_end()
        return graph


@contextmanager
def _no_garbage_collected() -> Iterator[None]:
    """A graph of an engine that is gone, found by the collector in the middle of a capture, would
    break it off.
    """
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()
