"""Pictures of the grid: accuracy over the budget, over decode tokens per second, over the share of
rows that fell back.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.accuracy.cells import DENSE
from benchmarks.panels import (
    MARKS,
    OTHER_STYLE,
    STYLES,
    add_legend,
    budget_ticks,
    make_panels,
    name_panel,
)


def draw(
    lines: Sequence[dict[str, Any]], rows: Sequence[dict[str, Any]], stem: Path, model: str
) -> list[Path]:
    """Write the pictures there are figures for.

    Args:
        lines, rows: of ``summary.all_figures`` and ``summary.rows``.
        stem: path whose name the pictures' begin with.
        model: its name, for the titles.
    Returns:
        the files written.
    """
    import matplotlib

    matplotlib.use("Agg")
    meaningful = [line for line in lines if line["says_nothing"] is False]
    drawings = (
        ("budget", _over_budget, meaningful),
        ("pareto", _pareto, rows),
        ("fallback", _fallback, meaningful),
    )
    written = []
    for name, drawing, data in drawings:
        figure = drawing(data, model)
        if figure is not None:
            path = stem.with_name(f"{stem.name}-{name}.png")
            figure.savefig(path, dpi=120, bbox_inches="tight")
            written.append(path)
    return written


def _distinct(lines: Sequence[dict[str, Any]], key: str) -> list[Any]:
    return list(dict.fromkeys(line[key] for line in lines))


def _y_label(kind: str) -> str:
    return {
        "right": "share of answers right",
        "score": "score, 0 to 1",
        "perplexity": "perplexity (lower is better)",
    }[kind]


def _over_budget(lines: Sequence[dict[str, Any]], model: str) -> Any | None:
    grid = [line for line in lines if not line["threshold"]]
    panels = list(
        dict.fromkeys(
            (line["context"], line["task"]) for line in grid if line["retriever"] != DENSE
        )
    )
    if not panels:
        return None
    figure, axes = make_panels(len(panels), 3.4, 2.7)
    curves = list(
        dict.fromkeys(
            (line["retriever"], line["recents"]) for line in grid if line["retriever"] != DENSE
        )
    )
    for axis, (context, task) in zip(axes, panels):
        here = [line for line in grid if line["context"] == context and line["task"] == task]
        name_panel(
            axis,
            f"{task.replace('_', ' ')}, {context:,} tokens",
            "budget, tokens per KV head",
            _y_label(here[0]["kind"]),
        )
        for place, curve in enumerate(curves):
            # Side by side, so that curves with equal values can be told apart.
            mine = [line for line in here if (line["retriever"], line["recents"]) == curve]
            retriever, recents = curve
            name = retriever if recents is None else f"{retriever}, {recents} recents"
            style = (
                STYLES.get(retriever, OTHER_STYLE) if recents is None else MARKS[place % len(MARKS)]
            )
            _curve(axis, name, style, mine, shift=1.05 ** (place - len(curves) / 2))
        for line in here:
            if line["retriever"] == DENSE:
                axis.axhline(
                    line["value"],
                    color=STYLES[DENSE][0],
                    linestyle="--",
                    linewidth=1,
                    label="dense (reads all)",
                )
        budget_ticks(axis, sorted({line["budget"] for line in here if line["budget"]}))
        _y_scale(axis, here[0]["kind"])
    add_legend(figure, axes)
    figure.suptitle(f"{model}: accuracy over budget, bars are 95 % intervals", fontsize=12)
    return figure


def _y_scale(axis: Any, kind: str) -> None:
    if kind == "perplexity":
        axis.set_yscale("log")
    else:
        axis.set_ylim(-0.04, 1.08)


def _curve(
    axis: Any, name: str, style: tuple[str, str], lines: Sequence[dict[str, Any]], shift: float
) -> None:
    colour, marker = style
    lines = sorted(lines, key=lambda line: line["budget"])
    errors = [
        [max(0.0, line["value"] - line["low"]) for line in lines],
        [max(0.0, line["high"] - line["value"]) for line in lines],
    ]
    axis.errorbar(
        [line["budget"] * shift for line in lines],
        [line["value"] for line in lines],
        yerr=errors,
        color=colour,
        marker=marker,
        markersize=4,
        linewidth=1.4,
        capsize=2,
        elinewidth=0.7,
        label=name,
    )


def _pareto(rows: Sequence[dict[str, Any]], model: str) -> Any | None:
    points = [
        row
        for row in rows
        if not row["threshold"] and row["recents"] is None
        if row.get("mean") is not None and row.get("tokens_per_s")
    ]
    if not points:
        return None
    contexts = sorted({row["context"] for row in points})
    figure, axes = make_panels(len(contexts), 5.2, 4.0)
    for axis, context in zip(axes, contexts):
        here = [row for row in points if row["context"] == context]
        tasks = max(row["tasks"] for row in here)
        name_panel(
            axis,
            f"{context:,} tokens, mean of {tasks} tasks",
            "decode tokens/s (all requests together)",
            "mean score, 0 to 1",
        )
        for retriever in _distinct(here, "retriever"):
            colour, marker = STYLES.get(retriever, OTHER_STYLE)
            mine = sorted(
                (row for row in here if row["retriever"] == retriever),
                key=lambda row: row["budget"] or 0,
            )
            x, y = [row["tokens_per_s"] for row in mine], [row["mean"] for row in mine]
            axis.plot(
                x,
                y,
                color=colour,
                marker=marker,
                markersize=9 if retriever == DENSE else 5,
                linewidth=1,
                label=retriever,
            )
            # The ends of a curve say which way the budget grows.
            for row in {
                row["budget"]: row for row in (mine[0], mine[-1]) if row["budget"]
            }.values():
                point = (row["tokens_per_s"], row["mean"])
                axis.annotate(
                    f"{row['budget']:,}",
                    point,
                    textcoords="offset points",
                    xytext=(4, 5),
                    fontsize=7,
                    color=colour,
                )
        axis.set_ylim(-0.04, 1.08)
        axis.set_xlim(left=0)
    add_legend(figure, axes)
    figure.suptitle(
        f"{model}: accuracy over speed, figures are the smallest and largest budget", fontsize=12
    )
    return figure


def _fallback(lines: Sequence[dict[str, Any]], model: str) -> Any | None:
    with_threshold = [line for line in lines if line["threshold"]]
    if not with_threshold:
        return None
    budget = with_threshold[0]["budget"]
    # The curve begins without a threshold, where no row falls back.
    base = [
        {**line, "fallback_share": 0.0}
        for line in lines
        if line["retriever"] == with_threshold[0]["retriever"]
        and line["budget"] == budget
        and not line["threshold"]
    ]
    tasks = _distinct(with_threshold, "task")
    contexts = sorted({line["context"] for line in with_threshold})
    figure, axes = make_panels(len(tasks), 3.6, 2.9)
    for axis, task in zip(axes, tasks):
        here = [
            line
            for line in base + with_threshold
            if line["task"] == task and line["fallback_share"] is not None
        ]
        name_panel(
            axis,
            task.replace("_", " "),
            "share of decode rows that fell back",
            _y_label(here[0]["kind"]),
        )
        for place, (context, (colour, marker)) in enumerate(zip(contexts, STYLES.values())):
            mine = sorted(
                (line for line in here if line["context"] == context),
                key=lambda line: line["threshold"],
            )
            if not mine:
                continue
            points = [(line["fallback_share"], line["value"]) for line in mine]
            axis.plot(
                *zip(*points),
                color=colour,
                marker=marker,
                markersize=5,
                linewidth=1.2,
                label=f"{context:,} tokens",
            )
            for point, label in _labels(points, [f"{line['threshold']:g}" for line in mine]):
                axis.annotate(
                    label,
                    point,
                    textcoords="offset points",
                    xytext=(3, -11 - 9 * place),
                    fontsize=7,
                    color=colour,
                )
        axis.set_xlim(-0.05, 1.15)
        _y_scale(axis, here[0]["kind"])
    add_legend(figure, axes)
    figure.suptitle(
        f"{model}: confidence fallback of {with_threshold[0]['retriever']} {budget}, figures are "
        "thresholds",
        fontsize=12,
    )
    return figure


def _labels(
    points: Sequence[tuple[float, float]], texts: Sequence[str]
) -> list[tuple[tuple[float, float], str]]:
    """One label where points lie too close together for one each."""
    out: list[tuple[tuple[float, float], str]] = []
    last: tuple[float, float] | None = None
    for point, text in zip(points, texts):
        if (
            last is not None
            and abs(point[0] - last[0]) < 0.09
            and abs(point[1] - last[1]) < 0.05 * max(1.0, abs(last[1]))
        ):
            out[-1] = out[-1][0], f"{out[-1][1]}, {text}"
        else:
            out.append((point, text))
        last = point
    return out
