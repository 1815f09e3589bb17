"""The Ray cluster that the sidecar's actor runs in."""

from __future__ import annotations

import logging
import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch

OBJECT_STORE_SLACK = 64 << 20
MIN_OBJECT_STORE = 80 << 20
"""Bytes without which Ray does not start."""


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
    # It would log tracebacks of the tasks that an actor's death cancels; the worker says in one
    # line what happened.
    logging.getLogger("ray.dag").setLevel(logging.CRITICAL)
    address = os.environ.get("RAY_ADDRESS")
    with _keep_sigterm_handler():
        if address:
            ray.init(address=address, log_to_driver=False, configure_logging=False)
            return
        with _stay_on_loopback(), only_other_gpus(worker_gpu):
            ray.init(
                address="local",
                num_cpus=num_cpus,
                include_dashboard=False,
                _node_ip_address="127.0.0.1",
                log_to_driver=False,
                configure_logging=False,
                object_store_memory=max(MIN_OBJECT_STORE, object_store_bytes + OBJECT_STORE_SLACK),
            )


@contextmanager
def _keep_sigterm_handler() -> Iterator[None]:
    """Within the block, keep the handler that this process has for SIGTERM.

    Symptom: after ``ray.init`` vLLM's engine process no longer shuts down in order on SIGTERM.
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
    """Within the block, have a new cluster listen on the loopback interface alone.

    Symptom: a cluster started with ``_node_ip_address="127.0.0.1"`` listens on all interfaces.
    Reason: ``ray._private.services.resolve_ip_for_localhost`` replaces the loopback address by the
    machine's own, unless this platform is said to have no clusters, as on a Mac.
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
def only_other_gpus(worker_gpu: int | None) -> Iterator[None]:
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
