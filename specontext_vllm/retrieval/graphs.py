"""CUDA graphs of what a decode step does outside the forward pass."""

from __future__ import annotations

import gc
import logging
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

logger = logging.getLogger("vllm.specontext")

GRAPH_BYTES = 256 << 20
"""GPU memory that graphs may take, temporaries and the driver's own included; a step that would
need more runs eagerly.

vLLM's memory profile counts it, so that KV does not take it; graphs are captured later, while the
engine serves. The first graph takes some 34 MiB, each of the others, which are 490 at the most,
0.1 MiB.
"""

REMEMBERED = 64
"""Keys that have come up once: those whose addresses never return must not take the place of
others.
"""


class StepGraphs:
    """Functions that launch the same kernels step after step, replayed as one launch each.

    A dozen kernels cost the host most of a millisecond, which the step waits for where the model is
    small (benchmarks/host). A function is called the first time its key comes up, which loads
    its kernels, captured the second time, and replayed from then on. A capture takes about as long
    as one call. The key holds the addresses of all inputs, so a replay reads what a call would.

    Args:
        device: a CUDA device.
        max_bytes: GPU memory that the graphs may take together. It is measured around each capture
            and its first replay, when the driver takes its part, as what is free on the whole
            device; other processes on it that allocate just then are counted too.

    Attributes:
        taken: bytes that the graphs have taken.
    """

    def __init__(self, device: torch.device, max_bytes: int = GRAPH_BYTES) -> None:
        self.max_bytes, self.taken = max_bytes, 0
        self._graphs: dict[Hashable, torch.cuda.CUDAGraph] = {}
        self._once: dict[Hashable, None] = {}
        self._largest = 0
        self._full = False
        self._device = device
        # One after the other on one stream, so their temporaries may share memory.
        self._pool = torch.cuda.graph_pool_handle()
        self._stream = torch.cuda.Stream(device)

    def run(
        self,
        name: Hashable,
        inputs: Sequence[Tensor],
        function: Callable[..., None],
        *arguments: Any,
    ) -> None:
        """Call ``function(*arguments)``, or replay what it launched.

        Args:
            name: everything that it depends on but the contents of tensors.
            inputs: every tensor it reads or writes that may be another one with the same name.
            function: launches the same for the same name and addresses.
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
            function(*arguments)
            return
        del self._once[key]
        before = self._free_bytes()
        try:
            graph = self._graphs[key] = self._capture(function, *arguments)
        except torch.OutOfMemoryError:
            # Nothing was done yet, and an eager run may free what torch's cache holds; a capture
            # may not.
            self._stop("the GPU has no memory for more")
            function(*arguments)
            return
        graph.replay()
        took = max(0, before - self._free_bytes())
        self.taken, self._largest = self.taken + took, max(self._largest, took)
        # The next one may be as large.
        if self.taken + self._largest > self.max_bytes:
            self._stop(
                f"another may exceed the {self.max_bytes / 2**20:.0f} MiB that are set aside for "
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
        """Forget everything: what the functions depend on besides their keys has changed, as the
        settings.
        """
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
            self._full = self.taken + self._largest > self.max_bytes

    def __len__(self) -> int:
        return len(self._graphs)

    def _free_bytes(self) -> int:
        return torch.cuda.mem_get_info(self._device)[0]

    def _capture(self, function: Callable[..., None], *arguments: Any) -> torch.cuda.CUDAGraph:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.stream(self._stream), _no_garbage_collected():
            # Other threads copy outputs meanwhile. torch.cuda.graph would collect garbage and wait
            # for the GPU first.
            graph.capture_begin(pool=self._pool, capture_error_mode="thread_local")
            try:
                function(*arguments)
            finally:
                graph.capture_end()
        return graph


@contextmanager
def _no_garbage_collected() -> Iterator[None]:
    """Within the block no garbage is collected: a graph of an engine that is gone, found in the
    middle of a capture, would break it off.
    """
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()
