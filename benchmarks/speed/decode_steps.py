"""Part `steps`: decode steps at many requests and contexts."""

from __future__ import annotations

from dataclasses import replace
from typing import Annotated, Any

import typer

from benchmarks import report
from benchmarks import steps as stepping
from benchmarks.engines import EngineSpec
from benchmarks.hugging_face import MAX_STEPS
from benchmarks.kv_cache import KVCacheDtype, KVGib, kv_bytes, kv_suffix, kv_title
from benchmarks.machine import gpus
from benchmarks.picture import draw_steps
from benchmarks.shapes import HeadFormat, Shape
from benchmarks.speed.options import (
    MAX_REQUESTS,
    Budget,
    Engines,
    EngineSeconds,
    Out,
    Timed,
    Work,
    end,
    refusing,
    work_folder,
)
from benchmarks.workers import (
    Workers,
    refuse_workers,
    workers_suffix,
    workers_title,
)

CELLS = "1x1k,6x1k,24x1k,1x8k,6x8k,24x8k,1x32k,6x32k,24x32k,1x128k,6x128k"
TABLES = {
    "Step time, ms": (
        stepping.CELL,
        report.Column("hf_eager", "HF eager", ".2f"),
        report.Column("hf_sdpa", "HF SDPA", ".2f"),
        report.Column("stock", "stock", ".2f"),
        report.Column("quest", "quest", ".2f"),
        report.Column("sparse", "specontext", ".2f"),
        report.Column("stock_limit", "byte limit dense", ".2f"),
        report.Column("sparse_limit", "byte limit sparse", ".2f"),
        report.Column("ratio", "times stock", ".2f"),
        report.Column("quest_ratio", "quest, times stock", ".2f"),
        report.Column("eager_ratio", "times HF eager", ".2f"),
        report.Column("over_limit", "times the byte limit", ".2f"),
        stepping.PAGES_READ,
    ),
    "Spread": (
        stepping.CELL,
        *(
            report.Column(f"{key}_spread", f"{name}, p10 to p90, ms")
            for name, key in stepping.KEYS.items()
        ),
        *(
            report.Column(f"{key}_prefill", f"{name}, prefill, s", ".2f")
            for name, key in stepping.KEYS.items()
        ),
    ),
}


