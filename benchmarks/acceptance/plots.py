"""Picture: accepted drafts over the number of drafts."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.panels import MARKS, add_legend, make_panels, name_panel


def draw(rows: Sequence[dict[str, Any]], lengths: Sequence[int], title: str, path: Path) -> Any:
    """Write the picture, a panel for each task and a line for each context, beside the line on
    which every draft is accepted; returns the figure.

    Args:
        rows: with ``task``, ``context`` and, for each of ``lengths``, ``accepted_N``.
    """
    import matplotlib

    matplotlib.use("Agg")
    tasks = list(dict.fromkeys(row["task"] for row in rows))
    contexts = sorted({row["context"] for row in rows})
    figure, axes = make_panels(len(tasks), 3.4, 3.0)
    for axis, task in zip(axes, tasks, strict=True):
        name_panel(axis, task, "drafts of a round", "accepted, mean")
        axis.plot(lengths, lengths, color="black", linestyle="--", linewidth=1, label="all of them")
        for row in (row for row in rows if row["task"] == task):
            colour, marker = MARKS[contexts.index(row["context"]) % len(MARKS)]
            axis.plot(
                lengths,
                [row[f"accepted_{length}"] for length in lengths],
                color=colour,
                marker=marker,
                markersize=4,
                linewidth=1.4,
                label=f"{row['context']:,} tokens",
            )
        axis.set_xticks(lengths)
        axis.set_ylim(0, max(lengths) + 0.3)
    add_legend(figure, axes)
    figure.suptitle(title, fontsize=11)
    figure.savefig(path, dpi=120, bbox_inches="tight")
    return figure
