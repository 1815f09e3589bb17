"""What the GPU does during a few decode steps, from the profiler; and a picture of one of them."""

from __future__ import annotations

import json
import tempfile
from collections import defaultdict
from pathlib import Path
from typing import Annotated, Any

import typer

KINDS = {
    "_fetch_pages": "prefetch (copy stream)",
    "flash": "attention",
    "_score_pages": "scoring, selection, tables",
    "_select_pages": "scoring, selection, tables",
    "_resolve_pages": "scoring, selection, tables",
    "_layer_tables": "scoring, selection, tables",
    "_write_tiered": "K and V write",
    "gemm": "matrix products",
    "nvjet": "matrix products",
    "gemv": "matrix products",
    "cublas": "matrix products",
    "cutlass": "matrix products",
}
"""What a kernel is, by a part of its name; the first match counts."""


def start_profiler(worker: Any) -> None:
    """Record the kernels of a worker from now on."""
    import torch

    worker.profiler = torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA])
    worker.profiler.start()


def stop_profiler(worker: Any) -> list[tuple[str, int, float, float]]:
    """``(name, stream, start, duration)`` of each kernel since ``start_profiler``, microseconds
    from the first one.
    """
    import torch

    torch.cuda.synchronize()
    profiler = worker.__dict__.pop("profiler")
    profiler.stop()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(path))
        events = [
            e for e in json.loads(path.read_text())["traceEvents"] if e.get("cat") == "kernel"
        ]
    begin = min((e["ts"] for e in events), default=0)
    return sorted(
        (
            (
                e["name"][:60],
                int(e["args"]["stream"]),
                round(e["ts"] - begin, 2),
                round(e["dur"], 2),
            )
            for e in events
        ),
        key=lambda e: e[2],
    )


def kind_of(name: str) -> str:
    """What the kernel does."""
    return next(
        (kind for part, kind in KINDS.items() if part in name),
        "norms, activations, sampling and the rest",
    )


def one_step(kernels: list[Any]) -> list[tuple[str, int, float, float]]:
    """The kernels from one selection to the next, one whole decode step; their times count from its
    begin.

    Raises:
        ValueError: there are not two selections.
    """
    begins = [start for name, _, start, _ in kernels if "_select_pages" in name]
    if len(begins) < 2:
        raise ValueError("the recorded kernels hold no whole step (fewer than two selections).")
    # The step in the middle; the first one may carry the profiler's own start.
    middle = len(begins) // 2
    first, last = begins[middle - 1], begins[middle]
    return [
        (name, stream, round(start - first, 2), duration)
        for name, stream, start, duration in kernels
        if first <= start < last
    ]


def spans(step: list[Any]) -> list[tuple[str, float, float]]:
    """``(kind, begin, end)`` of a step's kernels, microseconds."""
    return [(kind_of(name), start, start + duration) for name, _, start, duration in step]


def overlap(step: list[tuple[str, float, float]]) -> dict[str, float]:
    """Microseconds of the step, of the copy stream's work, and of that part of it during which
    other kernels ran too.
    """
    copies = [(a, b) for kind, a, b in step if kind.startswith("prefetch")]
    others = sorted((a, b) for kind, a, b in step if not kind.startswith("prefetch"))
    shared = sum(max(0.0, min(b, d) - max(a, c)) for a, b in copies for c, d in others)
    return {
        "step_us": max(b for _, _, b in step),
        "copies_us": sum(b - a for a, b in copies),
        "beside_compute_us": shared,
    }


def main(
    result: Annotated[
        Path,
        typer.Argument(
            help="Result file that holds a timeline, such as benchmarks/results/capacity-h200.json."
        ),
    ],
    engine: Annotated[str, typer.Option(help="Engine in it; the last one if not given.")] = "",
    out: Annotated[Path, typer.Option(help="Picture to write.")] = Path("docs/images/timeline.png"),
) -> None:
    """Draw one recorded decode step: what ran on the GPU beside the copies."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    content = json.loads(result.read_text())
    timelines = content["details"].get("timeline") or {}
    if not timelines or (engine and engine not in timelines):
        raise typer.BadParameter(
            f"{result}: holds no timeline of {engine or 'any engine'}, but of {list(timelines)}; "
            "run the case on a GPU."
        )
    for name, kernels in timelines.items():
        by_kind: dict[str, float] = defaultdict(float)
        for kind, begin, end in spans(kernels):
            by_kind[kind] += end - begin
        longest_first = sorted(by_kind.items(), key=lambda item: -item[1])
        print(
            f"{name}: {overlap(spans(kernels))}; us by kind: "
            f"{ {kind: round(us) for kind, us in longest_first} }"
        )
    engine = engine or list(timelines)[-1]
    step = spans(timelines[engine])
    kinds = sorted({kind for kind, _, _ in step}, key=lambda k: (not k.startswith("prefetch"), k))
    colors = dict(zip(kinds, pyplot.get_cmap("tab10").colors, strict=False))
    end = max(b for _, _, b in step)
    figure, axes = pyplot.subplots(
        2, 1, figsize=(14, 2 + 0.9 * len(kinds)), constrained_layout=True
    )
    for axis, (left, right) in zip(axes, ((0, end), (0.45 * end, 0.55 * end)), strict=True):
        for row, kind in enumerate(kinds):
            bars = [
                (a / 1e3, (b - a) / 1e3)
                for k, a, b in step
                if k == kind and b >= left and a <= right
            ]
            axis.broken_barh(bars, (row - 0.4, 0.8), color=colors[kind])
        axis.set_yticks(range(len(kinds)), kinds)
        axis.invert_yaxis()
        axis.set_xlim(left / 1e3, right / 1e3)
        axis.set_xlabel("ms from the selection of the step")
    figure.suptitle(
        f"One decode step, {engine}. {content['title']} ({content['machine']['gpus'][0]['name']}, "
        f"{content['date']})",
        fontsize=10,
    )
    out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out, dpi=110)
    print(out)
