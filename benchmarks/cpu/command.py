"""The command `cpu`."""

from __future__ import annotations

import math
import multiprocessing
import statistics
import time
from collections.abc import Generator, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from benchmarks import report
from benchmarks import steps as stepping
from benchmarks.children import ChildError, engine_env, run_child
from benchmarks.cpu.engine import (
    BATCHED_TOKENS,
    MARGIN,
    PREFILLS,
    ROUNDS,
    read_bandwidth,
    run_engine,
)
from benchmarks.engines import Cell, EngineSpec
from benchmarks.host.engine import Turns
from benchmarks.picture import draw_steps
from benchmarks.shapes import BYTES, Shape
from benchmarks.speed.options import Budget, Out, Work, end, refusing, work_folder

CELLS = "1x1k,1x2k,4x2k,8x2k,1x8k,4x8k,8x8k,1x32k,4x32k,8x32k"
PREFILL_CELLS = "1x2k,4x2k,1x8k,4x8k"
ENGINES = ("stock", "specontext")
MAX_REQUESTS = 32
ENGINE_SECONDS = 3600
TABLES = {
    "Decode step, ms": (
        report.Column("step_cell", "requests x context"),
        report.Column("stock", "stock", ".1f"),
        report.Column("sparse", "specontext", ".1f"),
        report.Column("ratio", "times stock", ".2f"),
        report.Column("ratios", "turn by turn"),
        report.Column("stock_limit", "byte limit dense", ".1f"),
        report.Column("sparse_limit", "byte limit sparse", ".1f"),
        report.Column("over_limit", "times the byte limit", ".2f"),
        stepping.PAGES_READ,
    ),
    "Prefill, s until every request has its first token": (
        report.Column("prefill_cell", "requests x prompt"),
        report.Column("stock_prefill", "stock", ".2f"),
        report.Column("sparse_prefill", "specontext", ".2f"),
        report.Column("prefill_ratio", "times stock", ".2f"),
        report.Column("prefill_ratios", "turn by turn"),
    ),
}


def notes(timed: int, eager: bool) -> list[str]:
    """What the table's figures are."""
    return [
        "Both engines are there at once, each in a process of its own on the same cores, and take "
        f"turns: {ROUNDS} of {-(-timed // ROUNDS)} steps, {PREFILLS} of a prefill. Medians over "
        "the steps or the prefills; times stock: the median over the turns of the ratio of their "
        "medians, with the least and the most."
        + (" Without torch.compile." if eager else " Compiled by torch, as vLLM does by default."),
        "Decode: the contexts' KV and the head's keys are random numbers, so nothing is "
        "prefilled; a dummy head chooses. Prefill: every prompt is new to the prefix cache.",
        "Byte limit: bytes a step must read (weights; KV of the whole context, or of the budget "
        "with the head's weights and keys) over what all threads together read in a second.",
    ]


def make_rows(
    shape: Shape, cells: Sequence[tuple[str, Cell]], details: dict[str, Any]
) -> list[dict[str, Any]]:
    """A row for each cell that was measured."""
    return [
        _row(shape, kind, cell, figures, details)
        for kind, cell in cells
        if (figures := details["cells"].get(f"{kind} {cell.name}"))
    ]


