"""Copies between the host pool and the frames: what they do, and on which stream."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from specontext_vllm.config import PAGE_SIZE


def fetch(
    host: Tensor, arena: Tensor, sources: Tensor, targets: Tensor, count: Tensor, places: Tensor, resident: Tensor,
    *, layer: int, first_source: int, times: Tensor | None = None,
) -> None:  # fmt: skip
    """Copy head pages of one layer from the host pool into frames, unless ``resident[0]`` says that the layer is resident.

    Args:
        host: ``[M, T, H, P, 2 * D]``. arena: ``[frames, H, P, 2 * D]``.
        sources: ``[C]`` int32 head pages ``page * H + head`` of the layer; ``first_source`` is the layer's first in ``host``.
        targets: ``[C]`` int32 ``place * H + head``; ``places`` int32 has the frame of each.
        count: ``[1]`` int32, how many to copy; read on the device.
        resident: ``[1]`` int32.
        times: ``[L]`` int64; the layer's entry gets the GPU's time when all had arrived. A CPU leaves it alone.
    """
    heads = arena.shape[1]
    if arena.is_cuda:
        from specontext_vllm.triton_kernels.fetch_pages import fetch_pages

        words = arena[0, 0].nbytes // 4
        fetch_pages(
            host.view(torch.int32).view(-1, words), arena.view(torch.int32).view(-1, words), sources, targets, count, places, resident,
            layer=layer, first_source=first_source, num_kv_heads=heads, times=times,
        )  # fmt: skip
        return
    if layer < int(resident):
        return
    wanted = int(count)
    source, target = first_source + sources[:wanted].long(), targets[:wanted].long()
    rows = arena.view(-1, *arena.shape[2:])
    rows[places[target // heads].long() * heads + target % heads] = host.view(-1, *arena.shape[2:])[source]


def write(
    key: Tensor, value: Tensor, slots: Tensor, table: Tensor, lengths: Tensor, frames: Tensor, resident: Tensor, arena: Tensor,
    mirror: Tensor | None, timing: tuple[Tensor, Tensor, Tensor] | None = None, *, layer: int, decodes: int,
) -> None:  # fmt: skip
    """Store one layer's new tokens in their frames and in its mirror.

    Args:
        key, value: ``[>= N, H, D]``. slots: ``[N]`` int64 logical slots, negative for padding.
        table, lengths: the layer's page table: a decode row's new token is the last of its last page.
        frames: ``[T]`` int32 of the layer, for prefill tokens where it is resident; where it is not they go to the mirror alone.
        mirror: ``[T, H, P, 2 * D]`` in the host pool, or None.
        timing: when the layer was ready for its prefetch and when that had arrived, and the counters that take the difference; on a
            GPU only.
        decodes: leading tokens that are decode rows.
    """
    if arena.is_cuda:
        from specontext_vllm.triton_kernels.write_tiered import write_tiered

        write_tiered(key, value, slots, table, lengths, frames, resident, arena, mirror, timing, layer=layer, num_decodes=decodes)
        return
    real = torch.nonzero(slots >= 0).flatten()
    kv = torch.cat([key[real], value[real]], dim=-1).to(arena.dtype)
    page, offset = slots[real] // PAGE_SIZE, slots[real] % PAGE_SIZE
    if mirror is not None:
        mirror[page, :, offset] = kv
    heads = arena.shape[1]
    decode = real < decodes
    rows = arena.view(-1, *arena.shape[2:])
    sequences = real[decode][:, None] * heads + torch.arange(heads)
    last = lengths[sequences].long() - 1
    rows[table[sequences, last // PAGE_SIZE].long(), last % PAGE_SIZE] = kv[decode]
    if layer < int(resident):
        arena[frames[page[~decode]].long(), :, offset[~decode]] = kv[~decode]


class Copier:
    """The side stream of the copies and the events that order it with the layers; on a CPU everything happens in turn."""

    def __init__(self, device: torch.device, num_layers: int) -> None:
        self._cuda = device.type == "cuda"
        self._copies: list[tuple[int, Callable[[int], None]]] = []
        if self._cuda:
            self._stream = torch.cuda.Stream(device)
            # External: recorded by the graph of the copies and waited for by whichever graph the model's layers run in.
            self._arrived = [torch.cuda.Event(external=True) for _ in range(num_layers)]
            self._staged = [torch.cuda.Event() for _ in range(2)]
            self._released = [torch.cuda.Event() for _ in range(2)]

    def prepare(self, copy: Callable[[int], None], layers: Iterable[int]) -> None:
        """Take ``copy(layer)``, which fetches the misses of a layer; on a GPU, run it once for all layers and capture it as a graph.

        A graph of its own, so that the copies start as soon as the misses are known, whatever the model runs in, for the price of
        one launch. ``copy`` must read what changes from device memory.
        """
        self._copies = [(layer, copy) for layer in layers]
        if not self._cuda or not self._copies:
            return
        self.fork()
        with torch.cuda.stream(self._stream):
            self._copy_all()
        self._stream.synchronize()
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph, stream=self._stream, capture_error_mode="thread_local"):
            self._copy_all()

    def _copy_all(self) -> None:
        for layer, copy in self._copies:
            copy(layer)
            if self._cuda:
                self._arrived[layer].record()

    def fork(self) -> None:
        """Let the side stream begin behind all that is enqueued."""
        if self._cuda:
            self._stream.wait_stream(torch.cuda.current_stream())

    def start(self) -> None:
        """Fetch the misses of all layers in layer order, behind all that is enqueued."""
        if not self._cuda:
            self._copy_all()
        elif self._copies:
            self.fork()
            with torch.cuda.stream(self._stream):
                self._graph.replay()

    def wait(self, layer: int) -> None:
        """Let the current stream wait for the misses of a layer."""
        if self._cuda:
            torch.cuda.current_stream().wait_event(self._arrived[layer])

    @contextmanager
    def staging(self, use: int) -> Iterator[None]:
        """The history that use number ``use`` of the two staging areas reads; the use before it has released its area."""
        if not self._cuda:
            yield
            return
        if use >= 2:
            self._stream.wait_event(self._released[use % 2])
        with torch.cuda.stream(self._stream):
            yield
            self._staged[use % 2].record()

    def wait_staged(self, use: int) -> None:
        if self._cuda:
            torch.cuda.current_stream().wait_event(self._staged[use % 2])

    def release_staged(self, use: int) -> None:
        if self._cuda:
            self._released[use % 2].record()
