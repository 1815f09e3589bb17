"""Case `host`: what of a decode step the host does, and for how long the GPU computes; where the
model is small, the host is what a step waits for.
"""

from __future__ import annotations

import cProfile
import itertools
import multiprocessing
import os
import pstats
import statistics
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer

from benchmarks import report
from benchmarks import steps as stepping
from benchmarks.children import ChildError, engine_env, run_child
from benchmarks.engines import SETTLE, Cell, EngineSpec, drain, send
from benchmarks.machine import gpus
from benchmarks.shapes import Shape

ENGINES = {"stock": "stock", "specontext": "specontext", "two-tiers": "specontext"}
"""The engines, and what each is called in ``EngineSpec``."""
ROUNDS = 8
CORES = 4
TURN_SECONDS = 240
"""Longest wait for the other engines: their starts, or their turns."""
TRACED_STEPS = 16
PROFILED = 60
"""Functions of the profile that the result keeps."""

TABLES = {
    "Decode step, ms": (
        stepping.CELL,
        report.Column("engine", "engine"),
        report.Column("step", "step", ".2f"),
        report.Column("ratio", "times stock's", ".2f"),
        report.Column("ratios", "round by round"),
        report.Column("gpu", "GPU computes", ".2f"),
        report.Column("kernels", "kernels", ".0f"),
        report.Column("runner", "host: model runner", ".2f"),
        report.Column("begin_step", "of it tiers, metrics", ".3f"),
        report.Column("before_forward", "before the forward pass", ".3f"),
        report.Column("after_forward", "after it", ".3f"),
        report.Column("wait", "waits for an output", ".2f"),
        report.Column("rest", "scheduler, outputs", ".2f"),
        report.Column("busy", "thread on its core", ".2f"),
    )
}
NOTE = (
    "All requests decode. The engines are there at once, each in a process of its own, on the "
    f"same {CORES} processor cores, and take turns of some dozen steps, {ROUNDS} each: "
    "a rented machine's host may be half as fast a minute later. The threads that step sit on one "
    "and the same core: some cores of such a machine are slower, and a thread keeps its own. "
    "Medians over the steps; times stock's: the median over the rounds of the ratio of their "
    "medians, with the least and the most. "
    f"GPU computes: time during which at least one kernel runs, from a trace of {TRACED_STEPS} "
    "steps. Host: the calls' own times; the model runner's are execute_model and sample_tokens "
    "together, our hooks included. Thread on its core: processor time of the thread that steps, "
    "mean; it waited for what is missing to the step. "
    "Async scheduling as vLLM sets it: while the host prepares a step, the GPU may still compute "
    "the one before."
)


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
    # This thread alone: those that the engine has started stay where they are.
    os.sched_setaffinity(0, cores[:1])
    if spec.host_gib:
        from benchmarks.capacity import drive_selection

        llm.collective_rpc(drive_selection, args=([spec.turnover],))
    yield "ready", None
    for index, cell in enumerate(cells):
        yield "cell", (cell.name, measure_cell(llm, cell, index, spec, profile, turns))


