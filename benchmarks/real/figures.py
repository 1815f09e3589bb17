"""From cells to figures: values, paired differences to dense and to quest, measures of long
replies.
"""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.intervals import of_scores, paired, student
from benchmarks.prefilled import CACHED_ENOUGH
from benchmarks.real import long
from benchmarks.real.prompts import Task
from benchmarks.real.settings import DENSE
from benchmarks.real.store import Cell

Cells = Mapping[Cell, dict[str, Any]]
"""Finished cells by what they are."""

LOG_PROBS = ("log-prob", "long")
"""Kinds of tasks whose scores are log-probabilities."""

RIVAL = "quest"
"""Retriever that the others are compared with, besides dense."""


def mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def interval(task: Task, scores: Sequence[float]) -> tuple[float, float]:
    """95 % of the mean: Student's t for log-probabilities, Wilson for right or wrong, bootstrap for
    shares.
    """
    if task.kind in LOG_PROBS:
        return student(scores)
    return of_scores(scores, task.kind == "right")


def compared(task: Task, scores: Sequence[float], others: Sequence[float]) -> tuple[float, ...]:
    """Mean difference prompt by prompt, and its 95 %: Student's t for log-probabilities, else
    Agresti and Min.
    """
    diffs = [mine - other for mine, other in zip(scores, others, strict=True)]
    return mean(diffs), *(student if task.kind in LOG_PROBS else paired)(diffs)


def figures(cells: Cells, tasks: Mapping[str, Task]) -> list[dict[str, Any]]:
    """One line for each cell, in their order."""
    dense = _by_place(cells, DENSE)
    rival = _by_place(cells, RIVAL)
    out = []
    for cell, result in cells.items():
        task, scores, stats = tasks[cell.task], result["scores"], result["stats"]
        variant, place = cell.setting.variant, (cell.task, cell.context)
        low, high = interval(task, scores)
        line: dict[str, Any] = {
            "task": cell.task,
            "kind": task.kind,
            "context": cell.context,
            "setting": cell.setting.name,
            "variant": variant.name,
            "budget": cell.setting.budget,
            "prompts": len(scores),
            "value": mean(scores),
            "low": low,
            "high": high,
        }
        others = dense.get((*place, None))
        line |= _difference("difference", task, scores, others)
        line["says_nothing"] = task.says_nothing(others["scores"]) if others else None
        than = None if variant.name == RIVAL else rival.get((*place, cell.setting.budget))
        line |= _difference("over_rival", task, scores, than)
        line |= {
            "pages_read": stats["pages_read"] / stats["pages_total"]
            if stats["pages_total"]
            else None,
            "kept_mass": stats["kept_mass_mean"],
            "tokens": result["tokens"],
            "seconds": result["seconds"] if result["cached"] >= CACHED_ENOUGH else None,
        }
        if task.kind == "long":
            line |= _of_long(result, others)
        out.append(line)
    return out


def _by_place(cells: Cells, name: str) -> dict[tuple[str, int, int | None], dict[str, Any]]:
    """Results of the variant of that name by task, context and budget."""
    return {
        (cell.task, cell.context, cell.setting.budget): result
        for cell, result in cells.items()
        if cell.setting.variant.name == name
    }


def _difference(
    key: str, task: Task, scores: Sequence[float], others: dict[str, Any] | None
) -> dict[str, float | None]:
    names = (key, f"{key}_low", f"{key}_high")
    if others is None:
        return dict.fromkeys(names)
    return dict(zip(names, compared(task, scores, others["scores"]), strict=True))


def _of_long(result: dict[str, Any], dense: dict[str, Any] | None) -> dict[str, Any]:
    replies = result["replies"]
    out = {
        "perplexity": long.perplexity(result["scores"]),
        "repeated": mean([long.repeated(reply) for reply in replies]),
    }
    if dense is not None:
        equal = [
            long.equal_tokens(mine, other)
            for mine, other in zip(replies, dense["replies"], strict=True)
        ]
        for position in long.positions(len(replies[0])):
            out[f"equal_{position}"] = mean([float(count >= position) for count in equal])
    return out


def write_csv(path: Path, lines: Sequence[dict[str, Any]]) -> None:
    """One line a cell."""
    names = list(dict.fromkeys(name for line in lines for name in line)) or ["task"]
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=names)
        writer.writeheader()
        writer.writerows(lines)
