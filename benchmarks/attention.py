"""Case `attention`: decode attention over page tables, our kernel beside FlashAttention 3 on the
same tables.
"""

from __future__ import annotations

import statistics
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from benchmarks import report
from benchmarks.children import ENGINE_ENV, ChildError, run_child
from benchmarks.shapes import Shape
from benchmarks.stages import ROTATED_CACHES

if TYPE_CHECKING:
    import torch

LAUNCHES = 32
"""Of one captured graph: as many layers."""

MAX_SPLITS = 32
"""vLLM's own bound for FlashAttention 3 in a captured graph."""

TABLES = {
    "One layer": (
        report.Column("cell", "requests x tokens read by each KV head"),
        report.Column("ours", "ours, us", ".1f"),
        report.Column("flash", "FlashAttention 3, us", ".1f"),
        report.Column("ratio", "times faster", ".2f"),
        report.Column("rate", "ours, TB/s", ".2f"),
        report.Column("flash_rate", "FlashAttention 3, TB/s", ".2f"),
        report.Column("error", "difference, relative", ".1e"),
    )
}


class FlashAttention3:
    """Decode over page tables through ``vllm.vllm_flash_attn``: each KV head of a row is a sequence
    of one query token.
    """

    def __init__(self, table: Any, group: int, head_dim: int, page_size: int) -> None:
        import torch
        from vllm.v1.attention.backends.fa_utils import (
            flash_attn_varlen_func,
            get_scheduler_metadata,
        )

        self.sequences, self.group, self.d, self.page_size = (
            len(table.lengths),
            group,
            head_dim,
            page_size,
        )
        processors = torch.cuda.get_device_properties(0).multi_processor_count
        # Enough sequences fill the whole GPU, and FlashAttention needs no combining kernel.
        splits = 1 if self.sequences >= 0.8 * processors else MAX_SPLITS
        starts = torch.arange(self.sequences + 1, dtype=torch.int32, device=table.lengths.device)
        shared = {
            "max_seqlen_q": 1,
            "max_seqlen_k": table.max_pages * page_size,
            "causal": True,
            "num_splits": splits,
        }
        metadata = get_scheduler_metadata(
            batch_size=self.sequences,
            num_heads_q=group,
            num_heads_kv=1,
            headdim=head_dim,
            cache_seqlens=table.lengths,
            qkv_dtype=torch.bfloat16,
            cu_seqlens_q=starts,
            page_size=page_size,
            **shared,
        )
        self._attend = flash_attn_varlen_func
        self._arguments = shared | {
            "cu_seqlens_q": starts,
            "seqused_k": table.lengths,
            "block_table": table.pages,
            "fa_version": 3,
            "softmax_scale": head_dim**-0.5,
            "scheduler_metadata": metadata,
        }

    def __call__(self, query: torch.Tensor, kv_cache: torch.Tensor, output: torch.Tensor) -> None:
        # FA3 reads through TMA, which wants 16-byte strides even on the singleton head axis.
        d, shape = self.d, (kv_cache.shape[0] * kv_cache.shape[1], self.page_size, 1, self.d)
        strides = (self.page_size * 2 * d, 2 * d, 2 * d, 1)
        keys, values = (
            kv_cache.as_strided(shape, strides, kv_cache.storage_offset() + at) for at in (0, d)
        )
        by_sequence = (self.sequences, self.group, d)
        self._attend(
            query.view(by_sequence), keys, values, out=output.view(by_sequence), **self._arguments
        )


