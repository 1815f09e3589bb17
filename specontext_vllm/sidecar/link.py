"""Ray's side of the sidecar: a cluster to run in, the actor, and the compiled graph that its messages pass through."""

from __future__ import annotations

import logging
import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from specontext_vllm.sidecar.actor import Sidecar
from specontext_vllm.sidecar.messages import SidecarSpec, decode, encode

START_SECONDS = 120
"""Time in which an actor must have started and allocated its memory."""

REPLY_SECONDS = 60
"""Time in which it must have answered a step, lest requests wait for a hung one. Its death is noticed within milliseconds."""

IN_FLIGHT = 2
"""Messages on their way: a step's aux states and the next step's tokens. Each direction has as many buffers."""

OBJECT_STORE_SLACK = 64 << 20
LEAST_OBJECT_STORE = 80 << 20
"""Ray starts with no less (bytes)."""


class SidecarDown(RuntimeError):
    """The actor died, failed or did not answer in time; the message says which."""


class Link:
    """One life of the actor, from its start to its death.

    Args:
        spec: what the actor builds; kept.
        buffer_bytes: the largest message expected; a larger one makes Ray enlarge the channel.

    Raises:
        SidecarDown: it did not start.
    """

    def __init__(self, spec: SidecarSpec, buffer_bytes: int) -> None:
        import ray
        from ray.dag import InputNode

        self._ray, self.spec = ray, spec
        with self._failures():
            cpus, gpus = spec.config.sidecar_cpus, spec.config.sidecar_gpus
            self.actor = ray.remote(Sidecar).options(num_cpus=cpus, num_gpus=gpus).remote(spec, gpus > 0)
            try:
                ray.get(self.actor.__ray_ready__.remote(), timeout=START_SECONDS)
                with InputNode() as message:
                    graph = self.actor.handle.bind(message)
                self._graph = graph.experimental_compile(
                    _buffer_size_bytes=buffer_bytes, _max_inflight_executions=IN_FLIGHT, _submit_timeout=REPLY_SECONDS
                )
            except BaseException:
                ray.kill(self.actor)
                raise

    def send(self, message: Any) -> Any:
        """Put a message on its way; returns what ``receive`` takes. The message's tensors may be overwritten at once.

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
        with self._failures():
            return decode(self._ray.get(sent, timeout=REPLY_SECONDS if seconds is None else seconds))

    def ask(self, message: Any, seconds: float | None = None) -> Any:
        """``send`` and ``receive``."""
        return self.receive(self.send(message), seconds)

    def close(self) -> None:
        """End the actor and free the channels. Takes seconds; for any thread, once no other uses the link.

        Raises:
            SidecarDown: something of it could not be ended.
        """
        with self._failures():
            try:
                self._ray.kill(self.actor)
            finally:
                self._graph.teardown(kill_actors=True)

    @contextmanager
    def _failures(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # Ray's own, mostly, but not all that it raises share a class
            lines = str(error).strip().splitlines() or [""]
            # What went wrong inside the actor stands at the end of its traceback, Ray's own sentence at the beginning.
            told = lines[-1] if any(line.startswith("  File ") for line in lines) else lines[0]
            raise SidecarDown(f"{type(error).__name__}: {told}") from error


def join_ray(num_cpus: int, object_store_bytes: int, worker_gpu: int | None) -> None:
    """Make sure that this process is part of a Ray cluster: one it belongs to, the one in ``RAY_ADDRESS``, or a new one.

    A new one lives in this process's children, listens on the loopback interface alone, and ends with the process.

    Args:
        num_cpus, object_store_bytes: of a new cluster: cores for the actor, shared memory for the channels and the actor's weights.
        worker_gpu: index of the worker's own GPU among those it sees, which a new cluster leaves alone if there are others.
    """
    import ray

    if ray.is_initialized():
        return
    # Tracebacks of tasks that were cancelled because an actor died; the worker says in one line what happened.
    logging.getLogger("ray.dag").setLevel(logging.CRITICAL)
    address = os.environ.get("RAY_ADDRESS")
    with _keep_sigterm_handler():
        if address:
            ray.init(address=address, log_to_driver=False, configure_logging=False)
            return
        with _stay_on_loopback(), _other_gpus(worker_gpu):
            ray.init(
                address="local", num_cpus=num_cpus, include_dashboard=False, _node_ip_address="127.0.0.1", log_to_driver=False,
                configure_logging=False, object_store_memory=max(LEAST_OBJECT_STORE, object_store_bytes + OBJECT_STORE_SLACK),
            )  # fmt: skip


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

    Reason: ``ray._private.services.resolve_ip_for_localhost`` replaces the loopback address by the machine's own unless this
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
    """Within the block, the GPUs that a new cluster finds are those that the worker leaves free, if any."""
    name = "CUDA_VISIBLE_DEVICES"
    before = os.environ.get(name)
    visible = before.split(",") if before else [str(index) for index in range(torch.cuda.device_count())]
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
