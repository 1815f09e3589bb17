"""Engines that take turns, with the calls of their steps timed."""

from __future__ import annotations

import cProfile
import os
import pstats
import statistics
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

from benchmarks.engines import SETTLE, Cell, EngineSpec, drain, send

ENGINES = {"stock": "stock", "specontext": "specontext", "two-tiers": "specontext"}
"""The engines, and what each is called in ``EngineSpec``."""
ROUNDS = 8
CORES = 4
TURN_SECONDS = 240
"""Longest wait for the other engines: their starts, or their turns."""
TRACED_STEPS = 16
PROFILED = 60
"""Functions of the profile that the result keeps."""


class Turns:
    """Lets processes work one after the other, in a ring.

    Args:
        places: one semaphore a process; the first one's is free.
    """

    def __init__(self, places: Sequence[Any], own: int) -> None:
        self._places, self._own = places, own

    @contextmanager
    def turn(self) -> Iterator[None]:
        """Wait for it, and hand it on.

        Raises:
            RuntimeError: it does not come, since another process failed.
        """
        if not self._places[self._own].acquire(timeout=TURN_SECONDS):
            raise RuntimeError(f"waited {TURN_SECONDS} s for the turn of another engine.")
        yield
        self._places[(self._own + 1) % len(self._places)].release()


def run_engine(
    spec: EngineSpec, cells: Sequence[Cell], profile: bool, turns: Turns
) -> Iterator[tuple[str, Any]]:
    """Start the engine and measure the cells; runs in a child. Yields ``("ready", None)``, then
    ``("cell", (name, figures))`` for each.
    """
    cores = sorted(os.sched_getaffinity(0))[:CORES]
    os.sched_setaffinity(0, cores)
    from vllm import LLM

    llm = LLM(**(spec.arguments() | {"max_model_len": spec.max_model_len}))
    # Only this thread moves; those that the engine has started stay on their cores.
    os.sched_setaffinity(0, cores[:1])
    yield "ready", None
    for index, cell in enumerate(cells):
        yield "cell", (cell.name, measure_cell(llm, cell, index, spec, profile, turns))


def measure_cell(
    llm: Any, cell: Cell, index: int, spec: EngineSpec, profile: bool, turns: Turns
) -> dict[str, Any]:
    """Steps of one cell with the runner's calls timed, then traced on a GPU, and with Python's
    profiler.
    """
    engine, requests = llm.llm_engine, cell.named_requests
    a_round = -(-spec.steps // ROUNDS)
    tokens = (
        -(-requests * cell.tokens // spec.batched_tokens)
        + requests
        + (2 + ROUNDS) * SETTLE
        + (ROUNDS + 2) * a_round
        + TRACED_STEPS
        + 16
    )
    assert spec.max_model_len is not None
    prompt = min(cell.tokens, spec.max_model_len - tokens)
    calls: dict[str, list[float]] = defaultdict(list)
    rounds, busy = [], 0.0
    with turns.turn():
        ids = send(engine, cell, requests, prompt, tokens, index)
        waiting = set(ids)
        while waiting:
            waiting -= {
                output.request_id for output in engine.step() if output.outputs[0].token_ids
            }
        steps(engine, SETTLE)
    runner = llm.llm_engine.model_executor.driver_worker.worker.model_runner
    for _ in range(ROUNDS):
        with turns.turn():
            steps(engine, SETTLE)
            with watched(runner, calls):
                begin = time.thread_time()
                rounds.append(steps(engine, a_round))
                busy += time.thread_time() - begin
    medians = {name: 1e3 * statistics.median(times) for name, times in calls.items()}
    figures: dict[str, Any] = {
        "rounds_ms": rounds,
        "busy_ms": 1e3 * busy / (ROUNDS * a_round),
        "calls_ms": medians,
    }
    with turns.turn():
        if spec.on_gpu:
            figures |= traced(llm, engine)
        if profile:
            figures["profile"] = profiled(engine, a_round)
        engine.abort_request(ids)
        drain(engine)
    return figures


def steps(engine: Any, count: int) -> list[float]:
    """Milliseconds of each of ``count`` steps."""
    ends = [time.perf_counter()]
    for _ in range(count):
        engine.step()
        ends.append(time.perf_counter())
    return [1e3 * (b - a) for a, b in zip(ends, ends[1:])]


@contextmanager
def watched(runner: Any, calls: dict[str, list[float]]) -> Iterator[None]:
    """Time the runner's calls and our hooks into ``calls``, seconds by name."""
    runtime = getattr(runner, "runtime", None)
    places = [
        ("execute_model", runner, "execute_model"),
        ("sample_tokens", runner, "sample_tokens"),
    ]
    if runtime is not None:
        places += [
            ("begin_step", runtime.step, "begin"),
            ("before_forward", runtime.step, "before_model"),
            ("after_forward", runtime.step, "after_model"),
        ]

    def timing(name: str, call: Any) -> Any:
        def timed(*args: Any, **kwargs: Any) -> Any:
            begin = time.perf_counter()
            try:
                return call(*args, **kwargs)
            finally:
                calls[name].append(time.perf_counter() - begin)

        return timed

    with ExitStack() as stack:
        stack.enter_context(patch.object(Future, "result", timing("wait", Future.result)))
        for name, owner, method in places:
            stack.enter_context(patch.object(owner, method, timing(name, getattr(owner, method))))
        yield


def traced(llm: Any, engine: Any) -> dict[str, float]:
    """``gpu_ms`` a step in which at least one kernel runs, and ``kernels`` a step."""
    from benchmarks.timeline import start_profiler, stop_profiler

    llm.collective_rpc(start_profiler)
    steps(engine, TRACED_STEPS)
    kernels = llm.collective_rpc(stop_profiler)[0]
    busy = end = 0.0
    for _, _, start, duration in kernels:
        busy += max(0.0, start + duration - max(start, end))
        end = max(end, start + duration)
    return {"gpu_ms": busy / 1e3 / TRACED_STEPS, "kernels": len(kernels) / TRACED_STEPS}


def profiled(engine: Any, count: int) -> list[dict[str, Any]]:
    """The functions in which Python's profiler saw most time of ``count`` steps; microseconds and
    calls a step. It slows small functions down.
    """
    profiler = cProfile.Profile()
    profiler.enable()
    steps(engine, count)
    profiler.disable()
    found = vars(pstats.Stats(profiler))["stats"]
    functions = [
        {
            "function": f"{Path(file).name}:{line}({name})",
            "calls": calls / count,
            "own_us": 1e6 * own / count,
            "total_us": 1e6 * total / count,
        }
        for (file, line, name), (_, calls, own, total, _) in found.items()
    ]
    by_total = sorted(functions, key=lambda f: -f["total_us"])[:PROFILED]
    by_own = sorted(functions, key=lambda f: -f["own_us"])[:PROFILED]
    return by_total + [function for function in by_own if function not in by_total]
