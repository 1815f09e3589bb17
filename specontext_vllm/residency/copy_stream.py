"""The side stream on which copies run, and how the layers wait for them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from specontext_vllm.tier_data import CopyProgress

WAIT_SECONDS = 20.0
"""Time that a layer waits for its misses before the worker gives up. A step copies a few gigabytes
at most, which takes seconds even on the slowest link.
"""


class CopyStream:
    """A side stream for copies. On a CPU everything runs in turn, and nothing waits.

    Args:
        device: of the layers.
        num_layers: L.
        seconds: time that a layer waits for its misses.

    Attributes:
        progress: what the copies have done, on the device; ``overdue`` is pinned, so that the host
            reads it in every step without a copy.
    """

    def __init__(
        self, device: torch.device, num_layers: int, seconds: float = WAIT_SECONDS
    ) -> None:
        self._cuda, self._seconds = device.type == "cuda", seconds
        self.progress = CopyProgress(
            done=torch.zeros(num_layers, dtype=torch.int32, device=device),
            epoch=torch.zeros(1, dtype=torch.int32, device=device),
            overdue=torch.zeros(1, dtype=torch.int32, pin_memory=self._cuda),
        )
        if self._cuda:
            self._stream = torch.cuda.Stream(device)
            self._staged = [torch.cuda.Event() for _ in range(2)]
            self._released = [torch.cuda.Event() for _ in range(2)]

    def fork(self) -> None:
        """Let the side stream wait for everything enqueued so far."""
        if self._cuda:
            self._stream.wait_stream(torch.cuda.current_stream())

    def join(self) -> None:
        """Let the current stream wait for the side stream."""
        if self._cuda:
            torch.cuda.current_stream().wait_stream(self._stream)

    @contextmanager
    def on_side_stream(self) -> Iterator[None]:
        """Enqueue on the side stream, after everything enqueued so far; ``join`` waits for it."""
        if not self._cuda:
            yield
            return
        self.fork()
        with torch.cuda.stream(self._stream):
            yield

    def check(self) -> None:
        """Check, without waiting, that no layer has timed out waiting for its misses.

        Raises:
            RuntimeError: one has. It went on without them, so everything computed since is wrong.
        """
        if overdue := int(self.progress.overdue[0]):
            raise RuntimeError(
                f"specontext: the KV pages of layer {overdue - 1} did not come from the host pool "
                f"within {self._seconds:g} s, so this worker ends rather "
                "than answer without them; look for errors of the GPU or of PCIe (Xid) in the "
                "system's log, and if there are none please report it."
            )

    def announce(self) -> None:
        """Count one more fetch, which ``wait`` then waits for; a captured graph may hold this."""
        if self._cuda:
            self.progress.epoch.add_(1)

    def start(self, copy: Callable[[Tensor | None], None]) -> None:
        """Run the announced fetch on the side stream; ``copy(done)`` must count what it has copied
        in ``done``, as in ``CopyProgress``.
        """
        if not self._cuda:
            copy(None)
            return
        with self.on_side_stream():
            copy(self.progress.done)

    def wait(self, layer: int, resident: Tensor, counts: Tensor | None) -> None:
        """Hold the current stream until the misses of an offloaded layer are there.

        After a timeout the stream goes on without them, and ``check`` raises.

        Args:
            resident: ``[1]`` int32 number of resident layers, which do not wait.
            counts: ``[COUNTERS]`` int64 counters of late layers, or None.
        """
        if self._cuda:
            from specontext_vllm.triton_kernels.fetch_pages import await_pages

            await_pages(self.progress, resident, counts, layer=layer, seconds=self._seconds)

    @contextmanager
    def staging(self, turn: int) -> Iterator[None]:
        """Enqueue, on the side stream, the copies of turn number ``turn`` of the two staging areas,
        which alternate, after the area's turn before has been released.
        """
        if not self._cuda:
            yield
            return
        if turn >= 2:
            self._stream.wait_event(self._released[turn % 2])
        with torch.cuda.stream(self._stream):
            yield
            self._staged[turn % 2].record()

    def wait_staged(self, turn: int) -> None:
        """Let the current stream wait for the copies of ``staging(turn)``."""
        if self._cuda:
            torch.cuda.current_stream().wait_event(self._staged[turn % 2])

    def release_staged(self, turn: int) -> None:
        """Give the staging area back: what is enqueued so far has read it."""
        if self._cuda:
            self._released[turn % 2].record()
