"""The paper's four workloads by sampled step times: what is measured, and the tokens per second
that follow from it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from benchmarks import report
from benchmarks.engines import Cell
from benchmarks.hugging_face import ATTENTION
from benchmarks.steps import OUT_OF_MEMORY

WORKLOADS = {"[2k,16k]": (2, 16), "[2k,32k]": (2, 32), "[16k,2k]": (16, 2), "[32k,2k]": (32, 2)}
"""Thousands of tokens in and out (paper, table 3)."""

SAMPLES = (4, 8, 12, 24)
"""Thousands of tokens of the contexts that are timed, besides each workload's first and last."""

ENGINES = {"specontext": "sparse", "stock": "stock", "hf-eager": "hf_eager"}
"""The engines, in the order in which they run, and their columns' keys."""


@dataclass(frozen=True)
class Workload:
    """A workload of the paper with its lengths in tokens."""

    name: str
    prompt: int
    output: int

    @property
    def room(self) -> int:
        """Tokens that a request grows to."""
        return self.prompt + self.output

    @property
    def prefill_cell(self) -> str:
        return f"prefill {self.prompt} of {self.room}"


def scaled(scale: float) -> list[Workload]:
    """The workloads, all lengths multiplied."""
    return [
        Workload(name, int(scale * 1024 * prompt), int(scale * 1024 * output))
        for name, (prompt, output) in WORKLOADS.items()
    ]


def make_cells(
    workloads: Sequence[Workload], engine: str, requests: int | None, scale: float
) -> list[Cell]:
    """What an engine measures: per room the sampled contexts, shortest first; Hugging Face also the
    real prefills.

    Args:
        requests: of Hugging Face; None, and for the other engines: as many as fit.
    """
    cells = []
    own = requests if engine in ATTENTION else None
    for room in sorted({workload.room for workload in workloads}):
        firsts = {workload.prompt for workload in workloads if workload.room == room}
        between = {int(scale * 1024 * n) for n in SAMPLES}
        lengths = sorted({*firsts, room, *(n for n in between if min(firsts) < n < room)})
        cells += [
            Cell(own, tokens, f"{tokens} of {room}", room, prefill=False) for tokens in lengths
        ]
    if engine in ATTENTION:
        cells += [
            Cell(own, workload.prompt, workload.prefill_cell, workload.room)
            for workload in workloads
        ]
    return cells


def mean_step(steps: dict[int, float], first: int, last: int) -> float:
    """Mean of the interpolated step times over contexts of ``first`` to ``last`` tokens."""
    import numpy as np

    lengths = np.arange(first, last + 1)
    known = sorted(steps)
    return float(np.interp(lengths, known, [steps[n] for n in known]).mean())


def make_rows(
    workloads: Sequence[Workload], cells: dict[str, list[Cell]], details: dict[str, Any]
) -> list[dict[str, Any]]:
    """The table from what the engines have reported so far.

    Args:
        cells: of each engine, as ``make_cells`` gave them.
    """
    rows = []
    for workload in workloads:
        row: dict[str, Any] = {"workload": workload.name}
        for engine, key in ENGINES.items():
            measured = details["engines"].get(engine, {}).get("cells", {})
            row |= _engine_columns(
                workload,
                key,
                [cell for cell in cells[engine] if cell.room == workload.room],
                measured,
            )
        for key, suffix in (("rate", ""), ("whole", "_whole")):
            for other, name in (("hf_eager", "eager"), ("stock", "stock")):
                mine, theirs = row.get(f"sparse_{key}"), row.get(f"{other}_{key}")
                if isinstance(mine, float) and isinstance(theirs, float):
                    row[f"times_{name}{suffix}"] = mine / theirs
        rows.append(row)
    return rows


def _engine_columns(
    workload: Workload, key: str, cells: Sequence[Cell], measured: dict[str, Any]
) -> dict[str, Any]:
    """One engine's part of the workload's row: nothing while a sampled context is missing, nothing
    of the prefill while that is.
    """
    sampled = [cell for cell in cells if not cell.prefill]
    # Without a prefill of its own, an engine prefills from one sampled context to the next.
    own = [cell for cell in cells if cell.name == workload.prefill_cell]
    prefills: list[dict[str, Any]] = [
        measured.get(cell.name) or {}
        for cell in own or [cell for cell in sampled if cell.tokens <= workload.prompt]
    ]
    if not all(measured.get(cell.name) for cell in sampled):
        return {}
    figures = [measured[cell.name] for cell in sampled]
    if any("out_of_memory" in each for each in figures):
        return {f"{key}_rate": OUT_OF_MEMORY}
    requests = figures[0]["requests"]
    step = mean_step(
        {each["context_tokens"]: each["step_ms"]["median"] for each in figures},
        workload.prompt,
        workload.room,
    )
    columns: dict[str, Any] = {
        f"{key}_requests": requests,
        f"{key}_step": step,
        f"{key}_rate": 1e3 * requests / step,
    }
    if any("out_of_memory" in each for each in prefills):
        columns |= {f"{key}_prefill": OUT_OF_MEMORY, f"{key}_whole": OUT_OF_MEMORY}
    elif all(prefills):
        prefill = sum(each["prefill_s"] for each in prefills)
        whole = prefill + 1e-3 * step * workload.output
        columns |= {f"{key}_prefill": prefill, f"{key}_whole": requests * workload.output / whole}
    return columns


TABLES = {
    "Decode": (
        report.Column("workload", "[in, out]"),
        report.Column("hf_eager_requests", "HF eager, requests"),
        report.Column("stock_requests", "stock, requests"),
        report.Column("sparse_requests", "specontext, requests"),
        report.Column("hf_eager_rate", "HF eager, tokens/s", ",.0f"),
        report.Column("stock_rate", "stock, tokens/s", ",.0f"),
        report.Column("sparse_rate", "specontext, tokens/s", ",.0f"),
        report.Column("times_eager", "times HF eager", ".2f"),
        report.Column("times_stock", "times stock", ".2f"),
        report.Column("hf_eager_step", "HF eager, mean step, ms", ".2f"),
        report.Column("stock_step", "stock, mean step, ms", ".2f"),
        report.Column("sparse_step", "specontext, mean step, ms", ".2f"),
    ),
    "With the prefill": (
        report.Column("workload", "[in, out]"),
        report.Column("hf_eager_prefill", "HF eager, prefill, s", ".1f"),
        report.Column("stock_prefill", "stock, prefill, s", ".1f"),
        report.Column("sparse_prefill", "specontext, prefill, s", ".1f"),
        report.Column("hf_eager_whole", "HF eager, tokens/s", ",.0f"),
        report.Column("stock_whole", "stock, tokens/s", ",.0f"),
        report.Column("sparse_whole", "specontext, tokens/s", ",.0f"),
        report.Column("times_eager_whole", "times HF eager", ".2f"),
        report.Column("times_stock_whole", "times stock", ".2f"),
    ),
}
NOTE = (
    "Each engine decodes with all its requests at once, from the context `in` to `in + out`. The "
    "mean step is the mean over every context "
    "length on that way of the step times (medians) at the sampled contexts, interpolated linearly "
    "between them; before the first and "
    "after the last sampled context the nearest one's time holds. Tokens/s = requests / mean step; "
    "with the prefill: requests * out / "
    "(prefill + out * mean step). vLLM's engines prefill from one sampled context to the next "
    "(prefix cache), and the prefill is the "
    "sum of those; Hugging Face's is one call over all prompts, as in `generate`, and its sampled "
    "contexts are filled with random K and V, so that they "
    "are timed even where that prefill is out of memory."
)
