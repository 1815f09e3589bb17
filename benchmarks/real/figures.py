"""From cells to figures: values, paired differences to dense, the rows of the tables."""

from __future__ import annotations

import csv
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.intervals import of_scores, paired, student
from benchmarks.prefilled import CACHED_ENOUGH
from benchmarks.real.prompts import Task
from benchmarks.real.settings import DENSE
from benchmarks.real.store import Cell
from benchmarks.report import Column

Cells = Mapping[Cell, dict[str, Any]]
"""Finished cells by what they are."""


def mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def differences(scores: Sequence[float], others: Sequence[float]) -> list[float]:
    """Prompt by prompt."""
    return [mine - other for mine, other in zip(scores, others, strict=True)]


def interval(task: Task, scores: Sequence[float]) -> tuple[float, float]:
    """95 % of the mean: Student's t for log-probabilities, Wilson for right or wrong, bootstrap for
    shares.
    """
    if task.kind in ("log-prob", "long"):
        return student(scores)
    return of_scores(scores, task.kind == "right")


def difference_interval(task: Task, diffs: Sequence[float]) -> tuple[float, float]:
    """95 % of the mean difference: Student's t for log-probabilities, else Agresti and Min."""
    return student(diffs) if task.kind in ("log-prob", "long") else paired(diffs)


def figures(cells: Cells, tasks: Mapping[str, Task]) -> list[dict[str, Any]]:
    """One line for each cell, in their order."""
    dense = {
        (cell.task, cell.context): result["scores"]
        for cell, result in cells.items()
        if cell.setting.variant.retriever == DENSE
    }
    out = []
    for cell, result in cells.items():
        task, scores, stats = tasks[cell.task], result["scores"], result["stats"]
        low, high = interval(task, scores)
        line: dict[str, Any] = {
            "task": cell.task,
            "kind": task.kind,
            "context": cell.context,
            "setting": cell.setting.name,
            "variant": cell.setting.variant.name,
            "budget": cell.setting.budget,
            "prompts": len(scores),
            "value": mean(scores),
            "low": low,
            "high": high,
            "difference": None,
            "difference_low": None,
            "difference_high": None,
            "says_nothing": None,
            "pages_read": None,
            "kept_mass": stats["kept_mass_mean"],
            "tokens": result["tokens"],
            "seconds": result["seconds"] if result["cached"] >= CACHED_ENOUGH else None,
        }
        if stats["pages_total"]:
            line["pages_read"] = stats["pages_read"] / stats["pages_total"]
        others = dense.get((cell.task, cell.context))
        if others is not None:
            line["says_nothing"] = task.says_nothing(others)
            diffs = differences(scores, others)
            low, high = difference_interval(task, diffs)
            line |= {
                "difference": mean(diffs),
                "difference_low": low,
                "difference_high": high,
            }
        out.append(line)
    return out


def write_csv(path: Path, lines: Sequence[dict[str, Any]]) -> None:
    """One line a cell."""
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(lines[0]) if lines else ["task"])
        writer.writeheader()
        writer.writerows(lines)


