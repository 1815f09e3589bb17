"""Copies between the host pool and the frames: what they do, and on which stream."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from specontext_vllm.config import PAGE_SIZE

WAIT_SECONDS = 20.0
"""Longest that a layer waits for its misses. A step copies a few gigabytes at most: less than a
second on a usual link, seconds on the slowest.
"""


def fetch(
    host: Tensor,
    arena: Tensor,
    sources: Tensor,
    targets: Tensor,
    count: Tensor,
    places: Tensor,
    resident: Tensor,
    *,
    layers: range,
    first_mirrored: int,
    done: Tensor | None = None,
) -> None:
    """Copy the same head pages of consecutive layers from the host pool into frames, but for layers
    that ``resident[0]`` says are resident.

    Args:
        host: ``[M, T, H, P, 2 * D]`` of the layers from ``first_mirrored`` on. arena:
            ``[frames, H, P, 2 * D]``.
        sources: ``[C]`` int32 head pages ``page * H + head``.
        targets: ``[C]`` int32 ``place * H + head``; ``places [len(layers), K]`` int32 has the frame
            of each in each layer.
        count: ``[1]`` int32, how many to copy; read on the device.
        resident: ``[1]`` int32.
        done: ``[L]`` int32, counts a layer's copies as they end. A CPU leaves it alone.
    """
    heads = arena.shape[1]
    layer_sources = host.shape[1] * heads
    if arena.is_cuda:
        from specontext_vllm.triton_kernels.fetch_pages import fetch_pages

        words = arena[0, 0].nbytes // 4
        fetch_pages(
            host.view(torch.int32).view(-1, words),
            arena.view(torch.int32).view(-1, words),
            sources,
            targets,
            count,
            places,
            resident,
            layers=layers,
            first_source=(layers.start - first_mirrored) * layer_sources,
            layer_sources=layer_sources,
            num_kv_heads=heads,
            done=done,
        )
        return
    wanted = int(count)
    source, target = sources[:wanted].long(), targets[:wanted].long()
    rows = arena.view(-1, *arena.shape[2:])
    for layer, frames in zip(layers, places, strict=True):
        if layer >= int(resident):
            copied = host[layer - first_mirrored].view(-1, *arena.shape[2:])[source]
            rows[frames[target // heads].long() * heads + target % heads] = copied


def write(
    key: Tensor,
    value: Tensor,
    slots: Tensor,
    table: Tensor,
    lengths: Tensor,
    frames: Tensor,
    resident: Tensor,
    arena: Tensor,
    mirror: Tensor | None,
    *,
    layer: int,
    decodes: int,
) -> None:
    """Store one layer's new tokens in their frames and in its mirror.

    Args:
        key, value: ``[>= N, H, D]``. slots: ``[N]`` int64 logical slots, negative for padding.
        table, lengths: the layer's page table: a decode row's new token is the last of its last
            page.
        frames: ``[T]`` int32 of the layer, for prefill tokens where it is resident; where it is not
            they go to the mirror alone.
        mirror: ``[T, H, P, 2 * D]`` in the host pool, or None.
        decodes: leading tokens that are decode rows.
    """
    if arena.is_cuda:
        from specontext_vllm.triton_kernels.write_tiered import write_tiered

        write_tiered(
            key,
            value,
            slots,
            table,
            lengths,
            frames,
            resident,
            arena,
            mirror,
            layer=layer,
            num_decodes=decodes,
        )
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
    """The side stream of the copies, and what orders it with the layers; on a CPU everything
    happens in turn.

    Args:
        seconds: longest that a layer waits for its misses.
    """

    def __init__(
        self, device: torch.device, num_layers: int, seconds: float = WAIT_SECONDS
    ) -> None:
        self._cuda, self._seconds = device.type == "cuda", seconds
        # Pinned: the GPU writes it, once if ever, and the host looks at it in every step without a
        # copy.
        self._overdue = torch.zeros(1, dtype=torch.int32, pin_memory=self._cuda)
        if self._cuda:
            self._stream = torch.cuda.Stream(device)
            self._done = torch.zeros(num_layers, dtype=torch.int32, device=device)
            self._epoch = torch.zeros(1, dtype=torch.int32, device=device)
            self._staged = [torch.cuda.Event() for _ in range(2)]
            self._released = [torch.cuda.Event() for _ in range(2)]

    def fork(self) -> None:
        """Let the side stream begin behind all that is enqueued."""
        if self._cuda:
            self._stream.wait_stream(torch.cuda.current_stream())

    def join(self) -> None:
        """Let the current stream wait for the side stream."""
        if self._cuda:
            torch.cuda.current_stream().wait_stream(self._stream)

    @contextmanager
    def aside(self) -> Iterator[None]:
        """What is enqueued here runs on the side stream, behind all that is enqueued; ``join``
        waits for it.
        """
        if not self._cuda:
            yield
            return
        self.fork()
        with torch.cuda.stream(self._stream):
            yield

    def check(self) -> None:
        """Look, without waiting, whether all misses came that layers have waited for.

        Raises:
            RuntimeError: those of a layer did not. It went on without them, so that whatever has
                been computed since is wrong.
        """
        if overdue := int(self._overdue[0]):
            raise RuntimeError(
                f"specontext: the KV pages of layer {overdue - 1} did not come from the host pool "
                f"within {self._seconds:g} s, so this worker ends rather "
                "than answer without them; look for errors of the GPU or of PCIe (Xid) in the "
                "system's log, and if there are none please report it."
            )

    def expect(self) -> None:
        """The step has misses to copy, for which ``wait`` waits; a captured graph may hold this."""
        if self._cuda:
            self._epoch.add_(1)

    def start(self, copy: Callable[[Tensor | None], None]) -> None:
        """Copy the misses of all layers behind all that is enqueued; ``copy(done)`` must count in
        ``done`` what it has copied.
        """
        if not self._cuda:
            copy(None)
            return
        with self.aside():
            copy(self._done)

    def wait(self, layer: int, resident: Tensor, counts: Tensor | None) -> None:
        """Hold the current stream until the misses of an offloaded layer are there; ``counts``
        takes whether they were late.

        Where they do not come, the stream goes on all the same and ``check`` tells.
        """
        if self._cuda:
            from specontext_vllm.triton_kernels.fetch_pages import await_pages

            await_pages(
                self._done,
                self._epoch,
                resident,
                self._overdue,
                counts,
                layer=layer,
                seconds=self._seconds,
            )

    @contextmanager
    def staging(self, use: int) -> Iterator[None]:
        """The history that use number ``use`` of the two staging areas reads; the use before it has
        released its area.
        """
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