def measure(shape: Shape, cells: list[tuple[int, int]]) -> Iterator[tuple[str, Any]]:
    """Event ``("row", figures)`` per ``(requests, tokens)``; runs in a child."""
    import torch

    from specontext_vllm.attention.triton import TritonProvider
    from specontext_vllm.config import PAGE_SIZE, pages_for
    from specontext_vllm.step_data import PageTable

    device, dtype = torch.device("cuda"), torch.bfloat16
    heads, kv_heads, d = shape.num_attention_heads, shape.num_key_value_heads, shape.head_dim
    ours = TritonProvider(heads, kv_heads, d, d**-0.5, dtype)
    # No page is read twice in a launch, and consecutive launches read different caches.
    blocks = max(requests * pages_for(tokens) for requests, tokens in cells)
    caches = [
        torch.randn(blocks, kv_heads, PAGE_SIZE, 2 * d, dtype=dtype, device=device)
        for _ in range(ROTATED_CACHES)
    ]
    for requests, tokens in cells:
        pages = pages_for(tokens)
        table = PageTable.allocate(requests, kv_heads, pages, device)
        own = [
            torch.randperm(blocks, device=device)[: requests * pages]
            .view(requests, pages)
            .sort()
            .values
            for _ in range(kv_heads)
        ]
        table.pages.copy_(
            (torch.stack(own, 1) * kv_heads + torch.arange(kv_heads, device=device)[:, None]).view(
                -1, pages
            )
        )
        table.lengths.fill_(tokens)
        query = torch.randn(requests, heads, d, dtype=dtype, device=device)
        results = [torch.full_like(query, float("nan")) for _ in range(2)]
        flash = FlashAttention3(table, heads // kv_heads, d, PAGE_SIZE)

        def run_ours(
            i: int,
            table: Any = table,
            rows: int = requests,
            query: Any = query,
            out: Any = results[0],
        ) -> None:
            ours.decode(query, caches[i], table, rows, out)

        def run_flash(
            i: int, flash: Any = flash, query: Any = query, out: Any = results[1]
        ) -> None:
            flash(query, caches[i], out)

        times = [_graph_us(run) for run in (run_ours, run_flash)]
        mine, theirs = (result.float() for result in results)
        megabytes = 1e-6 * requests * kv_heads * tokens * 2 * d * dtype.itemsize
        yield (
            "row",
            {
                "cell": f"{requests} x {tokens}",
                "ours": times[0],
                "flash": times[1],
                "ratio": times[1] / times[0],
                "rate": megabytes / times[0],
                "flash_rate": megabytes / times[1],
                "error": float((mine - theirs).norm() / theirs.norm()),
            },
        )


def _graph_us(run: Callable[[int], None]) -> float:
    """Microseconds of ``run(i)``, captured ``LAUNCHES`` times in one graph: the median of five
    replays.
    """
    import torch

    run(0)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for i in range(LAUNCHES):
            run(i % ROTATED_CACHES)
    graph.replay()
    taken = []
    for _ in range(5):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize()
        taken.append(1e3 * begin.elapsed_time(end) / LAUNCHES)
    return statistics.median(taken)


def main(
    model_shape: Annotated[str, typer.Option(help="8b, 1b or demo.")] = "8b",
    cells: Annotated[
        str, typer.Option(help="Comma-separated REQUESTSxTOKENS that each KV head reads.")
    ] = (
        "1x2048,2x2048,4x2048,6x2048,12x2048,16x2048,20x2048,24x2048,28x2048,32x2048,40x2048,64x2048,24x1024,24x8192,6x32768,1x131072"
    ),
    out: Annotated[Path, typer.Option(help="Folder of the result files.")] = report.RESULTS,
) -> None:
    """Why decode has a kernel of its own; needs a GPU with FlashAttention 3. Exit code 1 if
    anything failed.
    """
    shape = Shape.named(model_shape)
    wanted = [
        (int(requests), int(tokens))
        for requests, tokens in (pair.split("x") for pair in cells.split(","))
    ]
    result = report.Report(
        "attention", f"Decode attention over page tables, {model_shape} shape, bfloat16", TABLES
    )
    result.notes.append(
        f"{LAUNCHES} launches in a captured graph, the gaps between them included, over "
        f"{ROTATED_CACHES} KV caches in turn. FlashAttention's schedule is "
        "made beforehand, which is what vLLM does once a step; it splits sequences as vLLM has it "
        "do."
    )
    try:
        for _, row in run_child(
            measure,
            shape,
            wanted,
            log=Path(tempfile.mkdtemp()) / "attention.log",
            seconds=150,
            env=ENGINE_ENV,
        ):
            result.rows.append(row)
    except ChildError as error:
        result.failures["attention"] = str(error)
    result.write(out)
    result.show()
    raise typer.Exit(1 if result.failures else 0)
