"""What must be the same for cells to stand in one table, and notes on how they were made."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.accuracy import wanted
from benchmarks.accuracy.grid import Grid
from benchmarks.fingerprints import code_digest
from benchmarks.machine import device_slug
from benchmarks.prefilled import EngineSpec


def _weights(folder: Path) -> dict[str, list[int]]:
    """Size and time of the weight files, which tell another model in the same folder apart."""
    return {
        file.name: [file.stat().st_size, int(file.stat().st_mtime)]
        for file in sorted(folder.glob("*.safetensors"))
    }


def cell_settings(grid: Grid, spec: EngineSpec, machine: dict[str, Any]) -> dict[str, Any]:
    """What must be the same for cells to stand in one table."""
    return {
        "model": str(grid.model.resolve()),
        "config": hashlib.sha256((grid.model / "config.json").read_bytes()).hexdigest()[:16],
        "weights": _weights(grid.model),
        "retrieval head": {"source": grid.head, **(_weights(Path(grid.head)) if grid.head else {})},
        "dtype": spec.dtype,
        "head keys": spec.head_keys,
        "device": device_slug(machine),
        "CUDA graphs": not spec.eager,
        "vllm": machine["packages"]["vllm"],
        "code": code_digest(Path(__file__).with_name("metrics.py")),
    }


def make_notes(grid: Grid, spec: EngineSpec, left_out: Sequence[str]) -> list[str]:
    floors = ", ".join(sorted({f"{task.floor:g}" for task in grid.tasks.values()}))
    graphs = (
        "without CUDA graphs, so that retrievers can be switched "
        "(speed with graphs: `python -m benchmarks speed`)"
    )
    notes = [
        "Greedy replies; values with 95 % intervals: Wilson for right or wrong, bootstrap over the "
        "prompts for scores and perplexity. "
        "Prefill is dense, and so is the first token of each reply, which prefill makes.",
        *(f"{name.replace('_', ' ')}: {task.about}." for name, task in grid.tasks.items()),
        f"† dense attention itself scores less than the task's floor ({floors}): the model cannot "
        "do the task, so it says nothing about "
        "a retriever; its other cells and longer contexts are left out, and it is not in the "
        "means.",
        "Always read: the first page and the newest 64 tokens (the defaults); with budgets under "
        "112, which have no room for both and a "
        "page to choose, the newest quarter of the budget instead."
        if not grid.recents
        else f"Always read: the first page and the newest {', '.join(map(str, grid.recents))} "
        "tokens (recents), wherever that leaves the budget a page to choose.",
        f"The head's keys (head_key_dtype): {spec.head_keys}.",
        "Mean: over the tasks scored in 0 to 1. Pages read: of all pages that the decode steps "
        "could have read. Kept mass: share of "
        "the head's own attention that lies on them, its confidence. Tokens/s: emitted by up to 16 "
        "requests together, prompts in the "
        f"prefix cache, {graphs if spec.eager else 'with CUDA graphs'}.",
    ]
    if grid.thresholds:
        notes.append(
            f"Confidence fallback: dlm with a budget of {grid.threshold_budget}; a row whose kept "
            "mass is under the threshold reads "
            "four times that."
        )
    if grid.head is None and "dlm" not in grid.retrievers:
        notes.append(
            "dlm was left out: no retrieval head was given or found in the model's folder."
        )
    if "dlm" in grid.retrievers:
        notes.append(wanted.NOTE)
    if left_out:
        notes.append(f"LongBench files left out (not English or code): {', '.join(left_out)}.")
    return notes