def _row(
    shape: Shape, kind: str, cell: Cell, figures: dict[str, Any], details: dict[str, Any]
) -> dict[str, Any]:
    label = cell.label(cell.named_requests)
    stock, ours = (figures[name] for name in ENGINES)
    if kind == "prefill":
        theirs, times = stock["prefills_s"], ours["prefills_s"]
        return {
            "prefill_cell": label,
            "stock_prefill": statistics.median(theirs),
            "sparse_prefill": statistics.median(times),
            **_ratios("prefill_ratio", theirs, times),
        }
    limits = {
        "stock_limit": shape.dense_step_bytes(cell.named_requests, cell.tokens),
        "sparse_limit": shape.sparse_step_bytes(
            cell.named_requests, cell.tokens, details["budget"], key_bytes=BYTES
        ),
    }
    milliseconds = {key: 1e3 * size / details["read_bytes_per_s"] for key, size in limits.items()}
    median, stats = ours["step_ms"]["median"], ours["stats"]
    return {
        "step_cell": label,
        "cell": label,
        "requests": cell.named_requests,
        "context": cell.tokens,
        "stock": stock["step_ms"]["median"],
        "sparse": median,
        **_ratios(
            "ratio",
            [statistics.median(part) for part in stock["rounds_ms"]],
            [statistics.median(part) for part in ours["rounds_ms"]],
        ),
        **milliseconds,
        "over_limit": median / milliseconds["sparse_limit"],
        "pages_read": stats["pages_read"] / stats["pages_total"],
    }


def _ratios(key: str, stock: Sequence[float], ours: Sequence[float]) -> dict[str, Any]:
    found = [theirs / own for theirs, own in zip(stock, ours, strict=True)]
    return {key: statistics.median(found), f"{key}s": f"{min(found):.2f} to {max(found):.2f}"}


def kv_gib(shape: Shape, cells: Sequence[Cell]) -> int:
    """GiB that hold the KV of any of the cells, the head's caches included."""
    head = shape.num_key_value_heads * shape.head_dim * BYTES + shape.hidden_size * BYTES // 16
    longest = max(cell.named_requests * (cell.tokens + MARGIN) for cell in cells)
    return math.ceil(1.05 * longest * (shape.kv_bytes_per_token + head) / 2**30)


def measure(
    specs: Sequence[EngineSpec],
    cells: Sequence[tuple[str, Cell]],
    gib: int,
    eager: bool,
    folder: Path,
) -> Generator[tuple[str, Any], None, None]:
    """Events of both engines: ``("ready", {engine: facts})``, then for each cell ``("cell",
    (kind and name, {engine: figures}))``.

    Raises:
        ChildError: an engine failed.
    """
    context = multiprocessing.get_context("spawn")
    places = [context.Semaphore(0) for _ in specs]
    running: dict[str, Generator[tuple[str, Any], None, None]] = {}
    ready: dict[str, Any] = {}
    try:
        for own, spec in enumerate(specs):
            print(f"{spec.name}: starting, log {folder / spec.name}.log", flush=True)
            running[spec.name] = run_child(
                run_engine,
                spec,
                cells,
                eager,
                Turns(places, own),
                log=folder / f"{spec.name}.log",
                seconds=ENGINE_SECONDS,
                env=engine_env(False, gib) | {"VLLM_CPU_KVCACHE_SPACE": str(gib)},
            )
            ready[spec.name] = next(running[spec.name])[1]
        yield "ready", ready
        places[0].release()
        for _ in cells:
            figures = {}
            for name, events in running.items():
                _, (cell, figures[name]) = next(events)
            yield "cell", (cell, figures)
    finally:
        for events in running.values():
            events.close()