def steps(
    cells: Annotated[
        str,
        typer.Option(
            help="Comma-separated REQUESTSxTOKENS; `fit` requests: as many as the KV room holds."
        ),
    ] = CELLS,
    model_shape: Annotated[
        str,
        typer.Option(
            help="70b, 8b, 1b, demo or tiny; or, with layers of other kinds, gpt-oss-20b, "
            "qwen3.5-9b, tiny-gpt-oss or tiny-qwen3.5. 70b and these join the result's "
            "name. The weights are random."
        ),
    ] = "8b",
    budget: Budget = 2048,
    timed: Timed = 128,
    engines: Engines = ",".join(stepping.KEYS),
    max_num_seqs: Annotated[
        int, typer.Option(help="vLLM's; `fit` never exceeds it.")
    ] = MAX_REQUESTS,
    head_format: Annotated[
        HeadFormat,
        typer.Option(help="Whose size the head of random weights has; joins the result's name."),
    ] = "eagle3",
    head_groups: Annotated[
        int,
        typer.Option(
            help="With --head-format specontext: groups of layers that it selects for; joins the "
            "result's name.",
            min=1,
        ),
    ] = 1,
    kv_cache_dtype: KVCacheDtype = "auto",
    kv_gib: KVGib = None,
    workers: Workers = 1,
    engine_seconds: EngineSeconds = 280,
    out: Out = report.RESULTS,
    work: Work = None,
) -> None:
    """Decode steps at many requests and contexts: stock vLLM, specontext, quest, Hugging Face, and
    the byte limit.
    """

    def prepare() -> tuple[Any, ...]:
        shape = replace(Shape.named(model_shape), kv_element_bytes=kv_bytes(kv_cache_dtype))
        # Shortest first: a longer context then finds the shorter one in the prefix cache.
        ordered = sorted(
            stepping.parse_cells(cells, shape, max_num_seqs),
            key=lambda cell: (cell.tokens, -(cell.requests or max_num_seqs)),
        )
        details = {
            "shape": {"name": shape.name, **shape.config},
            "budget": budget,
            "head_format": head_format,
            "head_groups": head_groups,
            "kv_cache_dtype": kv_cache_dtype,
            "workers": workers,
            "engines": {},
            "stages_ms": {},
            "cells": [],
        }
        title = f"Decode steps, {model_shape} shape, random weights, budget {budget} tokens"
        title += kv_title(kv_cache_dtype) + workers_title(workers)
        case = "speed-steps" + shape.suffix
        if head_format == "specontext":
            case += "-own_head"
        if head_groups > 1:
            if head_format == "eagle3":
                raise ValueError(
                    f"--head-groups: found {head_groups}, but a head of EAGLE-3's format has one; "
                    "give --head-format specontext."
                )
            case += f"-groups_{head_groups}"
        case += kv_suffix(kv_cache_dtype) + workers_suffix(workers)
        refuse_workers(workers)
        chosen = stepping.chosen_engines("--engines", engines, tuple(stepping.KEYS))
        stepping.refuse_hugging_face(shape, chosen, workers)
        tables = TABLES | (stepping.GAINS if shape.is_mixed else stepping.STAGES)
        result = report.Report(case, title, tables, details=details)
        result.take_over(out, ("shape", "budget"))
        return shape, ordered, chosen, result

    shape, ordered, chosen, result = refusing(prepare)
    folder, on_gpu = work_folder(work), bool(gpus())
    model = str(shape.write(folder / "model"))
    head = None
    if head_format == "specontext":
        head = str(refusing(lambda: shape.write_head(folder / "head", head_groups)))
    details = result.details
    details["cells"] += [cell.name for cell in ordered if cell.name not in details["cells"]]
    every = stepping.parse_cells(",".join(details["cells"]), shape, MAX_REQUESTS + max_num_seqs)
    every.sort(key=lambda cell: (cell.tokens, cell.requests or max_num_seqs))
    notes = [
        f"Steady state: all requests decode; median over {timed} steps (Hugging Face: "
        f"{min(timed, MAX_STEPS)}) after the last prefill. "
        "Each engine in a process of its own, one after the other. vLLM's with prefix caching, "
        "chunked prefill and async scheduling as "
        "vLLM sets them"
        + (
            " and CUDA graphs."
            if on_gpu
            else "; on this CPU eagerly, so the times show nothing but that it runs."
        ),
        "Hugging Face: transformers' model alone with a DynamicCache, as `generate` runs it: one "
        "prefill over all prompts, then step by "
        f'step. "{stepping.OUT_OF_MEMORY}": that prefill, or the KV cache, does not fit this '
        "device. A prefill time is given where no "
        "prompt began as one before it.",
        stepping.LIMIT_NOTE,
        *([stepping.WORKERS_NOTE] if workers > 1 else []),
        *([shape.note] if shape.note else []),
    ]

    def save() -> None:
        result.rows = stepping.make_rows(shape, every, details, budget)
        result.notes = [*notes, *stepping.bandwidth_notes(details), *stepping.run_notes(details)]
        result.write(out)

    for name in chosen:
        spec = EngineSpec(
            name,
            model,
            on_gpu,
            budget,
            max_num_seqs,
            timed,
            shared_prompts=True,
            head=head,
            additional=stepping.additional_config(shape),
            kv_cache_dtype=kv_cache_dtype,
            kv_gib=kv_gib,
            workers=workers,
        )
        for _ in stepping.run_into(
            result, spec, ordered, log=folder / f"{name}.log", seconds=engine_seconds
        ):
            save()
    if "specontext" in chosen:
        # The stages are those of an EAGLE-3 head, of layers of full attention alone, of KV in 16
        # bits, and of one worker.
        is_staged = (
            head is None and not shape.is_mixed and kv_cache_dtype == "auto" and workers == 1
        )
        staged = ordered if is_staged else []
        for _ in stepping.probe_into(result, shape, staged, log=folder / "stages.log"):
            save()
    picture = out / f"{result.stem}.png"
    if any("context" in row for row in result.rows):  # something was timed
        draw_steps(result.rows, result.title, picture)
    end(result, out)
