"""From cells to figures: scores, intervals, the rows of the tables, the CSV."""

from __future__ import annotations

import csv
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks import report
from benchmarks.accuracy.cells import DENSE, Cell, Setting
from benchmarks.accuracy.tasks import Task
from benchmarks.accuracy.writer import Example
from benchmarks.intervals import of_scores
from benchmarks.prefilled import CACHED_ENOUGH

Cells = Mapping[Cell, dict[str, Any]]
"""Finished cells by what they are."""


def score(task: Task, example: Example, reply: Any) -> float:
    """One reply's score: 0..1, or the mean negative log-probability of the forced tokens."""
    if task.metric is None:
        return -sum(reply) / len(reply)
    return task.metric(reply, example.answers)


def value(task: Task, scores: Sequence[float]) -> float:
    """The cell's figure: the mean, or the perplexity."""
    mean = sum(scores) / len(scores)
    return math.exp(mean) if task.kind == "perplexity" else mean


def interval(task: Task, scores: Sequence[float]) -> tuple[float, float]:
    """95 %: Wilson for right or wrong, bootstrap over the prompts for all else."""
    low, high = of_scores(scores, task.kind == "right")
    return (math.exp(low), math.exp(high)) if task.kind == "perplexity" else (low, high)


def says_nothing(task: Task, dense_scores: Sequence[float]) -> bool:
    """Whether the model cannot do the task even with all of its context."""
    return task.kind != "perplexity" and value(task, dense_scores) < task.floor


def figures(
    cell: Cell, task: Task, result: dict[str, Any], dense: dict[str, Any] | None
) -> dict[str, Any]:
    """One line of the CSV.

    Args:
        dense: result of the dense cell over the same prompts, where there is one.
    """
    scores, stats, setting = result["scores"], result["stats"], cell.setting
    low, high = interval(task, scores)
    line: dict[str, Any] = {
        "task": cell.task,
        "kind": task.kind,
        "context": cell.context,
        "retriever": setting.retriever,
        "budget": setting.budget,
        "recent_tokens": setting.recent_tokens,
        "recents": setting.recents,
        "threshold": setting.threshold,
        "prompts": len(scores),
        "value": value(task, scores),
        "low": low,
        "high": high,
        "of_dense": None,
        "says_nothing": None,
        "pages_read": None,
        "kept_mass": None,
        "fallback_share": None,
        "tokens": result["tokens"],
        "seconds": result["seconds"] if result["cached"] >= CACHED_ENOUGH else None,
    }
    if dense is not None:
        line["says_nothing"] = says_nothing(task, dense["scores"])
        if value(task, dense["scores"]):
            line["of_dense"] = line["value"] / value(task, dense["scores"])
    if stats["pages_total"]:
        line["pages_read"] = stats["pages_read"] / stats["pages_total"]
    if setting.retriever == "dlm":
        line["kept_mass"] = stats["kept_mass_mean"]
    if setting.threshold and stats["decode_rows"]:
        line["fallback_share"] = stats["fallback_rows"] / stats["decode_rows"]
    return line


def all_figures(cells: Cells, tasks: Mapping[str, Task]) -> list[dict[str, Any]]:
    """The CSV's lines, in the order of the cells."""
    dense = {
        (cell.task, cell.context): result
        for cell, result in cells.items()
        if cell.setting == Setting(DENSE)
    }
    return [
        figures(cell, tasks[cell.task], result, dense.get((cell.task, cell.context)))
        for cell, result in cells.items()
    ]


def write_csv(path: Path, lines: Sequence[dict[str, Any]]) -> None:
    """One line a cell."""
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(lines[0]) if lines else ["task"])
        writer.writeheader()
        writer.writerows(lines)


