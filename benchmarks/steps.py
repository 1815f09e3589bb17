"""Decode steps of several engines side by side: the runs, and the rows of their result."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from benchmarks import report
from benchmarks.children import ENGINE_ENV, ChildError, engine_env, run_child
from benchmarks.engines import Cell, EngineSpec, run_engine
from benchmarks.hugging_face import ATTENTION, run_hugging_face
from benchmarks.shapes import Shape
from specontext_vllm.demo.server import ServerError

KEYS = {
    "specontext": "sparse",
    "quest": "quest",
    "stock": "stock",
    "hf-sdpa": "hf_sdpa",
    "hf-eager": "hf_eager",
}
"""The engines and their columns' keys; in this order, so that the one with the least room for KV
says how many requests fit.
"""

OUT_OF_MEMORY = "out of memory"
PROBE_SECONDS = 150


def chosen_engines(option: str, text: str, known: Sequence[str]) -> list[str]:
    """The comma-separated engines, in the order in which they run.

    Raises:
        ValueError: an unknown one.
    """
    chosen = [name.strip() for name in text.split(",")]
    for name in chosen:
        if name not in known:
            raise ValueError(f"{option}: found {name!r}; use {', '.join(known)}.")
    return [name for name in KEYS if name in chosen]


def parse_cells(text: str, shape: Shape, max_num_seqs: int) -> list[Cell]:
    """The comma-separated cells.

    Raises:
        ValueError: one that is none, or that the shape or ``max_num_seqs`` cannot hold.
    """
    cells = [Cell.parse(part) for part in text.split(",")]
    for cell in cells:
        if cell.tokens > shape.max_position_embeddings:
            raise ValueError(
                f"--cells: {cell.name} exceeds the {shape.max_position_embeddings} tokens of "
                f"--model-shape {shape.name}."
            )
        if cell.requests and cell.requests > max_num_seqs:
            raise ValueError(
                f"--cells: {cell.name} needs --max-num-seqs of at least {cell.requests}."
            )
    return cells


def refuse_hugging_face(shape: Shape, chosen: Sequence[str], workers: int = 1) -> None:
    """Raise a ValueError where transformers' model of ``shape`` would not be vLLM's: its layers
    know no windows or sinks, or are not meant to be fast, or vLLM has several workers.
    """
    found = [name for name in chosen if name in ATTENTION]
    if workers > 1 and found:
        raise ValueError(
            f"--engines: found {', '.join(found)}, which run on one GPU, but "
            f"--tensor-parallel-size is {workers}; use specontext, quest and stock."
        )
    if shape.is_mixed and found:
        raise ValueError(
            f"--engines: found {', '.join(found)}, but transformers' layers are no measure for "
            f"--model-shape {shape.name}; use specontext, quest and stock."
        )


def additional_config(shape: Shape) -> dict[str, Any]:
    """vLLM's ``additional_config`` for engines of ``shape``, stock's among them."""
    # By itself vLLM takes FlashInfer's kernel on some GPUs, and fails where that is not installed.
    return {"gdn_prefill_backend": "triton"} if shape.has_linear_layers else {}


def run_into(
    result: report.Report, spec: EngineSpec, cells: Sequence[Cell], *, log: Path, seconds: float
) -> Iterator[None]:
    """Measure one engine's cells in a child process into the result; see ``collect``."""
    fits = fits_of(result.details, cells)
    run = run_hugging_face if spec.name in ATTENTION else run_engine
    print(f"{spec.name}: log {log}", flush=True)
    events = run_child(
        run, spec, cells, fits, log=log, seconds=seconds, env=engine_env(spec.on_gpu)
    )
    return collect(result, spec.name, [cell.name for cell in cells], events)


def fits_of(details: dict[str, Any], cells: Sequence[Cell]) -> dict[str, int]:
    """Requests of the "fit" cells, as the engines already measured had them; with a room of its
    own, each engine fills it by itself.
    """
    shared = {cell.name for cell in cells if cell.requests is None and cell.room is None}
    fits: dict[str, int] = {}
    for engine in details["engines"].values():
        for cell in shared & engine["cells"].keys():
            fits.setdefault(cell, engine["cells"][cell]["requests"])
    return fits


