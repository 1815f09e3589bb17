"""Engines in child processes, one at a time on each GPU; the next one imports meanwhile."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from benchmarks.children import ChildError, engine_env, one_gpu, run_child
from benchmarks.drafts.engine import DraftSpec, run_engine

Take = Callable[[str, str, Any], None]
"""Takes an engine's name, an event's kind and its value; one call at a time."""


def run_all(
    specs: Sequence[DraftSpec], *, gpus: int, seconds: float, folder: Path, take: Take
) -> None:
    """Run the engines in their order on ``gpus`` GPUs, or one after the other on a CPU.

    Args:
        seconds: time limit of all of them.
        folder: of logs, and of the files that let engines begin.
        take: gets the events of ``run_engine``, and ``("error", sentence)`` of a child that fails.
    """
    deadline = time.monotonic() + seconds
    taking, free = threading.Lock(), [threading.Lock() for _ in range(max(1, gpus))]

    def run(place: int) -> None:
        spec = specs[place]
        gpu = place % len(free)
        holds = False

        def tell(kind: str, value: Any) -> None:
            with taking:
                take(spec.name, kind, value)

        env = engine_env(spec.on_gpu)
        if gpus > 1:
            env = env | one_gpu(gpu)
        log = folder / f"{Path(spec.go).stem}.log"
        try:
            left = deadline - time.monotonic()
            for kind, value in run_child(run_engine, spec, log=log, seconds=left, env=env):
                if kind == "imported":
                    holds = free[gpu].acquire(timeout=max(0.0, deadline - time.monotonic()))
                    Path(spec.go).touch()
                else:
                    tell(kind, value)
        except ChildError as error:
            tell("error", str(error))
        finally:
            # The child is gone, and with it what it had on the GPU.
            if holds:
                free[gpu].release()

    def lane(places: Sequence[int]) -> None:
        for place in places:
            if time.monotonic() < deadline:
                run(place)

    # Two lanes a GPU, of which one holds it while the other imports.
    count = 2 * len(free) if gpus else 1
    with ThreadPoolExecutor(count) as pool:
        lanes = [pool.submit(lane, range(first, len(specs), count)) for first in range(count)]
        try:
            for one in lanes:
                one.result()
        except BaseException:
            deadline = 0.0
            for child in multiprocessing.active_children():
                # Each leads a group of its own.
                if child.pid is not None and os.getpgid(child.pid) == child.pid:
                    os.killpg(child.pid, signal.SIGKILL)
            raise