def rows(lines: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The tables' rows: one for each context and setting, a column for each task.

    The key of a row's name says which table it is in: ``name``, or ``fallback_name`` for settings
    with a threshold. Dense rows with tasks that dense cannot do have a ``failed_name`` too. Means
    and speed are given only for settings with all the tasks that dense can do in that context.
    """
    out: dict[tuple[int, Setting], dict[str, Any]] = {}
    for line in lines:
        setting = Setting(line["retriever"], line["budget"], line["threshold"], line["recents"])
        row = out.setdefault((line["context"], setting), {})
        if not row:
            name = (
                {"fallback_name": setting.retriever}
                if setting.threshold
                else {"name": setting.name}
            )
            row |= {
                **name,
                **{
                    key: line[key]
                    for key in (
                        "context",
                        "retriever",
                        "budget",
                        "recent_tokens",
                        "recents",
                        "threshold",
                    )
                },
            }
        row[line["task"]] = line["value"]
        row[f"{line['task']}_text"] = as_text(line)
        if line["fallback_share"] is not None:
            row[f"{line['task']}_fallback_share"] = line["fallback_share"]
        if line["says_nothing"]:
            row["failed_name"] = setting.name
        else:
            row.setdefault("_lines", []).append(line)
    able = {
        context: len(row.get("_lines", ()))
        for (context, setting), row in out.items()
        if setting == Setting(DENSE)
    }
    for (context, _), row in out.items():
        own = row.pop("_lines", [])
        row |= _over_tasks(own) if len(own) == able.get(context) else {}
    order = list(dict.fromkeys(line["retriever"] for line in lines))

    def place(key: tuple[int, Setting]) -> tuple[Any, ...]:
        context, setting = key
        by = order.index(setting.retriever)
        return context, setting.threshold, by, setting.budget or 0, setting.recents or 0

    return [out[key] for key in sorted(out, key=place)]


def as_text(line: dict[str, Any]) -> str:
    """Value and interval; a dagger where dense itself fails."""
    style = ".3f" if line["kind"] == "perplexity" else ".2f"
    text = f"{line['value']:{style}} ({line['low']:{style}}–{line['high']:{style}})"
    return text + (" †" if line["says_nothing"] else "")


def _over_tasks(lines: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """What a setting's lines say together: mean over the tasks in 0..1, tokens a second, pages
    read, rows that fell back.
    """
    scored = [line["value"] for line in lines if line["kind"] != "perplexity"]
    timed = [line for line in lines if line["seconds"]]
    out: dict[str, Any] = {
        "mean": sum(scored) / len(scored) if scored else None,
        "tasks": len(scored),
    }
    if timed:
        out["tokens_per_s"] = sum(line["tokens"] for line in timed) / sum(
            line["seconds"] for line in timed
        )
    for key in ("pages_read", "kept_mass", "fallback_share"):
        # Every decode step counts the same.
        known = [line for line in lines if line[key] is not None]
        tokens = sum(line["tokens"] for line in known)
        if tokens:
            out[key] = sum(line[key] * line["tokens"] for line in known) / tokens
    return out


def tables(lines: Sequence[dict[str, Any]]) -> dict[str, Sequence[report.Column]]:
    """Columns of the tables; see ``rows``. A task that dense cannot do in any context has its
    figures in a table of their own.
    """
    tasks = dict.fromkeys(line["task"] for line in lines)
    done = dict.fromkeys(line["task"] for line in lines if not line["says_nothing"])
    able, unable = (
        [_task_column(name) for name in tasks if (name in done) == can] for can in (True, False)
    )
    mean, kept_mass = (
        report.Column("mean", "mean", ".3f"),
        report.Column("kept_mass", "kept mass", ".3f"),
    )
    over_tasks = (mean, report.Column("pages_read", "pages read", ".1%"), kept_mass)
    context = report.Column("context", "context", ",")
    out: dict[str, Sequence[report.Column]] = {
        "By context, retriever and budget": (
            report.Column("name", "retriever and budget"),
            context,
            *able,
            *over_tasks,
            report.Column("tokens_per_s", "tokens/s", ",.0f"),
        )
    }
    if any(line["threshold"] for line in lines):
        out["Confidence fallback"] = (
            report.Column("fallback_name", "retriever"),
            context,
            report.Column("budget", "budget", ","),
            report.Column("threshold", "threshold", "g"),
            report.Column("fallback_share", "rows that fell back", ".1%"),
            *able,
            *over_tasks,
        )
    if unable:
        out["Tasks that this model cannot do with all of its context"] = (
            report.Column("failed_name", "retriever"),
            context,
            *unable,
        )
    return out


def _task_column(name: str) -> report.Column:
    return report.Column(f"{name}_text", name.removeprefix("longbench/").replace("_", " "))