def collect(
    result: report.Report, name: str, cells: Sequence[str], events: Iterable[tuple[str, Any]]
) -> Iterator[None]:
    """Take an engine's events into ``result.details["engines"]`` and ``result.failures``, in place
    of what stood there for the cells.

    Yields whenever there is something new to save. A child or a server that fails is a failure of
    the engine.
    """
    details = result.details
    kept = details["engines"].setdefault(name, {"cells": {}})
    for cell in cells:
        kept["cells"].pop(cell, None)
        result.failures.pop(f"{name}, {cell}", None)
    result.failures.pop(name, None)
    details.setdefault("runs", {})[result.date] = result.run()
    print(f"{name}: starting", flush=True)
    try:
        for kind, value in events:
            if kind == "ready":
                kept |= value
                room = (
                    f", KV room for {value['kv_capacity_tokens']:,} tokens"
                    if "kv_capacity_tokens" in value
                    else ""
                )
                print(f"{name}: ready after {value['start_s']} s{room}", flush=True)
            elif kind == "cell":
                cell, figures = value
                kept["cells"][cell] = figures | {"run": result.date}
                print(f"{name}: {cell}: {_brief(figures)}", flush=True)
            else:
                result.failures[f"{name}, {value[0]}"] = value[1]
                print(f"{name}: {value[0]} failed: {value[1]}", flush=True)
            yield
    except (ChildError, ServerError) as error:
        result.failures[name] = str(error)
        yield


def _brief(figures: dict[str, Any]) -> str:
    if "out_of_memory" in figures:
        return f"{OUT_OF_MEMORY}: {figures['out_of_memory']}"
    if "step_ms" not in figures:
        return ", ".join(f"{key} {value:.4g}" for key, value in figures.items())
    prefill = f"prefill {figures['prefill_s']:.1f} s, " if "prefill_s" in figures else ""
    return f"{figures['requests']} requests, {prefill}step {figures['step_ms']['median']:.2f} ms"


def probe_into(
    result: report.Report, shape: Shape, cells: Sequence[Cell], *, log: Path
) -> Iterator[None]:
    """Measure the copy bandwidth and the stages of the cells; yields whenever there is something
    new to save.
    """
    from benchmarks.stages import probe

    details = result.details
    probed = []
    for cell in cells:
        if figures := _measured(details, cell.name):
            probed.append((cell.name, figures["requests"], figures["context_tokens"]))
        result.failures.pop(f"stages, {cell.name}", None)
    result.failures.pop("stages", None)
    try:
        for kind, value in run_child(
            probe, shape, probed, details["budget"], log=log, seconds=PROBE_SECONDS, env=ENGINE_ENV
        ):
            if kind == "bandwidth":
                details["copy_bandwidth_bytes_per_s"] = value
            elif kind == "stages":
                details["stages_ms"][value[0]] = value[1]
            else:
                result.failures[f"stages, {value[0]}"] = value[1]
            yield
    except ChildError as error:
        result.failures["stages"] = str(error)
        yield


def _measured(details: dict[str, Any], cell: str) -> dict[str, Any] | None:
    """Figures of the first engine of ours or stock, else of any other, that has timed the cell."""
    for name in KEYS:
        figures = details["engines"].get(name, {}).get("cells", {}).get(cell)
        if figures and "step_ms" in figures:
            return figures
    return None


CELL = report.Column("cell", "requests x context")
PAGES_READ = report.Column("pages_read", "pages read", ".1%")
GAINS = {
    "What can be gained": (
        CELL,
        report.Column("weights_gb", "weights, GB", ".2f"),
        report.Column("full_gb", "KV of full layers, GB", ".2f"),
        report.Column("others_gb", "other layers, GB", ".2f"),
        report.Column("full_share", "share of full layers", ".1%"),
        report.Column("limit_ratio", "limits, times stock", ".2f"),
        report.Column("ratio", "measured, times stock", ".2f"),
    ),
}
"""Of a shape with layers of other kinds, which read the same under every budget."""
LIMITS = (
    report.Column("stock_limit", "byte limit dense, ms", ".2f"),
    report.Column("sparse_limit", "byte limit sparse, ms", ".2f"),
)
STAGES = {
    "Stages of the specontext step, ms": (
        CELL,
        report.Column("head", "head: q, k, fused aux", ".3f"),
        report.Column("scoring", "scoring", ".3f"),
        report.Column("selection", "selection, page table", ".3f"),
        report.Column("attention", "attention, all layers", ".3f"),
        report.Column("rest", "rest of the step", ".3f"),
    ),
}


def make_rows(
    shape: Shape, cells: Sequence[Cell], details: dict[str, Any], budget: int
) -> list[dict[str, Any]]:
    """The table from what the children have reported so far; absent figures stay out."""
    return [_make_row(shape, cell, details, budget) for cell in cells]


