"""Pictures: what is missed over the budget."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

# Okabe and Ito's colours, which colour-blind readers tell apart; markers and dashes say the same.
COLORS = ("#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#56B4E9")
MARKERS = ("o", "s", "^", "v", "D", "P")
DASHES = ("-", "--", ":", "-.")


def draw(rows: Sequence[dict[str, Any]], title: str, path: Path) -> bool:
    """Write the picture, a panel for each kind of text and chooser, a line for each setting of the
    buffers; False where there is no line to draw.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib.figure import Figure

    panels = list(dict.fromkeys((row["kind"], row["by"]) for row in rows))
    if len({row["budget"] for row in rows}) < 2:
        return False
    slots = sorted({row["slots"] for row in rows})
    stickiness = sorted({row["stickiness"] for row in rows})
    figure = Figure(figsize=(4.4 * len(panels), 3.6), layout="constrained")
    axes = figure.subplots(1, len(panels), squeeze=False, sharey=True)[0]
    for axis, panel in zip(axes, panels, strict=True):
        for number, sticky in enumerate(stickiness):
            for dashes, size in zip(DASHES, slots):
                line = sorted(
                    (row["budget"], 100 * row["share"])
                    for row in rows
                    if (row["kind"], row["by"]) == panel
                    and (row["stickiness"], row["slots"]) == (sticky, size)
                )
                if line:
                    axis.plot(
                        *zip(*line),
                        color=COLORS[number % len(COLORS)],
                        marker=MARKERS[number % len(MARKERS)],
                        linestyle=dashes,
                        markersize=4,
                        label=f"stickiness {sticky:g}, {size:g}x slots",
                    )
        axis.set_xscale("log", base=2)
        budgets = sorted({row["budget"] for row in rows})
        axis.set_xticks(budgets, [f"{budget:,}" for budget in budgets])
        axis.set_title(f"{panel[0]}, {panel[1]}", fontsize=10)
        axis.set_xlabel("budget, tokens per KV head", fontsize=9)
        axis.tick_params(labelsize=8)
        axis.grid(alpha=0.25)
        axis.set_ylim(bottom=0)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].set_ylabel("missed a step, % of the budget", fontsize=9)
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3, frameon=False, fontsize=8)
    figure.suptitle(title, fontsize=10)
    figure.savefig(path, dpi=120, bbox_inches="tight")
    return True
