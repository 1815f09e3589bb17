"""Case `link`: the fetch kernel on the PCIe link, alone and beside the matrix products of decode
steps.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any

import typer

from benchmarks import report
from benchmarks.children import ENGINE_ENV, ChildError, run_child
from benchmarks.shapes import Shape

PAGES = 16384
PRODUCT_LAYERS = 16
TABLES = {
    "Fetch kernel": (
        report.Column("programs", "programs"),
        report.Column("tile", "KiB in flight each"),
        report.Column("alone", "alone, GB/s", ".1f"),
        report.Column("beside", "beside matrix products, GB/s", ".1f"),
        report.Column("cost", "matrix products slower by, share of the copying time", ".1%"),
    )
}


def measure(shape: Shape, rows: int, settings: list[tuple[int, int]]) -> Iterator[tuple[str, Any]]:
    """Event ``("row", figures)`` per ``(programs, KiB)``; runs in a child.

    Random head pages out of 4 GiB of pinned memory. Products and copies run in one captured graph,
    on two streams, as in an engine; the graph notes by the GPU's clock when either was done.
    """
    import torch

    from benchmarks.gpu_clock import stamp
    from benchmarks.stages import timed
    from specontext_vllm.residency.host_pool import HostPool
    from specontext_vllm.step_data import Misses
    from specontext_vllm.triton_kernels.fetch_pages import fetch_pages

    device = torch.device("cuda")
    heads, words, hidden, inner = (
        shape.num_key_value_heads,
        16 * shape.head_dim,
        shape.hidden_size,
        shape.intermediate_size,
    )
    qkv = shape.head_dim * (shape.num_attention_heads + 2 * heads)
    pages = (4 << 30) // (4 * words)
    host = HostPool((pages, words), torch.int32, device).tensor
    arena = torch.empty(PAGES, words, dtype=torch.int32, device=device)
    sources = torch.randint(0, pages, (PAGES,), dtype=torch.int32, device=device)
    targets = torch.randperm(PAGES, device=device).int()
    places = torch.randperm(PAGES // heads, device=device).int()[None]
    count, resident = (torch.tensor([n], dtype=torch.int32, device=device) for n in (PAGES, 0))
    misses = Misses(sources, targets, count)
    widths = (
        (hidden, qkv),
        (shape.head_dim * shape.num_attention_heads, hidden),
        (hidden, 2 * inner),
        (inner, hidden),
    )
    inputs = [torch.randn(rows, wide, dtype=torch.bfloat16, device=device) for wide, _ in widths]
    weights = [
        [torch.randn(out, wide, dtype=torch.bfloat16, device=device) for wide, out in widths]
        for _ in range(PRODUCT_LAYERS)
    ]
    times = torch.zeros(3, dtype=torch.int64, device=device)
    side = torch.cuda.Stream()

    def products() -> None:
        for layer in weights:
            for x, weight in zip(inputs, layer, strict=True):
                torch.nn.functional.linear(x, weight)

    def run(copy: Callable[[], None] | None, layers: int) -> tuple[float, float]:
        """Milliseconds until the products and until the copies are done; the median of five."""
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            stamp(times, 0)
            if copy is not None:
                side.wait_stream(torch.cuda.current_stream())
                with torch.cuda.stream(side):
                    copy()
                    stamp(times, 2)
            for _ in range(layers):
                products()
            stamp(times, 1)
            if copy is not None:
                torch.cuda.current_stream().wait_stream(side)
        taken = []
        for _ in range(5):
            graph.replay()
            begin, computed, copied = times.tolist()
            taken.append((1e-6 * (computed - begin), 1e-6 * (copied - begin)))
        return sorted(taken)[2]

    products()
    stamp(times, 0)
    torch.cuda.synchronize()
    for programs, kib in settings:

        def copy(_: int = 0, programs: int = programs, kib: int = kib) -> None:
            fetch_pages(
                host,
                arena,
                misses,
                places,
                resident,
                layers=range(1),
                first_source=0,
                layer_sources=0,
                num_kv_heads=heads,
                programs=programs,
                tile_bytes=1024 * kib,
            )

        alone = timed(copy, device, repeats=10)
        # Enough products to outlast the copies, which the products slow down.
        rounds = 1
        while run(None, rounds)[0] < 2 * alone:
            rounds += 1
        products_alone = run(None, rounds)[0]
        products_beside, beside = run(copy, rounds)
        yield (
            "row",
            {
                "programs": programs,
                "tile": kib,
                "alone": 1e-6 * arena.nbytes / alone,
                "beside": 1e-6 * arena.nbytes / beside,
                "cost": (products_beside - products_alone) / beside,
                "products_ms": products_alone,
            },
        )


def main(
    model_shape: Annotated[str, typer.Option(help="8b, 1b or demo.")] = "8b",
    rows: Annotated[int, typer.Option(help="Requests that decode.")] = 24,
    settings: Annotated[
        str, typer.Option(help="Comma-separated PROGRAMSxKIB.")
    ] = "4x32,4x64,6x32,6x64,8x16,8x32,8x64,12x32,16x8,16x16,32x8,64x8",
    out: Annotated[Path, typer.Option(help="Folder of the result files.")] = report.RESULTS,
) -> None:
    """What the fetch kernel's constants were chosen by; needs a GPU. Exit code 1 if anything
    failed.
    """
    shape = Shape.named(model_shape)
    wanted = [
        (int(programs), int(kib))
        for programs, kib in (pair.split("x") for pair in settings.split(","))
    ]
    result = report.Report(
        "link",
        f"The fetch kernel on the link, {model_shape} shape, head pages of {64 * shape.head_dim} "
        "bytes",
        TABLES,
    )
    result.notes.append(
        f"Random head pages out of 4 GiB of pinned memory; matrix products of {rows} decode rows; "
        "both in one captured graph, timed by the GPU's clock."
    )
    try:
        for _, row in run_child(
            measure,
            shape,
            rows,
            wanted,
            log=Path(tempfile.mkdtemp()) / "link.log",
            seconds=120,
            env=ENGINE_ENV,
        ):
            result.rows.append(row)
    except ChildError as error:
        result.failures["link"] = str(error)
    result.write(out)
    result.show()
    raise typer.Exit(1 if result.failures else 0)