def main(
    cells: Annotated[
        str, typer.Option(help="Comma-separated REQUESTSxTOKENS whose decode steps are timed.")
    ] = CELLS,
    prefills: Annotated[
        str, typer.Option(help="Comma-separated REQUESTSxTOKENS whose prefill is timed.")
    ] = PREFILL_CELLS,
    model_shape: Annotated[
        str, typer.Option(help="smollm2, 1b, 8b or tiny; the weights are random.")
    ] = "smollm2",
    budget: Budget = 1024,
    timed: Annotated[int, typer.Option(min=4, help="Timed decode steps of each cell.")] = 48,
    eager: Annotated[
        bool, typer.Option("--eager", help="Without torch.compile, which takes a minute or two.")
    ] = False,
    seconds: Annotated[
        float, typer.Option(help="No cell begins later; the same command then goes on.")
    ] = 3600,
    out: Out = report.RESULTS,
    work: Work = None,
) -> None:
    """Prefill and decode steps on a CPU: stock vLLM and specontext in turns, beside the byte limit.
    Cells that stand in the result are not measured again.
    """
    begin = time.monotonic()

    def prepare() -> tuple[Any, ...]:
        shape = Shape.named(model_shape)
        parsed = [
            (kind, cell)
            for kind, text in (("prefill", prefills), ("decode", cells))
            for cell in (stepping.parse_cells(text, shape, MAX_REQUESTS) if text else ())
        ]
        if not parsed:
            raise ValueError("--cells: found none, and no --prefills; name one of them.")
        longest = max(cell.tokens for _, cell in parsed) + MARGIN
        if longest > shape.max_position_embeddings:
            raise ValueError(
                f"--cells: found {longest - MARGIN} tokens, but --model-shape {model_shape} has "
                f"{shape.max_position_embeddings} positions, {MARGIN} of them for the output; "
                "name fewer."
            )
        details = {
            "shape": {"name": shape.name, **shape.config},
            "budget": budget,
            "timed": timed,
            "eager": eager,
            "read_bytes_per_s": 0.0,
            "engines": {},
            "cells": {},
            "runs": {},
        }
        title = (
            f"Prefill and decode steps on a CPU, {model_shape} shape, random weights, budget "
            f"{budget} tokens"
        )
        result = report.Report(f"cpu-{model_shape}", title, TABLES, details=details)
        result.take_over(out, ("shape", "budget", "timed", "eager"))
        return shape, parsed, longest, result

    shape, parsed, longest, result = refusing(prepare)
    details, folder = result.details, work_folder(work)
    result.failures.clear()
    waiting = [
        (kind, cell) for kind, cell in parsed if f"{kind} {cell.name}" not in details["cells"]
    ]
    if waiting:
        # Other runs may have found the memory less busy.
        details["read_bytes_per_s"] = max(details["read_bytes_per_s"], read_bandwidth())
    every = [name.split(" ") for name in details["cells"]] + [(k, c.name) for k, c in waiting]
    known = [(kind, Cell.parse(name)) for kind, name in every]
    known.sort(key=lambda item: (item[1].tokens, item[1].named_requests))

    def save() -> None:
        result.rows = make_rows(shape, known, details)
        runs = [(details["runs"][cell["run"]], name) for name, cell in details["cells"].items()]
        result.notes = [
            *notes(timed, eager),
            f"All threads together read {details['read_bytes_per_s'] / 1e9:.1f} GB/s.",
            *report.run_notes(runs),
        ]
        result.write(out)

    if waiting:
        model = str(shape.write(folder / "model"))
        most = max(cell.named_requests for _, cell in parsed)
        specs = [
            EngineSpec(
                name,
                model,
                False,
                budget,
                most,
                timed,
                max_model_len=longest,
                batched_tokens=BATCHED_TOKENS,
            )
            for name in ENGINES
        ]
        gib = kv_gib(shape, [Cell(1, longest, ""), *(cell for _, cell in waiting)])
        events = measure(specs, waiting, gib, eager, folder)
        details["runs"][result.date] = result.run()
        try:
            for kind, value in events:
                if kind == "ready":
                    details["engines"] = value
                else:
                    cell, figures = value
                    details["cells"][cell] = figures | {"run": result.date}
                    save()
                    print(f"{cell}: after {time.monotonic() - begin:.0f} s", flush=True)
                if time.monotonic() - begin > seconds:
                    events.close()
                    break
        except ChildError as error:
            result.failures["engines"] = str(error)
    save()
    left = len(parsed) - sum(f"{kind} {c.name}" in details["cells"] for kind, c in parsed)
    if left:
        print(f"{left} cells are left; the same command goes on with them.", flush=True)
    if any("context" in row for row in result.rows):
        steps = [row for row in result.rows if "context" in row]
        draw_steps(steps, result.title, out / f"{result.stem}.png")
    end(result, out)
