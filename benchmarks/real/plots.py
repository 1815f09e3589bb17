"""Pictures: differences to dense over the budget."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.panels import MARKS, add_legend, budget_ticks, make_panels, name_panel
from benchmarks.real.settings import DENSE


def draw(lines: Sequence[dict[str, Any]], stem: Path, model: str) -> Path | None:
    """Write the picture, if there is something to draw.

    Args:
        lines: of ``figures.figures``; tasks that dense cannot do are left out.
        stem: path whose name the picture's begins with.
        model: its name, for the title.
    """
    import matplotlib

    matplotlib.use("Agg")
    drawn = [
        line
        for line in lines
        if line["difference"] is not None and line["variant"] != DENSE and not line["says_nothing"]
    ]
    panels = list(dict.fromkeys((line["context"], line["task"]) for line in drawn))
    if not panels:
        return None
    figure, axes = make_panels(len(panels), 3.4, 2.7)
    variants = list(dict.fromkeys(line["variant"] for line in drawn))
    for axis, (context, task) in zip(axes, panels):
        here = [line for line in drawn if (line["context"], line["task"]) == (context, task)]
        unit = "score" if here[0]["kind"] in ("right", "share") else "log-prob. a token"
        name_panel(
            axis,
            f"{task.replace('_', ' ')}, {context:,} tokens",
            "budget, tokens per KV head",
            f"{unit}, less dense's",
        )
        axis.axhline(0, color="black", linestyle="--", linewidth=1, label="dense")
        for place, variant in enumerate(variants):
            mine = sorted(
                (line for line in here if line["variant"] == variant),
                key=lambda line: line["budget"],
            )
            colour, marker = MARKS[place % len(MARKS)]
            low, high = (
                [abs(line["difference"] - line[f"difference_{end}"]) for line in mine]
                for end in ("low", "high")
            )
            # Side by side, so that equal values can be told apart.
            shift = 1.04 ** (place - len(variants) / 2)
            axis.errorbar(
                [line["budget"] * shift for line in mine],
                [line["difference"] for line in mine],
                yerr=[low, high],
                color=colour,
                marker=marker,
                markersize=4,
                linewidth=1.4,
                capsize=2,
                elinewidth=0.7,
                label=variant,
            )
        budget_ticks(axis, sorted({line["budget"] for line in here}))
    add_legend(figure, axes)
    figure.suptitle(f"{model}: differences to dense, bars are 95 % intervals", fontsize=12)
    path = stem.with_name(f"{stem.name}-budget.png")
    figure.savefig(path, dpi=120, bbox_inches="tight")
    return path
