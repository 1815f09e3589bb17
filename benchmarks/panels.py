"""Pictures of several panels that share a legend."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

# Okabe and Ito's colours, which colour-blind readers tell apart; the markers say the same.
BLUE, ORANGE, GREEN, RED, PURPLE, SKY, BLACK = (
    "#0072B2",
    "#E69F00",
    "#009E73",
    "#D55E00",
    "#CC79A7",
    "#56B4E9",
    "#000000",
)
STYLES = {
    "dlm": (BLUE, "o"),
    "quest": (ORANGE, "s"),
    "oracle": (GREEN, "^"),
    "recent": (RED, "v"),
    "random": (PURPLE, "D"),
    "dense": (BLACK, "*"),
}
OTHER_STYLE = (SKY, "P")
MARKS = list(zip((BLUE, ORANGE, GREEN, RED, PURPLE, SKY), "os^vDP", strict=True))
"""Colour and marker of each curve in turn, where curves are no retrievers."""

PANELS_A_ROW = 3
MOST_IN_A_ROW = 7
"""Entries of a legend."""


def make_panels(count: int, width: float, height: float) -> tuple[Any, list[Any]]:
    """A figure with ``count`` panels, three in a row."""
    from matplotlib.figure import Figure

    columns = min(PANELS_A_ROW, count)
    rows = -(-count // columns)
    figure = Figure(figsize=(width * columns, height * rows), layout="constrained")
    axes = list(figure.subplots(rows, columns, squeeze=False).flat)
    for axis in axes[count:]:
        axis.set_axis_off()
    return figure, axes[:count]


def add_legend(figure: Any, axes: Sequence[Any]) -> None:
    """One legend for all panels, under them."""
    found: dict[str, Any] = {}
    for axis in axes:
        for handle, label in zip(*axis.get_legend_handles_labels()):
            found.setdefault(label, handle)
    figure.legend(
        found.values(),
        found.keys(),
        loc="outside lower center",
        ncols=min(len(found), MOST_IN_A_ROW),
        frameon=False,
    )


def name_panel(axis: Any, title: str, x: str, y: str) -> None:
    """Title, axes' labels and a grid."""
    axis.set_title(title, fontsize=10)
    axis.set_xlabel(x, fontsize=9)
    axis.set_ylabel(y, fontsize=9)
    axis.tick_params(labelsize=8)
    axis.grid(alpha=0.25)
    axis.spines[["top", "right"]].set_visible(False)


def budget_ticks(axis: Any, budgets: Sequence[int]) -> None:
    """Budgets on a logarithmic axis."""
    axis.set_xscale("log", base=2)
    axis.set_xticks(budgets, [f"{budget:,}" for budget in budgets], rotation=45)
    axis.minorticks_off()