def rows(lines: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """One row for each context and setting.

    Of each task it has ``TASK`` (the value), ``TASK_difference``, and both as text; of the tasks in
    0..1 that dense can do the means over them, where all of them were measured. The key of its name
    is ``name``.
    """
    out: dict[tuple[int, str], dict[str, Any]] = {}
    parts: dict[tuple[int, str], list[dict[str, Any]]] = {}
    for line in lines:
        key = line["context"], line["setting"]
        row = out.setdefault(
            key,
            {
                "name": line["setting"],
                **{name: line[name] for name in ("context", "variant", "budget")},
            },
        )
        parts.setdefault(key, []).append(line)
        task = line["task"]
        row[task], row[f"{task}_difference"] = line["value"], line["difference"]
        row[f"{task}_text"] = value_text(line)
        row[f"{task}_difference_text"] = difference_text(line)
    able = {
        context: {line["task"] for line in mine if _counts(line)}
        for (context, name), mine in parts.items()
        if name == DENSE
    }
    for (context, name), row in out.items():
        mine = [line for line in parts[context, name] if _counts(line)]
        if mine and {line["task"] for line in mine} == able.get(context):
            row |= _over_tasks(mine)
        read = [line for line in parts[context, name] if line["pages_read"] is not None]
        if read:
            row["pages_read"] = sum(line["pages_read"] * line["tokens"] for line in read) / sum(
                line["tokens"] for line in read
            )
    return [out[key] for key in sorted(out, key=lambda key: key[0])]


def _counts(line: dict[str, Any]) -> bool:
    return line["kind"] in ("right", "share") and line["says_nothing"] is False


def _over_tasks(lines: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Means over tasks; the interval is that of a mean of independent means."""
    value = mean([line["value"] for line in lines])
    difference = mean([line["difference"] for line in lines])
    halves = [(line["difference_high"] - line["difference_low"]) / 2 for line in lines]
    half = math.sqrt(sum(part**2 for part in halves)) / len(halves)
    return {
        "mean": value,
        "mean_difference": difference,
        "mean_tasks": len(lines),
        "mean_text": f"{value:.2f}",
        "mean_difference_text": f"{value:.2f}"
        if lines[0]["variant"] == DENSE
        else f"{difference:+.3f} ({difference - half:+.3f} to {difference + half:+.3f})",
    }


def value_text(line: dict[str, Any]) -> str:
    """The value; a dagger where dense itself fails."""
    style = ".3f" if line["kind"] in ("log-prob", "long") else ".2f"
    return f"{line['value']:{style}}" + (" †" if line["says_nothing"] else "")


def difference_text(line: dict[str, Any]) -> str | None:
    """Difference to dense with its interval; of dense itself its value."""
    if line["variant"] == DENSE:
        return value_text(line)
    if line["difference"] is None:
        return None
    parts = (line["difference_low"], line["difference_high"])
    return f"{line['difference']:+.3f} ({' to '.join(f'{part:+.3f}' for part in parts)})"


def tables(lines: Sequence[dict[str, Any]]) -> dict[str, Sequence[Column]]:
    """Columns of the tables; see ``rows``."""
    kinds = {line["task"]: line["kind"] for line in lines}
    forced = [task for task, kind in kinds.items() if kind == "log-prob"]
    scored = [task for task, kind in kinds.items() if kind in ("right", "share")]
    context = Column("context", "context", ",")
    out: dict[str, Sequence[Column]] = {}
    compared = [Column(f"{task}_difference_text", task) for task in forced]
    if scored:
        compared.append(Column("mean_difference_text", "mean of the tasks in 0 to 1"))
    if compared:
        out["Dense, and differences to it"] = (
            Column("name", "setting"),
            context,
            *compared,
            Column("pages_read", "pages read", ".1%"),
        )
    if scored:
        out["Tasks in 0 to 1"] = (
            Column("name", "setting"),
            context,
            *(Column(f"{task}_text", task.replace("_", " ")) for task in scored),
            Column("mean_text", "mean"),
        )
        out["Tasks in 0 to 1: differences to dense"] = (
            Column("name", "setting"),
            context,
            *(Column(f"{task}_difference", task.replace("_", " "), "+.3f") for task in scored),
        )
    return out


def compact(lines: Sequence[dict[str, Any]]) -> str:
    """All figures in few lines: dense's values, the others' differences to it."""
    tasks = list(dict.fromkeys(line["task"] for line in lines))
    by_cell = {(line["context"], line["setting"], line["task"]): line for line in lines}
    width = max([len(line["setting"]) for line in lines] + [14])
    out = []
    for context in sorted({line["context"] for line in lines}):
        heads = "  ".join(f"{task.removeprefix('niah_'):>11.11}" for task in tasks)
        out.append(f"{f'{context:,} tokens':{width}}  {heads}")
        for setting in dict.fromkeys(
            line["setting"] for line in lines if line["context"] == context
        ):
            found = [by_cell.get((context, setting, task)) for task in tasks]
            texts = [_compact_cell(line) if line else "" for line in found]
            out.append(f"{setting:{width}}  " + "  ".join(f"{text:>11}" for text in texts))
        out.append("")
    return "\n".join(out)


def _compact_cell(line: dict[str, Any]) -> str:
    if line["variant"] == DENSE or line["difference"] is None:
        return value_text(line)
    return f"{line['difference']:+.3f}"
