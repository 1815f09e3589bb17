"""Ray's side of the sidecar: a cluster to run in, the actor, and the compiled graph that its
messages pass through.
"""

from __future__ import annotations

import logging
import os
import signal
import threading
from collections.abc import Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from typing import Any

import torch

from specontext_vllm.sidecar.actor import Sidecar
from specontext_vllm.sidecar.messages import SidecarSpec, decode, encode

START_SECONDS = 120
"""Time in which an actor must have started, and have allocated its memory and compiled its kernels.
"""

REPLY_SECONDS = 5
"""Time in which it must have answered a step, lest requests wait for a hung one; ``Patience`` adds
to it. Its death is noticed within milliseconds.

Far above a step's milliseconds, since a pause of a busy machine should not cost an actor its life;
far below what clients wait for a token.
"""

FIRST_SECONDS = 60
"""The same for an actor's first replies, in which libraries are loaded and kernels compiled that
its start has not needed; and at most, ever.
"""

SLACK = 10
"""How many times longer than usual a reply may take before REPLY_SECONDS begin."""

CLOSE_SECONDS = 5
"""Time in which an actor's end must have been seen to; then nobody waits for it any more."""

IN_FLIGHT = 2
"""Messages on their way: a step's aux states and the next step's tokens. Each direction has as many
buffers.
"""

OBJECT_STORE_SLACK = 64 << 20
LEAST_OBJECT_STORE = 80 << 20
"""Ray starts with no less (bytes)."""


class SidecarDown(RuntimeError):
    """The actor died, failed or did not answer in time; the message says which."""


class Patience:
    """How long a step waits for an actor that may be slow but not hung: a long prompt takes an
    actor on a CPU many seconds to learn.
    """

    def __init__(self) -> None:
        self._steps, self._selecting = 0, 0.0
        self._tokens, self._learning = 0, 0.0

    def seconds(self, prompt_tokens: int) -> float:
        """For a step's selection, ahead of which ``prompt_tokens`` are to be learned."""
        if not self._steps or (prompt_tokens and not self._tokens):
            return FIRST_SECONDS
        usual = self._selecting / self._steps + prompt_tokens * self._learning / max(
            1, self._tokens
        )
        return min(FIRST_SECONDS, REPLY_SECONDS + SLACK * usual)

    def note(self, prompt_tokens: int, learning: float, selecting: float) -> None:
        """A step has waited: seconds until the prompt tokens were learned, and from then on for its
        selection.
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
    """

    def __init__(self, spec: SidecarSpec, buffer_bytes: int) -> None:
        import ray

        self._ray, self.spec, self._buffer_bytes = ray, spec, buffer_bytes
        self._graph: Any = None
        self.patience = Patience()
        cpus, gpus = spec.config.sidecar_cpus, spec.config.sidecar_gpus
        with self._failures():
            self.actor = (
                ray.remote(Sidecar).options(num_cpus=cpus, num_gpus=gpus).remote(spec, gpus > 0)
            )

    def start(self) -> None:
        """Wait until the actor is there, and then for its graph, START_SECONDS each at most; it is
        killed if they are not.

        Raises:
            SidecarDown: it did not start.
        """
        from ray.dag import InputNode

        # While it compiles the graph Ray waits for ever for an actor that hangs.
        watchdog = threading.Timer(START_SECONDS, self.kill)
        watchdog.daemon = True
        with self._failures():
            try:
                self._ray.get(self.actor.__ray_ready__.remote(), timeout=START_SECONDS)
                watchdog.start()
                with InputNode() as message:
                    graph = self.actor.handle.bind(message)
                self._graph = graph.experimental_compile(
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
        """Put a message on its way; returns what ``receive`` takes. The message's tensors may be
        overwritten at once.

        Raises:
            SidecarDown: the actor is gone or does not read.
        """
        with self._failures():
            return self._graph.execute(encode(message))

    def receive(self, sent: Any, seconds: float | None = None) -> Any:
        """The reply to a message, within REPLY_SECONDS if not told otherwise.

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
                if self._graph is not None:
                    self._graph.teardown(kill_actors=True)
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
        except Exception as error:  # Ray's own, mostly, but not all that it raises share a class
            lines = str(error).strip().splitlines() or [""]
            # What went wrong inside the actor stands at the end of its traceback, Ray's own
            # sentence at the beginning.
            told = lines[-1] if any(line.startswith("  File ") for line in lines) else lines[0]
            raise SidecarDown(f"{type(error).__name__}: {told}") from error


def join_ray(num_cpus: int, object_store_bytes: int, worker_gpu: int | None) -> None:
    """Make sure that this process is part of a Ray cluster: one it belongs to, the one in
    ``RAY_ADDRESS``, or a new one.

    A new one lives in this process's children, listens on the loopback interface alone, and ends
    with the process.

    Args:
        num_cpus, object_store_bytes: of a new cluster: cores for the actor, shared memory for the
            channels and the actor's weights.
        worker_gpu: index of the worker's own GPU among those it sees, which a new cluster leaves
            alone if there are others.
    """
    import ray

    if ray.is_initialized():
        return
    # Tracebacks of tasks that were cancelled because an actor died; the worker says in one line
    # what happened.
    logging.getLogger("ray.dag").setLevel(logging.CRITICAL)
    address = os.environ.get("RAY_ADDRESS")
    with _keep_sigterm_handler():
        if address:
            ray.init(address=address, log_to_driver=False, configure_logging=False)
            return
        with _stay_on_loopback(), _other_gpus(worker_gpu):
            ray.init(
                address="local",
                num_cpus=num_cpus,
                include_dashboard=False,
                _node_ip_address="127.0.0.1",
                log_to_driver=False,
                configure_logging=False,
                object_store_memory=max(
                    LEAST_OBJECT_STORE, object_store_bytes + OBJECT_STORE_SLACK
                ),
            )


@contextmanager
def _keep_sigterm_handler() -> Iterator[None]:
    """Symptom: after ``ray.init`` vLLM's engine process no longer shuts down in order on SIGTERM.

    Reason: Ray puts its own handler in place of whatever was there, if it may.
    Remove when: ``ray.init`` leaves handlers alone.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.getsignal(signal.SIGTERM)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


@contextmanager
def _stay_on_loopback() -> Iterator[None]:
    """Symptom: a cluster started with ``_node_ip_address="127.0.0.1"`` listens on all interfaces.

    Reason: ``ray._private.services.resolve_ip_for_localhost`` replaces the loopback address by the
        machine's own unless this
    platform is said to have no clusters, as on a Mac.
    Remove when: Ray takes the address it is given.
    """
    from ray._private import ray_constants

    before = ray_constants.ENABLE_RAY_CLUSTER
    ray_constants.ENABLE_RAY_CLUSTER = False
    try:
        yield
    finally:
        ray_constants.ENABLE_RAY_CLUSTER = before


@contextmanager
def _other_gpus(worker_gpu: int | None) -> Iterator[None]:
    """Within the block, the GPUs that a new cluster finds are those that the worker leaves free, if
    any.
    """
    name = "CUDA_VISIBLE_DEVICES"
    before = os.environ.get(name)
    visible = (
        before.split(",") if before else [str(index) for index in range(torch.cuda.device_count())]
    )
    others = [gpu for index, gpu in enumerate(visible) if index != worker_gpu]
    if worker_gpu is None or not others:
        yield
        return
    os.environ[name] = ",".join(others)
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before