def _make_row(shape: Shape, cell: Cell, details: dict[str, Any], budget: int) -> dict[str, Any]:
    by_engine = {
        name: details["engines"].get(name, {}).get("cells", {}).get(cell.name) for name in KEYS
    }
    known = _measured(details, cell.name)
    requests = known["requests"] if known else cell.requests
    row: dict[str, Any] = {"cell": cell.label(requests) if requests else cell.name}
    if known:
        row |= {"requests": known["requests"], "context": known["context_tokens"]}
    for name, key in KEYS.items():
        if figures := by_engine[name]:
            row |= _engine_columns(key, figures)
    times = {key: row[key] for key in KEYS.values() if isinstance(row.get(key), float)}
    for ratio, engine in (("ratio", "sparse"), ("quest_ratio", "quest")):
        if "stock" in times and engine in times:
            row[ratio] = times["stock"] / times[engine]
    if "hf_eager" in times and "sparse" in times:
        row["eager_ratio"] = times["hf_eager"] / times["sparse"]
    stats = (by_engine["specontext"] or {}).get("stats")
    if stats and stats["pages_total"]:
        row["pages_read"] = stats["pages_read"] / stats["pages_total"]
    bandwidth = details.get("copy_bandwidth_bytes_per_s")
    if known:
        row |= _limits(shape, known, details, budget, bandwidth)
        if bandwidth and "sparse" in times:
            row["over_limit"] = times["sparse"] / row["sparse_limit"]
    if stages := details["stages_ms"].get(cell.name):
        row |= stages
        if "sparse" in times:
            row["rest"] = times["sparse"] - sum(stages.values())
    return row


def _limits(
    shape: Shape,
    known: dict[str, Any],
    details: dict[str, Any],
    budget: int,
    bandwidth: float | None,
) -> dict[str, float]:
    requests, context = known["requests"], known["context_tokens"]
    head_format, groups = details.get("head_format", "eagle3"), details.get("head_groups", 1)
    dense = shape.dense_step_bytes(requests, context)
    sparse = shape.sparse_step_bytes(requests, context, budget, head_format, groups=groups)
    limits = {"limit_ratio": dense / sparse}
    if bandwidth:
        # Each worker reads its share.
        together = bandwidth * details.get("workers", 1)
        limits |= {"stock_limit": 1e3 * dense / together, "sparse_limit": 1e3 * sparse / together}
    full = requests * context * shape.kv_bytes_per_token
    return limits | {
        "weights_gb": shape.weight_bytes / 1e9,
        "full_gb": full / 1e9,
        "others_gb": requests * shape.other_layers_bytes(context) / 1e9,
        "full_share": full / dense,
    }


def _engine_columns(key: str, figures: dict[str, Any]) -> dict[str, Any]:
    if "out_of_memory" in figures:
        return {key: OUT_OF_MEMORY}
    step = figures["step_ms"]
    columns = {key: step["median"], f"{key}_spread": f"{step['p10']:.2f} to {step['p90']:.2f}"}
    # What the prefix cache holds is not prefilled again.
    if "prefill_s" in figures and not figures.get("cached_tokens"):
        columns[f"{key}_prefill"] = figures["prefill_s"]
    return columns


WORKERS_NOTE = (
    "With several workers the byte limit takes all bytes to be shared out over them, and counts "
    "nothing that they send to each other. Pages read: the first worker's."
)
LIMIT_NOTE = (
    "Byte limit: bytes a step must read (weights; KV of the whole context, or of the budget with "
    "the head's weights and keys; in layers of other kinds windows and states) "
    "over the measured copy bandwidth. Stages are timed apart from the engine; rest = step - "
    "stages."
)


def bandwidth_notes(details: dict[str, Any]) -> list[str]:
    """The copy bandwidth, once it is measured."""
    bandwidth = details.get("copy_bandwidth_bytes_per_s")
    return (
        [f"Copy bandwidth of this device, bytes read + written: {bandwidth / 1e9:,.0f} GB/s."]
        if bandwidth
        else []
    )


def run_notes(details: dict[str, Any]) -> list[str]:
    """Which run measured which engine, where several have."""
    measured = [
        (figures["run"], name)
        for name, engine in sorted(details["engines"].items())
        for figures in engine["cells"].values()
    ]
    return report.run_notes((details["runs"][date], name) for date, name in measured)
