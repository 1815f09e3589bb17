"""`specontext plan`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer
from rich.console import Console

from specontext_vllm.cli.refusals import check_range, refusals
from specontext_vllm.config import ConfigError, Mode, SpeContextConfig
from specontext_vllm.extras import require_extra
from specontext_vllm.residency.memory_model import MemoryModelError

MAX_GIB, MAX_REQUESTS, MAX_GBPS = 1e6, 10**6, 1e6
"""More than anybody has: figures beyond are typing errors, and would overflow."""


def plan(
    model: Annotated[Path, typer.Option(help="Folder of the model, or its config.json.")],
    gpu_gib: Annotated[float, typer.Option(help="Memory of one GPU.")],
    host_gib: Annotated[float, typer.Option(help="Host memory to give to KV (host_kv_gib).")] = 0,
    budget: Annotated[int, typer.Option(help="Tokens a KV head reads in a step.")] = 2048,
    requests: Annotated[
        int,
        typer.Option(
            help="vLLM's --max-num-seqs; as many as run at once are the load of the tables."
        ),
    ] = 16,
    length: Annotated[
        int | None, typer.Option(help="Longest context (--max-model-len); default the model's own.")
    ] = None,
    kv_cache_dtype: Annotated[
        Literal["auto", "fp8"],
        typer.Option(help="vLLM's: the model's own, or 8-bit floats."),
    ] = "auto",
    enable_prefix_caching: Annotated[
        bool,
        typer.Option(help="vLLM's: with it requests keep two states or three of a layer."),
    ] = True,
    miss_rate: Annotated[
        float | None,
        typer.Option(
            help="Share of the budget's pages fetched a step, 0 to 1; default as measured on the "
            "demo model."
        ),
    ] = None,
    link_gbps: Annotated[float, typer.Option(help="PCIe link, GB/s, at 8 KiB rows.")] = 49,
    mode: Annotated[
        Mode,
        typer.Option(
            help="The setting of this name; lossless: also from which length it pays, at which "
            "acceptance."
        ),
    ] = "sparse",
    drafter: Annotated[
        Path | None,
        typer.Option(
            help="Folder of the draft model of --speculative-config: its weights and KV are "
            "counted."
        ),
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="Draw a picture as well: a file that ends in .png.")
    ] = None,
) -> None:
    """Show what fits where with two tiers, when layers are offloaded, and the step time that
    follows; see docs/how-it-works/memory-model.md.

    Exit code 2: it does not fit, or an option cannot be used, with a sentence that says why.
    """
    from specontext_vllm import draft_plan, plan_report, planning

    with refusals(ConfigError, MemoryModelError):
        check_range("--gpu-gib", gpu_gib, 0, MAX_GIB)
        check_range("--host-gib", host_gib, 0, MAX_GIB)
        check_range("--requests", requests, 1, MAX_REQUESTS)
        check_range("--miss-rate", miss_rate, 0, 1)
        check_range("--link-gbps", link_gbps, 0.1, MAX_GBPS)
        if out is not None:
            require_extra("matplotlib", "plan", "--out")
        shape = planning.read_model(model, kv_cache_dtype, enable_prefix_caching)
        made = planning.make_plan(
            shape,
            SpeContextConfig.from_settings({"budget": budget, "mode": mode}),
            gpu_bytes=int(gpu_gib * 2**30),
            host_bytes=int(host_gib * 2**30),
            requests=requests,
            max_model_len=shape.max_model_len if length is None else length,
            miss_rate=miss_rate,
            link_bytes_per_s=1e9 * link_gbps,
            drafter=None if drafter is None else draft_plan.read_drafter(drafter),
        )
        if out is not None:
            plan_report.draw(made, out)
    tables = [plan_report.memory_table(made)]
    if made.lossless is None:
        tables += [plan_report.thresholds_table(made), plan_report.lengths_table(made)]
    else:
        tables.append(plan_report.lossless_table(made))
    console = Console()
    # Wide enough for the tables; a narrower terminal wraps their lines.
    console.width = max(
        console.width,
        *(
            console.measure(table, options=console.options.update_width(1000)).maximum
            for table in tables
        ),
    )
    for table in tables:
        console.print(table)
    if out is not None:
        console.print(f"Picture: {out}", markup=False, highlight=False, soft_wrap=True)
