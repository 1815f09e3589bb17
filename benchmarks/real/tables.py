"""From figures to tables."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from benchmarks.real.figures import LOG_PROBS, RIVAL, mean
from benchmarks.real.settings import DENSE
from benchmarks.report import Column


def rows(lines: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """One row for each context and setting.

    Of each task it has ``TASK`` (the value) and ``TASK_difference``, and as text with intervals
    ``TASK_text``, ``TASK_difference_text`` and ``TASK_over_rival_text``; of the tasks in 0 to 1
    that dense can do the means over them, where all of them were measured. A row is in a table
    where it has the table's name: ``name``, ``rival_name`` or ``long_name``.
    """
    parts: dict[tuple[int, str], list[dict[str, Any]]] = {}
    for line in lines:
        parts.setdefault((line["context"], line["setting"]), []).append(line)
    able = {
        context: {line["task"] for line in mine if _counts(line)}
        for (context, name), mine in parts.items()
        if name == DENSE
    }
    out = []
    for (context, name), mine in sorted(parts.items(), key=lambda part: part[0][0]):
        row = {"name": name, "context": context}
        row |= {key: mine[0][key] for key in ("variant", "budget")}
        for line in mine:
            row |= _task_figures(line)
        counted = [line for line in mine if _counts(line)]
        if counted and {line["task"] for line in counted} == able.get(context):
            row |= _over_tasks(counted)
        read = [line for line in mine if line["pages_read"] is not None]
        if read:
            row["pages_read"] = sum(line["pages_read"] * line["tokens"] for line in read) / sum(
                line["tokens"] for line in read
            )
        if any(line["over_rival"] is not None for line in mine):
            row["rival_name"] = name
        out.append(row)
    return out


def _counts(line: dict[str, Any]) -> bool:
    return line["kind"] in ("right", "share") and line["says_nothing"] is False


def _task_figures(line: dict[str, Any]) -> dict[str, Any]:
    task = line["task"]
    out = {
        task: line["value"],
        f"{task}_difference": line["difference"],
        f"{task}_text": value_text(line),
        f"{task}_difference_text": value_text(line)
        if line["variant"] == DENSE
        else _with_interval(line, "difference"),
        f"{task}_over_rival_text": _with_interval(line, "over_rival"),
    }
    if line["kind"] == "long":
        out["long_name"] = line["setting"]
        out |= {key: line[key] for key in ("perplexity", "repeated")}
        out |= {key: value for key, value in line.items() if key.startswith("equal_")}
    return out


def _over_tasks(lines: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Means over tasks; the intervals are those of a mean of independent means."""
    value = mean([line["value"] for line in lines])
    out = {"mean": value, "mean_tasks": len(lines), "mean_text": f"{value:.2f}"}
    for key in ("difference", "over_rival"):
        if any(line[key] is None for line in lines):
            continue
        difference = mean([line[key] for line in lines])
        halves = [(line[f"{key}_high"] - line[f"{key}_low"]) / 2 for line in lines]
        half = math.sqrt(sum(part**2 for part in halves)) / len(halves)
        over = {key: difference, f"{key}_low": difference - half, f"{key}_high": difference + half}
        out |= {f"mean_{key}": difference, f"mean_{key}_text": _with_interval(over, key)}
    if lines[0]["variant"] == DENSE:
        out["mean_difference_text"] = out["mean_text"]
    return out


def value_text(line: dict[str, Any]) -> str:
    """The value; a dagger where dense itself fails."""
    style = ".3f" if line["kind"] in LOG_PROBS else ".2f"
    return f"{line['value']:{style}}" + (" †" if line["says_nothing"] else "")


def _with_interval(line: dict[str, Any], key: str) -> str | None:
    if line[key] is None:
        return None
    return f"{line[key]:+.3f} ({line[f'{key}_low']:+.3f} to {line[f'{key}_high']:+.3f})"


def tables(lines: Sequence[dict[str, Any]]) -> dict[str, Sequence[Column]]:
    """Columns of the tables; see ``rows``."""
    kinds = {line["task"]: line["kind"] for line in lines}
    forced = [task for task, kind in kinds.items() if kind == "log-prob"]
    scored = [task for task, kind in kinds.items() if kind in ("right", "share")]
    name, context = Column("name", "setting"), Column("context", "context", ",")
    means = [("mean", "mean of the tasks in 0 to 1")] if scored else []
    main = [*((task, task) for task in forced), *means]
    out: dict[str, Sequence[Column]] = {}
    if main:
        out["Dense, and differences to it"] = (
            name,
            context,
            *(Column(f"{key}_difference_text", heading) for key, heading in main),
            Column("pages_read", "pages read", ".1%"),
        )
    if main and any(line["over_rival"] is not None for line in lines):
        out[f"Less {RIVAL} at the same budget"] = (
            Column("rival_name", "setting"),
            context,
            *(Column(f"{key}_over_rival_text", heading) for key, heading in main),
        )
    if scored:
        out["Tasks in 0 to 1"] = (
            name,
            context,
            *(Column(f"{task}_text", _short(task)) for task in scored),
            Column("mean_text", "mean"),
        )
        out["Tasks in 0 to 1: differences to dense"] = (
            name,
            context,
            *(Column(f"{task}_difference", _short(task), "+.3f") for task in scored),
        )
    equal = list(dict.fromkeys(key for line in lines for key in line if key.startswith("equal_")))
    if "long" in kinds.values():
        out["Long replies"] = (
            Column("long_name", "setting"),
            context,
            Column("perplexity", "perplexity under dense", ".3f"),
            Column("long_difference_text", "log-probability, less dense's"),
            Column("repeated", "repeated 4-grams", ".1%"),
            *(Column(key, f"as dense to {int(key[6:]):,}", ".0%") for key in equal),
        )
    return out


def _short(task: str) -> str:
    return task.removeprefix("longbench/").removeprefix("niah_").replace("_", " ")


def compact(lines: Sequence[dict[str, Any]]) -> str:
    """All figures in few lines: dense's values, the others' differences to it."""
    tasks = list(dict.fromkeys(line["task"] for line in lines))
    by_cell = {(line["context"], line["setting"], line["task"]): line for line in lines}
    width = max([len(line["setting"]) for line in lines] + [14])
    out = []
    for context in sorted({line["context"] for line in lines}):
        heads = "  ".join(f"{_short(task):>11.11}" for task in tasks)
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
