"""Case `link`: the fetch kernel on the PCIe link, alone and beside the matrix products of decode
steps.
"""

from __future__ import annotations

import multiprocessing
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Annotated, Any

import typer

from benchmarks import report
from benchmarks.children import ENGINE_ENV, ChildError, one_gpu, run_child
from benchmarks.machine import gpus
from benchmarks.marks.inputs import numbers
from benchmarks.shapes import Shape
from benchmarks.speed.options import refusing

PAGES = 16384
TOGETHER_S, TOGETHER_WAIT_S = 3.0, 100.0
"""How long several GPUs copy at once, and how long one waits for the others."""
PRODUCT_LAYERS = 16
TABLES = {
    "Fetch kernel": (
        report.Column("programs", "programs"),
        report.Column("tile", "KiB in flight each"),
        report.Column("alone", "alone, GB/s", ".1f"),
        report.Column("beside", "beside matrix products, GB/s", ".1f"),
        report.Column("cost", "matrix products slower by, share of the copying time", ".1%"),
    ),
    "Several GPUs at once": (
        report.Column("gpus", "GPUs"),
        report.Column("slowest", "the slowest, GB/s", ".1f"),
        report.Column("fastest", "the fastest, GB/s", ".1f"),
        report.Column("together", "together, GB/s", ".1f"),
    ),
}


class Copies:
    """Random head pages out of 4 GiB of pinned memory, to random places of an arena on the GPU."""

    def __init__(self, shape: Shape) -> None:
        import torch

        from specontext_vllm.residency.host_pool import HostPool
        from specontext_vllm.step_data import Misses

        device = torch.device("cuda")
        self.heads, words = shape.num_key_value_heads, 16 * shape.head_dim
        pages = (4 << 30) // (4 * words)
        self.host = HostPool((pages, words), torch.int32, device).tensor
        self.arena = torch.empty(PAGES, words, dtype=torch.int32, device=device)
        sources = torch.randint(0, pages, (PAGES,), dtype=torch.int32, device=device)
        targets = torch.randperm(PAGES, device=device).int()
        self.places = torch.randperm(PAGES // self.heads, device=device).int()[None]
        count, self.resident = (
            torch.tensor([n], dtype=torch.int32, device=device) for n in (PAGES, 0)
        )
        self.misses = Misses(sources, targets, count)

    def copy(self, programs: int, kib: int) -> None:
        """Fetch them all once, by so many programs with so much in flight each."""
        from specontext_vllm.triton_kernels.fetch_pages import fetch_pages

        fetch_pages(
            self.host,
            self.arena,
            self.misses,
            self.places,
            self.resident,
            layers=range(1),
            first_source=0,
            layer_sources=0,
            num_kv_heads=self.heads,
            programs=programs,
            tile_bytes=1024 * kib,
        )


def measure(shape: Shape, rows: int, settings: list[tuple[int, int]]) -> Iterator[tuple[str, Any]]:
    """Event ``("row", figures)`` per ``(programs, KiB)``; runs in a child.

    Products and copies run in one captured graph, on two streams, as in an engine; the graph notes
    by the GPU's clock when either was done.
    """
    import torch

    from benchmarks.gpu_clock import stamp
    from benchmarks.stages import timed

    device = torch.device("cuda")
    heads, hidden, inner = (
        shape.num_key_value_heads,
        shape.hidden_size,
        shape.intermediate_size,
    )
    qkv = shape.head_dim * (shape.num_attention_heads + 2 * heads)
    copies = Copies(shape)
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
            copies.copy(programs, kib)

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
                "alone": 1e-6 * copies.arena.nbytes / alone,
                "beside": 1e-6 * copies.arena.nbytes / beside,
                "cost": (products_beside - products_alone) / beside,
                "products_ms": products_alone,
            },
        )


def measure_together(shape: Shape, start: Any) -> Iterator[tuple[str, Any]]:
    """Event ``("rate", bytes a second)`` of a GPU while others copy too, with the fetch kernel's
    own numbers; runs in a child.

    Args:
        start: barrier of all of them.
    """
    import torch

    from specontext_vllm.triton_kernels.fetch_pages import PROGRAMS, TILE_BYTES

    setting = PROGRAMS, TILE_BYTES // 1024
    copies, ends = Copies(shape), list[float]()
    copies.copy(*setting)
    torch.cuda.synchronize()
    start.wait(TOGETHER_WAIT_S)
    begin = time.perf_counter()
    while not ends or ends[-1] < TOGETHER_S:
        for _ in range(4):
            copies.copy(*setting)
        torch.cuda.synchronize()
        ends.append(time.perf_counter() - begin)
    # The others began at the same time; the first and the last copies may have been alone.
    inner = [end for end in ends if 0.1 * TOGETHER_S < end < 0.9 * TOGETHER_S]
    copied = 4 * (len(inner) - 1) * copies.arena.nbytes
    yield "rate", copied / (inner[-1] - inner[0])


def fetch_together(shape: Shape, number: int) -> list[float]:
    """Bytes a second of each of the first ``number`` GPUs, which all copy at once.

    Raises:
        ChildError: one of them failed.
    """
    start = multiprocessing.get_context("spawn").Barrier(number)

    def run(gpu: int) -> float:
        log = Path(tempfile.mkdtemp()) / f"link-{gpu}.log"
        events = run_child(
            measure_together, shape, start, log=log, seconds=120, env=ENGINE_ENV | one_gpu(gpu)
        )
        return [value for _, value in events][0]

    with ThreadPoolExecutor(number) as pool:
        return list(pool.map(run, range(number)))


def main(
    model_shape: Annotated[str, typer.Option(help="8b, 1b or demo.")] = "8b",
    rows: Annotated[int, typer.Option(help="Requests that decode.")] = 24,
    settings: Annotated[
        str, typer.Option(help="Comma-separated PROGRAMSxKIB.")
    ] = "4x32,4x64,6x32,6x64,8x16,8x32,8x64,12x32,16x8,16x16,32x8,64x8",
    at_once: Annotated[
        str,
        typer.Option(
            help="Comma-separated numbers of GPUs that fetch at the same time, each in a process "
            "of its own; default none."
        ),
    ] = "",
    out: Annotated[Path, typer.Option(help="Folder of the result files.")] = report.RESULTS,
) -> None:
    """What the fetch kernel's constants were chosen by; needs a GPU. Exit code 1 if anything
    failed.
    """
    shape = Shape.named(model_shape)
    together = refusing(lambda: numbers("--at-once", at_once)) if at_once else []
    if together and max(together) > len(gpus()):
        raise typer.BadParameter(
            f"found {max(together)}, but this machine has {len(gpus())} GPU(s); give no more.",
            param_hint="--at-once",
        )
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
    for number in together:
        try:
            rates = [1e-9 * rate for rate in fetch_together(shape, number)]
        except ChildError as error:
            result.failures[f"{number} GPUs at once"] = str(error)
            continue
        result.rows.append(
            {
                "gpus": number,
                "slowest": min(rates),
                "fastest": max(rates),
                "together": sum(rates),
            }
        )
    result.write(out)
    result.show()
    raise typer.Exit(1 if result.failures else 0)
