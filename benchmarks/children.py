"""Work in child processes, one after the other, so that each engine finds an empty GPU and cannot
harm the next.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import time
import traceback
from collections.abc import Callable, Generator, Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

ENGINE_ENV = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "HF_HUB_OFFLINE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    # Where it has several workers: it may have asked CUDA for something itself.
    "VLLM_WORKER_MULTIPROC_METHOD": "spawn",
}
"""For a child that is one engine. Async scheduling does not need an engine process of its own
(vllm/config/vllm.py turns it on for the uniprocess executor as well); runs record that it was
on."""

LOG_TAIL = 40
"""Lines of a failed child's log that are shown."""


def room_for_kv(gib: float | None) -> dict[str, Any]:
    """Arguments of ``LLM(...)`` for an engine with ``gib`` of GPU memory for KV; None: what vLLM
    finds free.
    """
    if gib is None:
        return {}
    # vLLM only checks that the share is free at the start then, and measures nothing that other
    # engines could disturb.
    return {"kv_cache_memory_bytes": int(gib * 2**30), "gpu_memory_utilization": 0.05}


def engine_env(on_gpu: bool, cpu_kv_gib: int = 1) -> dict[str, str]:
    """The environment of a child that is one engine. On a CPU, vLLM takes the room for KV from it:
    the caller's own, or ``cpu_kv_gib``.
    """
    return (
        ENGINE_ENV
        if on_gpu
        else {
            **ENGINE_ENV,
            "VLLM_CPU_KVCACHE_SPACE": os.environ.get("VLLM_CPU_KVCACHE_SPACE", str(cpu_kv_gib)),
        }
    )


def one_gpu(gpu: int) -> dict[str, str]:
    """The environment of a child that sees the one GPU with this number of those seen here."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "")
    return {"CUDA_VISIBLE_DEVICES": visible.split(",")[gpu] if visible else str(gpu)}


class ChildError(RuntimeError):
    """A child that failed, died or ran out of time; the message is one sentence."""


def run_child(
    work: Callable[..., Iterator[tuple[str, Any]]],
    *arguments: Any,
    log: Path,
    seconds: float,
    env: dict[str, str] | None = None,
) -> Generator[tuple[str, Any], None, None]:
    """Run the generator function ``work(*arguments)`` in a spawned process and yield its (name,
    value) events as they come.

    Args:
        log: takes everything the child prints.
        seconds: time limit; a child that is over it is killed.
        env: added to the child's environment.

    Raises:
        ChildError: after the events that came before the failure; the tail of the log is printed
            first.
    """
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    child = context.Process(target=_main, args=(sender, str(log), env or {}, work, arguments))
    child.start()
    sender.close()
    deadline = time.monotonic() + seconds
    patience = 20.0  # seconds for an orderly exit
    try:
        while True:
            if not receiver.poll(max(0.0, deadline - time.monotonic())):
                patience = 0.0
                raise ChildError(f"it was stopped after its time limit of {seconds:.0f} s.")
            try:
                kind, value = receiver.recv()
            except EOFError:
                child.join(10)
                raise ChildError(f"its process died with exit code {child.exitcode}.") from None
            if kind == "end":
                return
            if kind == "error":
                raise ChildError(value)
            yield value
    except ChildError:
        print(f"--- the last lines of {log}", flush=True)
        print(
            "\n".join(log.read_text(errors="replace").splitlines()[-LOG_TAIL:])
            if log.exists()
            else "(no log)",
            flush=True,
        )
        raise
    finally:
        child.join(patience)
        _kill_group(child)
        receiver.close()


def _main(
    sender: Connection,
    log: str,
    env: dict[str, str],
    work: Callable[..., Iterator[tuple[str, Any]]],
    arguments: tuple,
) -> None:
    # A process group of its own, so that all that an engine starts ends with it.
    os.setpgid(0, 0)
    os.environ.update(env)
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    try:
        for event in work(*arguments):
            sender.send(("event", event))
        sender.send(("end", None))
    except BaseException as error:
        traceback.print_exc()
        sender.send(
            ("error", f"{type(error).__name__}: {str(error).strip() or 'no message'}"[:500])
        )
    finally:
        sender.close()


def _kill_group(child: multiprocessing.process.BaseProcess) -> None:
    # The child leads its group, so that the group's id is the child's. Check it, since killing our
    # own group would end this process.
    if child.pid is None:
        return
    try:
        if child.is_alive() and os.getpgid(child.pid) != child.pid:
            child.kill()
        else:
            os.killpg(child.pid, signal.SIGKILL)
    except ProcessLookupError:
        pass
    child.join()
