"""The picture of the decode steps: milliseconds over the context by engine, with the byte limits as
lines.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from benchmarks.steps import KEYS

STYLES = {
    "hf_eager": ("Hugging Face eager", "#CC79A7", "v"),
    "hf_sdpa": ("Hugging Face SDPA", "#E69F00", "^"),
    "stock": ("stock vLLM", "#D55E00", "s"),
    "quest": ("quest, in our backend", "#56B4E9", "D"),
    "sparse": ("specontext", "#0072B2", "o"),
}
"""Label, colour (Okabe and Ito's palette, distinct to the colour-blind) and marker by column key;
marker and colour say the same.
"""

LIMITS = {
    "stock_limit": ("byte limit, dense", (0, (5, 2)), 1.0),
    "sparse_limit": ("byte limit, sparse", (0, (1, 1.5)), 0.5),
}
"""Label, dashes of a line and opacity of a mark by column key."""


def panels_of(rows: list[dict[str, Any]]) -> list[tuple[str, list[dict[str, Any]]]]:
    """One panel for each number of requests that has several contexts, else one for all rows; each
    with its title.
    """
    rows = [
        row | _parts(row["cell"])
        for row in rows
        if any(math.isfinite(_number(row, key)) for key in STYLES)
    ]
    by_requests: dict[int, list[dict[str, Any]]] = {}
    for row in rows:
        by_requests.setdefault(row["requests"], []).append(row)
    several = {
        requests: sorted(group, key=lambda row: row["context"])
        for requests, group in by_requests.items()
        if len(group) > 1
    }
    if not several:
        return [("", sorted(rows, key=lambda row: row["context"]))]
    return [
        (f"{requests} request{'s' * (requests > 1)}", group)
        for requests, group in sorted(several.items())
    ]


def draw_steps(
    rows: list[dict[str, Any]], title: str, out: Path, metadata: dict[str, str] | None = None
) -> None:
    """Write the picture (PNG) of the rows of a `decode` or `speed steps` result.

    Args:
        metadata: text kept in the file; see ``drawn_from``.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot
    from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

    panels = panels_of(rows)
    size = (max(7.5, 4.2 * len(panels)), 4.8)
    figure, axes = pyplot.subplots(
        1, len(panels), figsize=size, sharey=True, squeeze=False, constrained_layout=True
    )
    for axis, (name, group) in zip(axes[0], panels, strict=True):
        contexts = [row["context"] for row in group]
        for key, (label, dashes, alpha) in LIMITS.items():
            marks = {"linestyle": "none", "marker": "_", "markersize": 22, "alpha": alpha}
            style = {"linestyle": dashes, "linewidth": 1.3} if name else marks
            axis.plot(
                contexts,
                [_number(row, key) for row in group],
                color="#555555",
                label=label,
                **style,
            )
        for key in reversed(KEYS.values()):
            times = [_number(row, key) for row in group]
            if any(map(math.isfinite, times)):
                label, colour, marker = STYLES[key]
                # Points of different numbers of requests are no curve.
                axis.plot(
                    contexts,
                    times,
                    color=colour,
                    marker=marker,
                    markersize=7,
                    linewidth=2 if name else 0,
                    label=label,
                )
        if not name:
            _name_points(axis, group)
        axis.set(xscale="log", yscale="log", xlabel="context of each request, tokens", title=name)
        axis.xaxis.set_major_locator(FixedLocator(sorted(set(contexts))))
        axis.xaxis.set_minor_locator(NullLocator())
        axis.xaxis.set_major_formatter(
            FuncFormatter(lambda n, _: f"{n / 1024:g}k" if n >= 1024 else f"{n:g}")
        )
        axis.yaxis.set_major_locator(
            FixedLocator([1, 2, 3, 5, 10, 20, 30, 50, 100, 200, 300, 500, 1000])
        )
        axis.yaxis.set_minor_locator(NullLocator())
        axis.yaxis.set_major_formatter(FuncFormatter(lambda ms, _: f"{ms:g}"))
        axis.grid(color="#DDDDDD", linewidth=0.7)
        axis.set_axisbelow(True)
        axis.margins(x=0.12, y=0.12 if name else 0.2)
    axes[0][0].set_ylabel("decode step, ms")
    handles, labels = axes[0][0].get_legend_handles_labels()
    figure.legend(
        handles, labels, frameon=False, fontsize=9, loc="outside lower center", ncols=len(labels)
    )
    figure.suptitle(title, fontsize=11)
    out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out, dpi=120, metadata=metadata)
    pyplot.close(figure)


def drawn_from(path: Path) -> str | None:
    """The `Source` that a picture keeps; None without one."""
    from PIL import Image

    if not path.exists():
        return None
    with Image.open(path) as picture:
        return picture.info.get("Source")


def _name_points(axis: Any, group: list[dict[str, Any]]) -> None:
    """Write the number of requests, and how much faster specontext is, above the points of each
    context.
    """
    for row in group:
        ratio = f"\n{row['ratio']:.2f}x" if "ratio" in row else ""
        highest = max(time for key in STYLES if math.isfinite(time := _number(row, key)))
        axis.annotate(
            f"{row['requests']} request{'s' * (row['requests'] > 1)}{ratio}",
            (row["context"], highest),
            xytext=(0, 9),
            textcoords="offset points",
            ha="center",
            fontsize=9,
            color="#333333",
        )


def _parts(cell: str) -> dict[str, int]:
    """Requests and context of a row's label, `24 x 32k`."""
    requests, tokens = cell.split(" x ")
    return {
        "requests": int(requests),
        "context": int(tokens.rstrip("k")) * (1024 if tokens.endswith("k") else 1),
    }


def _number(row: dict[str, Any], key: str) -> float:
    value = row.get(key)
    return value if isinstance(value, float) else math.nan
