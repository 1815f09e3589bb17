"""CUDA graphs of what a decode step does outside the forward pass."""

from __future__ import annotations

import logging
from collections.abc import Callable, Hashable, Sequence

import torch
from torch import Tensor

logger = logging.getLogger("vllm.specontext")

MOST_GRAPHS = 1024
"""Graphs that are kept; a step that would need one more runs eagerly."""

REMEMBERED = 64
"""Keys that have come up once: those whose addresses never return must not take the place of others."""


def bucket(pages: int) -> int:
    """The least of 1, 2, 3, 4, 6, 8, 12, 16, 24, ... that is not below ``pages``, so that steps with longer and longer contexts need few graphs.

    Programs for pages beyond a row's end return at once: half as many more are microseconds.
    """
    step = max(1, (1 << (pages - 1).bit_length()) // 4)
    return -(-pages // step) * step


class StepGraphs:
    """Work that is launched once a step, replayed as one launch.

    A dozen kernels cost the host most of a millisecond, which the step waits for where the model is small (benchmarks/host.py). A piece of
    work is run eagerly the first time its key comes up, which loads its kernels, captured the second time, and replayed from then on.
    A capture takes about as long as one eager step. The key holds the addresses of all inputs, so a replay reads what an eager run would.

    Args:
        device: a CUDA device.
    """

    def __init__(self, device: torch.device) -> None:
        self._graphs: dict[Hashable, torch.cuda.CUDAGraph] = {}
        self._once: dict[Hashable, None] = {}
        self._most = MOST_GRAPHS
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
        if graph is None:
            if key not in self._once or len(self._graphs) >= self._most:
                self._once[key] = None
                if len(self._once) > REMEMBERED:
                    del self._once[next(iter(self._once))]
                work()
                return
            del self._once[key]
            try:
                graph = self._graphs[key] = self._capture(work)
            except torch.OutOfMemoryError:
                # Nothing was done yet, and an eager run may free what torch's cache holds; a capture may not.
                self._most = len(self._graphs)
                logger.warning("SpeContext: the GPU has no memory for more than %d graphs of decode steps; others run eagerly.", self._most)
                work()
                return
        graph.replay()

    def clear(self) -> None:
        """Forget everything: the settings that ``work`` follows have changed."""
        self._once.clear()
        if self._graphs:
            torch.cuda.synchronize(self._stream.device)
            self._graphs.clear()
            # The allocator forgets a pool with the last graph that used it, but keeps its memory, which is no use to a new one.
            torch.cuda.empty_cache()
            self._pool = torch.cuda.graph_pool_handle()

    def __len__(self) -> int:
        return len(self._graphs)

    def _capture(self, work: Callable[[], None]) -> torch.cuda.CUDAGraph:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.stream(self._stream):
            # Other threads copy outputs meanwhile. torch.cuda.graph would collect garbage and wait for the GPU first.
            graph.capture_begin(pool=self._pool, capture_error_mode="thread_local")
            try:
                work()
            finally:
                graph.capture_end()
        return graph
