"""The actor in Ray, and the compiled graph that its messages pass through."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from typing import Any

from specontext_vllm.sidecar.actor import Sidecar
from specontext_vllm.sidecar.messages import SidecarSpec, decode, encode

START_SECONDS = 120
"""Time in which an actor must have started, and have allocated its memory and compiled its kernels.
"""

REPLY_SECONDS = 5
"""Time in which it must have answered a step, so that requests do not wait for one that hangs;
``Patience`` adds to it. Its death is noticed within milliseconds.

Far above the milliseconds of a step, so that a pause of a busy machine does not end an actor; far
below what clients wait for a token.
"""

FIRST_SECONDS = 60
"""The same for an actor's first replies, which load libraries and compile kernels; and the longest
that any reply may take.
"""

SLACK = 10
"""How many times longer than usual a reply may take before REPLY_SECONDS begin."""

CLOSE_SECONDS = 5
"""Time that an actor has to end before nobody waits for it any more."""

IN_FLIGHT = 2
"""Messages on their way: a step's aux states and the next step's tokens. Each direction has as many
buffers.
"""


class SidecarDown(RuntimeError):
    """The actor died, failed or did not answer in time; the message says which."""


class Patience:
    """How long a step waits for an actor that is slow and does not hang: to learn a long prompt
    takes an actor on a CPU many seconds.
    """

    def __init__(self) -> None:
        self._steps, self._selecting = 0, 0.0
        self._tokens, self._learning = 0, 0.0

    def seconds(self, prompt_tokens: int) -> float:
        """For a step's selection, before which ``prompt_tokens`` must be learned."""
        if not self._steps or (prompt_tokens and not self._tokens):
            return FIRST_SECONDS
        usual = self._selecting / self._steps + prompt_tokens * self._learning / max(
            1, self._tokens
        )
        return min(FIRST_SECONDS, REPLY_SECONDS + SLACK * usual)

    def note(self, prompt_tokens: int, learning: float, selecting: float) -> None:
        """Take in what a step has waited: seconds until the prompt tokens were learned, and from
        then on for its selection.
        """
        self._steps, self._selecting = self._steps + 1, self._selecting + selecting
        if prompt_tokens:
            self._tokens, self._learning = self._tokens + prompt_tokens, self._learning + learning


class Link:
    """One life of the actor, from its start to its death.

    Args:
        spec: what the actor builds; kept.
        buffer_bytes: the largest message expected; a larger one makes Ray enlarge the channel.

    Attributes:
        patience: what its replies have taken so far.
        graph: the compiled graph, once ``start`` has made it.
    """

    def __init__(self, spec: SidecarSpec, buffer_bytes: int) -> None:
        import ray

        self._ray, self.spec, self._buffer_bytes = ray, spec, buffer_bytes
        self.graph: Any = None
        self.patience = Patience()
        cpus, gpus = spec.config.sidecar_cpus, spec.config.sidecar_gpus
        with self._failures():
            self.actor = (
                ray.remote(Sidecar).options(num_cpus=cpus, num_gpus=gpus).remote(spec, gpus > 0)
            )

    def start(self) -> None:
        """Wait for the actor and then for its graph, up to START_SECONDS each; it is killed if they
        do not come.

        Raises:
            SidecarDown: it did not start.
        """
        from ray.dag import InputNode

        # Ray waits without limit for an actor that hangs while its graph is compiled.
        watchdog = threading.Timer(START_SECONDS, self.kill)
        watchdog.daemon = True
        with self._failures():
            try:
                self._ray.get(self.actor.__ray_ready__.remote(), timeout=START_SECONDS)
                watchdog.start()
                with InputNode() as message:
                    graph = self.actor.handle.bind(message)
                self.graph = graph.experimental_compile(
                    _buffer_size_bytes=self._buffer_bytes,
                    _max_inflight_executions=IN_FLIGHT,
                    _submit_timeout=REPLY_SECONDS,
                )
            except BaseException:
                self.kill()
                raise
            finally:
                watchdog.cancel()

    def send(self, message: Any) -> Any:
        """Send a message; returns what ``receive`` takes. The message's tensors may be overwritten
        at once.

        Raises:
            SidecarDown: the actor is gone or does not read.
        """
        with self._failures():
            return self.graph.execute(encode(message))

    def receive(self, sent: Any, seconds: float | None = None) -> Any:
        """The reply to a message, within ``seconds`` or REPLY_SECONDS.

        Raises:
            SidecarDown: the actor is gone, failed over the message, or took longer.
        """
        seconds = REPLY_SECONDS if seconds is None else seconds
        with self._failures():
            try:
                return decode(self._ray.get(sent, timeout=seconds))
            except TimeoutError:  # of two classes of Ray's
                raise SidecarDown(f"no reply within {seconds:.0f} s") from None

    def ask(self, message: Any, seconds: float | None = None) -> Any:
        """``send`` and ``receive``."""
        return self.receive(self.send(message), seconds)

    def kill(self) -> None:
        """End the actor's process for good, without waiting: Ray asks it to go, and sends SIGKILL
        to one that does not within 5 seconds.

        Whoever waits for the actor, in whatever thread, is told at once. For any thread.
        """
        self._ray.kill(self.actor, no_restart=True)

    def close(self) -> None:
        """Kill the actor and free the channels, waiting for CLOSE_SECONDS at most. For any thread;
        another that waits for a reply is told at once.

        Raises:
            SidecarDown: something of it could not be ended, or not in time.
        """
        ended: Future[None] = Future()
        # Ray's own waits have no bound where an actor hangs, or its control store.
        threading.Thread(
            target=self._end, args=(ended,), name="specontext-sidecar-end", daemon=True
        ).start()
        with self._failures():
            try:
                ended.result(CLOSE_SECONDS)
            except TimeoutError:
                raise SidecarDown(f"Ray did not end the actor within {CLOSE_SECONDS} s") from None

    def _end(self, ended: Future[None]) -> None:
        try:
            try:
                self.kill()
            finally:
                if self.graph is not None:
                    self.graph.teardown(kill_actors=True)
        except BaseException as error:
            ended.set_exception(error)
        else:
            ended.set_result(None)

    @contextmanager
    def _failures(self) -> Iterator[None]:
        try:
            yield
        except SidecarDown:
            raise
        except Exception as error:  # What Ray raises has no common class.
            lines = str(error).strip().splitlines() or [""]
            # An error inside the actor is the last line of a traceback; Ray's own errors say what
            # is wrong in their first line.
            told = lines[-1] if any(line.startswith("  File ") for line in lines) else lines[0]
            raise SidecarDown(f"{type(error).__name__}: {told}") from error