def measure_cell(
    llm: Any, cell: Cell, index: int, spec: EngineSpec, profile: bool, turns: Turns
) -> dict[str, Any]:
    """Steps of one cell with the runner's calls timed, then traced on a GPU, and with Python's
    profiler.
    """
    engine = llm.llm_engine
    a_round = -(-spec.steps // ROUNDS)
    tokens = (
        -(-cell.requests * cell.tokens // spec.batched_tokens)
        + cell.requests
        + (2 + ROUNDS) * SETTLE
        + (ROUNDS + 2) * a_round
        + TRACED_STEPS
        + 16
    )
    prompt = min(cell.tokens, spec.max_model_len - tokens)
    calls: dict[str, list[float]] = defaultdict(list)
    rounds, busy = [], 0.0
    with turns.turn():
        ids = send(engine, cell, cell.requests, prompt, tokens, index)
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
    places = [(runner, "execute_model"), (runner, "sample_tokens")]
    if runtime is not None:
        places += [(runtime, "begin_step"), (runtime, "before_forward"), (runtime, "after_forward")]

    def timing(name: str, call: Any) -> Any:
        def timed(*args: Any, **kwargs: Any) -> Any:
            begin = time.perf_counter()
            try:
                return call(*args, **kwargs)
            finally:
                calls[name].append(time.perf_counter() - begin)

        return timed

    result = Future.result
    Future.result = timing("wait", result)
    for owner, name in places:
        setattr(owner, name, timing(name, getattr(owner, name)))
    try:
        yield
    finally:
        Future.result = result
        for owner, name in places:
            delattr(owner, name)


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
    found = pstats.Stats(profiler).stats
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


def make_rows(
    cells: Sequence[Cell], engines: Sequence[str], details: dict[str, Any]
) -> list[dict[str, Any]]:
    """One row for each cell and engine that was measured."""
    rows = []
    for cell in cells:
        measured = {
            name: figures
            for name in engines
            if (figures := details["engines"].get(name, {}).get(cell.name))
        }
        for name, figures in measured.items():
            calls, rounds = figures["calls_ms"], figures["rounds_ms"]
            row = {
                "cell": cell.label(cell.requests),
                "engine": name,
                "step": statistics.median(itertools.chain(*rounds)),
                "gpu": figures.get("gpu_ms"),
                "kernels": figures.get("kernels"),
                "runner": calls["execute_model"] + calls["sample_tokens"],
                "busy": figures["busy_ms"],
            }
            row["rest"] = row["step"] - row["runner"] - calls.get("wait", 0.0)
            if name != "stock" and "stock" in measured:
                ratios = [
                    statistics.median(ours) / statistics.median(theirs)
                    for ours, theirs in zip(rounds, measured["stock"]["rounds_ms"], strict=True)
                ]
                row |= {
                    "ratio": statistics.median(ratios),
                    "ratios": f"{min(ratios):.2f} to {max(ratios):.2f}",
                }
            rows.append(
                row
                | {
                    key: calls[key]
                    for key in ("begin_step", "before_forward", "after_forward", "wait")
                    if key in calls
                }
            )
    return rows


def main(
    cells: Annotated[str, typer.Option(help="Comma-separated REQUESTSxTOKENS.")] = "1x1k,6x8k",
    model_shape: Annotated[
        str, typer.Option(help="8b, 1b, demo or tiny; the weights are random.")
    ] = "1b",
    engines: Annotated[
        str, typer.Option(help=f"Comma-separated: {', '.join(ENGINES)}.")
    ] = ",".join(ENGINES),
    budget: Annotated[int, typer.Option(help="Tokens a KV head may read in a step.")] = 2048,
    timed: Annotated[int, typer.Option(min=2, help="Timed steps of each cell and engine.")] = 256,
    gpu_gib: Annotated[
        float,
        typer.Option(
            help="GPU memory of each engine but two-tiers, weights included; they are there at once."
        ),
    ] = 16,
    host_gib: Annotated[float, typer.Option(help="Host pool of two-tiers.")] = 6,
    tiers_gpu_gib: Annotated[
        float, typer.Option(help="GPU memory of two-tiers, weights included.")
    ] = 4.5,
    profile: Annotated[
        bool, typer.Option(help="Keep Python's profile of each cell in the result.")
    ] = True,
    engine_seconds: Annotated[
        float, typer.Option(help="Time limit of each engine, from its start to the end of all.")
    ] = 400,
    out: Annotated[Path, typer.Option(help="Folder of the result files.")] = report.RESULTS,
    work: Annotated[
        Path | None,
        typer.Option(
            help="Folder of the model config and the engines' logs; default a new temporary one."
        ),
    ] = None,
) -> None:
    """What of a decode step the host does, and how long the GPU computes. Exit code 1 if anything
    failed.
    """
    try:
        shape = Shape.named(model_shape)
        parsed = stepping.parse_cells(cells, shape, 32)
        if any(cell.requests is None for cell in parsed):
            raise ValueError("--cells: found fit; name the number of requests.")
        chosen = [name.strip() for name in engines.split(",")]
        if unknown := [name for name in chosen if name not in ENGINES]:
            raise ValueError(f"--engines: found {unknown[0]!r}; use {', '.join(ENGINES)}.")
    except ValueError as error:
        typer.echo(str(error), err=True)
        raise typer.Exit(2) from None
    folder = (work or Path(tempfile.mkdtemp(prefix="specontext-bench-"))).resolve()
    model, on_gpu = str(shape.write(folder / "model")), bool(gpus())
    details: dict[str, Any] = {
        "shape": {"name": shape.name, **shape.config},
        "budget": budget,
        "timed": timed,
        "engines": {},
    }
    result = report.Report(
        "host",
        f"The host's share of a decode step, {model_shape} shape, random weights, budget {budget} "
        "tokens",
        TABLES,
        details=details,
    )
    result.notes = [
        NOTE,
        f"two-tiers: {host_gib:g} GiB of host memory behind {tiers_gpu_gib:g} GiB of GPU memory, "
        "driven selections.",
    ]
    context = multiprocessing.get_context("spawn")
    places = [context.Semaphore(0) for _ in chosen]
    longest = min(max(cell.tokens for cell in parsed) + 4096, shape.max_position_embeddings)
    running: dict[str, Iterator[tuple[str, Any]]] = {}
    try:
        for own, name in enumerate(chosen):
            tiers = (
                {"host_gib": host_gib, "gpu_gib": tiers_gpu_gib}
                if name == "two-tiers"
                else {"gpu_gib": gpu_gib}
            )
            most = max(cell.requests for cell in parsed)
            spec = EngineSpec(
                ENGINES[name],
                model,
                on_gpu,
                budget,
                most,
                timed,
                max_model_len=longest,
                batched_tokens=8192,
                **tiers,
            )
            print(f"{name}: starting", flush=True)
            running[name] = run_child(
                run_engine,
                spec,
                parsed,
                profile,
                Turns(places, own),
                log=folder / f"{name}.log",
                seconds=engine_seconds,
                env=engine_env(on_gpu),
            )
            # One after the other: each measures the GPU's free memory.
            next(running[name])
        places[0].release()
        for _ in parsed:
            for name, events in running.items():
                _, (cell, figures) = next(events)
                details["engines"].setdefault(name, {})[cell] = figures
            result.rows = make_rows(parsed, chosen, details)
            result.write(out)
    except ChildError as error:
        # The others wait for its turn, which does not come.
        result.failures[name] = str(error)
        result.write(out)
    finally:
        for events in running.values():
            events.close()
    result.show()
    print(f"written: {out}", flush=True)
    raise typer.Exit(1 if result.failures else 0)
