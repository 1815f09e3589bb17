"""Starts an actor, and another one in the background whenever it has died."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterable
from concurrent.futures import Future
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor

from specontext_vllm.sidecar.link import CLOSE_SECONDS, START_SECONDS, Link, SidecarDown
from specontext_vllm.sidecar.messages import Embeddings, SidecarSpec

logger = logging.getLogger("vllm.specontext")

RETRY_SECONDS = (1, 2, 5, 10, 30)
"""Waits between attempts to start a new actor; the last one repeats."""


class ActorKeeper:
    """The actor in use, and the one that is being started to take its place.

    Args:
        spec: what an actor builds.
        buffer_bytes: the largest message expected.
        embed: token ids ``[N]`` -> the target's embeddings ``[N, E]``; called once per token id for
            every actor.
        device: of the token ids.
        refill: the messages that tell a new actor what the last one knew.

    Attributes:
        spec: what the next actor builds; replace it when settings change.
        link: to the actor in use; None before the first one has started and after one has died.
    """

    def __init__(
        self,
        spec: SidecarSpec,
        buffer_bytes: int,
        *,
        embed: Callable[[Tensor], Tensor],
        device: torch.device,
        refill: Callable[[], Iterable[Any]],
    ) -> None:
        self.spec = spec
        self.link: Link | None = None
        self._buffer_bytes, self._embed, self._device = buffer_bytes, embed, device
        self._refill = refill
        self._next_link: Future[Link] | None = None
        self._starting: Link | None = None
        self._closed = threading.Event()

    def start(self) -> Link:
        """Start the first actor.

        Raises:
            SidecarDown: it does not start.
        """
        self.link = self._connect()
        return self.link

    def replace(self) -> None:
        """The actor in use is gone: have another one started and refilled in the background."""
        dead, self.link = self.link, None
        self._next_link = future = Future[Link]()

        def restart() -> None:
            try:
                future.set_result(self._reconnect(dead))
            except BaseException as error:
                future.set_exception(error)

        # A daemon, so that a process may end although no actor can be had.
        threading.Thread(target=restart, name="specontext-sidecar", daemon=True).start()

    def adopt(self) -> Link | None:
        """Take a restarted actor into use, if there is one; it is returned once."""
        if self._next_link is None or not self._next_link.done():
            return None
        self.link, self._next_link = self._next_link.result(), None
        return self.link

    def close(self) -> None:
        """End the actor, also one that hangs or is being started, within twice CLOSE_SECONDS; Ray
        itself goes on until the process ends.
        """
        self._closed.set()
        if self._next_link is not None:
            # Being started, or there and not in use yet.
            if self._starting is not None:
                _discard(self._starting)
            with suppress(Exception):
                self._next_link.result(CLOSE_SECONDS)
        elif self.link is not None:
            _discard(self.link)
        self.link = self._next_link = None

    def _connect(self) -> Link:
        """A new actor that knows the target's embedding."""
        spec = self.spec
        link = self._starting = Link(spec, self._buffer_bytes)
        try:
            # Whichever comes first, ``close`` or this link, sees the other.
            if self._closed.is_set():
                raise SidecarDown("the engine ends")
            link.start()
            rows = max(1, self._buffer_bytes // (2 * spec.embed_size * spec.dtype.itemsize))
            with torch.inference_mode():
                for first in range(0, spec.vocab_size, rows):
                    stop = min(first + rows, spec.vocab_size)
                    token_ids = torch.arange(first, stop, device=self._device)
                    embeddings = self._embed(token_ids).to("cpu", spec.dtype)
                    link.ask(Embeddings(first, embeddings), START_SECONDS)
        except BaseException:
            _discard(link)
            raise
        return link

    def _reconnect(self, dead: Link | None) -> Link:
        """A new actor that has been refilled; tried until it works or the engine ends. In the
        background thread.
        """
        if dead is not None:
            _discard(dead)
        attempt = 0
        while True:
            link = None
            try:
                link = self._connect()
                for message in self._refill():
                    link.ask(message, START_SECONDS)
                return link
            except Exception as error:  # whatever it is, requests go on meanwhile
                if link is not None:
                    _discard(link)
                wait = RETRY_SECONDS[min(attempt, len(RETRY_SECONDS) - 1)]
                attempt += 1
                logger.warning(
                    "SpeContext sidecar: attempt %d to restart it failed (%s); the next in %d s.",
                    attempt,
                    error,
                    wait,
                )
                if self._closed.wait(wait):
                    raise


def _discard(link: Link) -> None:
    try:
        link.close()
    except SidecarDown as error:
        logger.warning(
            "SpeContext sidecar: what was left of it could not be cleared away: %s", error
        )
