"""Case `memory`: what the memory model predicts for two tiers against what a worker's tensors
really take.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import typer

from benchmarks import report
from benchmarks.children import ChildError, run_child
from benchmarks.machine import gpus
from benchmarks.shapes import Shape

TABLES = {
    "Predicted and allocated": (
        report.Column("shape", "shape"),
        report.Column("tokens", "tokens that fit", ",d"),
        report.Column("mirrored", "mirrored layers"),
        report.Column("predicted", "GPU, predicted, MiB", ",.1f"),
        report.Column("allocated", "allocated, MiB", ",.1f"),
        report.Column("ratio", "allocated over predicted", ".4f"),
        report.Column("host_predicted", "host, predicted, MiB", ",.1f"),
        report.Column("host_allocated", "allocated, MiB", ",.1f"),
    )
}


def measure(
    shape: Shape,
    gpu_bytes: int,
    host_bytes: int,
    requests: int,
    length: int,
    budget: int,
    on_gpu: bool,
) -> Iterator[tuple[str, Any]]:
    """Event ``("row", figures)``: plan, allocate as a worker does, and ask the allocator; runs in a
    child.
    """
    import torch

    from specontext_vllm.config import SpeContextConfig, pages_for
    from specontext_vllm.float8 import FP8
    from specontext_vllm.residency.memory_model import KVShape, MemoryModel
    from specontext_vllm.residency.tiers import TieredKV
    from specontext_vllm.retrieval.cache import HeadCache

    device = torch.device("cuda" if on_gpu else "cpu")
    heads, d, hidden = shape.num_key_value_heads, shape.head_dim, shape.hidden_size
    kv = KVShape(
        shape.num_hidden_layers,
        heads,
        d,
        2,
        HeadCache.bytes_per_block(heads, d, hidden, torch.bfloat16, FP8),
    )
    width = SpeContextConfig(budget=budget).table_pages(length)
    model = MemoryModel(
        kv, budget_pages=width, table_pages=width, max_num_seqs=requests, max_model_len=length
    )
    plan = model.plan(gpu_bytes, host_bytes)
    before = torch.cuda.memory_allocated() if on_gpu else 0
    tiers = TieredKV(
        plan,
        num_layers=kv.num_layers,
        num_kv_heads=heads,
        head_dim=d,
        dtype=torch.bfloat16,
        max_requests=requests,
        max_rows=requests,
        table_pages=width,
        max_pages=pages_for(length),
        keep_unreferenced=True,
        timed=True,
        device=device,
    )
    cache = HeadCache.allocate(plan.num_pages, heads, d, hidden, torch.bfloat16, FP8, device)
    if on_gpu:
        allocated = torch.cuda.memory_allocated() - before
    else:
        held = [*tiers.device_tensors().values(), *vars(cache).values()]
        tensors = {t.data_ptr(): t for t in held if isinstance(t, torch.Tensor)}
        allocated = sum(t.nbytes for t in tensors.values())
    yield (
        "row",
        {
            "tokens": plan.num_pages * 16,
            "mirrored": f"{plan.host_layers} of {kv.num_layers}",
            "predicted": plan.gpu_bytes / 2**20,
            "allocated": allocated / 2**20,
            "ratio": allocated / plan.gpu_bytes,
            "host_predicted": plan.host_bytes / 2**20,
            "host_allocated": tiers.pools.host.nbytes / 2**20,
            "parts": plan.parts,
        },
    )


def main(
    shapes: Annotated[str, typer.Option(help="Comma-separated shapes.")] = "8b,1b,demo",
    gpu_gib: Annotated[float, typer.Option(help="Room for KV on the GPU.")] = 8,
    host_gib: Annotated[float, typer.Option(help="Host pool.")] = 8,
    requests: Annotated[int, typer.Option(help="vLLM's max_num_seqs.")] = 8,
    length: Annotated[int, typer.Option(help="Longest context.")] = 32768,
    budget: Annotated[int, typer.Option(help="Tokens a KV head may read in a step.")] = 2048,
    out: Annotated[Path, typer.Option(help="Folder of the result files.")] = report.RESULTS,
) -> None:
    """Predicted against allocated bytes of two tiers. Exit code 1 if anything failed or differs by
    more than 3 %.
    """
    on_gpu = bool(gpus())
    title = (
        f"Memory model against allocation, {gpu_gib:g} GiB on the GPU, {host_gib:g} GiB on the "
        f"host, {requests} requests"
    )
    result = report.Report("memory", title, TABLES)
    result.notes.append(
        "Allocated: torch's allocator before and after the tensors of the tiers and of the head's "
        "caches were made, as a worker makes them."
        if on_gpu
        else "Allocated: bytes of the tensors of the tiers and of the head's caches."
    )
    log = Path(tempfile.mkdtemp(prefix="specontext-bench-")) / "memory.log"
    for name in shapes.split(","):
        try:
            arguments = (
                Shape.named(name),
                int(gpu_gib * 2**30),
                int(host_gib * 2**30),
                requests,
                length,
                budget,
                on_gpu,
            )
            for _, row in run_child(measure, *arguments, log=log, seconds=120):
                result.rows.append({"shape": name, **row})
                if abs(row["ratio"] - 1) > 0.03:
                    result.failures[name] = (
                        f"allocated and predicted bytes differ by {abs(row['ratio'] - 1):.1%}."
                    )
        except ChildError as error:
            result.failures[name] = str(error)
        result.write(out)
    result.show()
    raise typer.Exit(1 if result.failures else 0)
