"""The goals for the head, and whether the cells meet them: differences over the same prompts with
95 % intervals, and a verdict.

The goals of `dlm`: with about 3 % of the context, no more than one point under dense attention;
with any budget, no less than `quest` with four times as much. Of a grid with several numbers of
recent tokens, fewer are to do no worse than the most. A point is 0.01 of a score. For
perplexity it is 0.01 of its logarithm, one percent: differences are those of the mean
log-probability of a forced token, so that more is better everywhere.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from benchmarks import report
from benchmarks.accuracy.cells import DENSE, Cell, Setting
from benchmarks.accuracy.summary import says_nothing
from benchmarks.accuracy.tasks import Task
from benchmarks.intervals import paired, student

SHARE, WITHIN = 0.03, 1.5
"""Of the context, for the comparison with dense: the budget nearest to it counts, if it is no more
than this factor away.
"""
POINT = 0.01
FOLD = 4
ALL = "all_scores"
"""The tasks of a context that are scored in 0 to 1, together."""
NEAR_DENSE, LIKE_QUEST, FEWER_RECENTS = "near_dense", "like_quest", "fewer_recents"
MET, NOT_MET, OPEN = "met", "not met", "open"

COLUMNS = (
    report.Column("compared", "compared"),
    report.Column("context", "context", ","),
    report.Column("compared_task", "task"),
    report.Column("better", "better"),
    report.Column("equal", "equal"),
    report.Column("worse", "worse"),
    report.Column("difference", "difference", "+.3f"),
    report.Column("difference_interval", "95 %"),
    report.Column("wanted", "wanted"),
    report.Column("verdict", "verdict"),
)
NOTE = (
    "What was wanted: prompt by prompt, dlm's score less the other's, on how many prompts it is "
    "better, equal and worse, and the mean. "
    "met: the whole 95 % interval is at or above what was wanted; not met: all of it is below; "
    "open: it holds both, so more prompts are "
    "needed. Scores: Agresti and Min's interval for paired shares, which stays wide where few "
    "prompts are all equal; perplexity: "
    "difference of the mean log-probability of a token (0.01 is one percent of perplexity), "
    "Student's t."
)


@dataclass(frozen=True)
class Comparison:
    """Two settings over the same prompts.

    Attributes:
        kind: ``NEAR_DENSE``, ``LIKE_QUEST`` or ``FEWER_RECENTS``.
        mark: the difference that was wanted at least.
    """

    kind: str
    context: int
    mine: Setting
    other: Setting
    mark: float

    @property
    def name(self) -> str:
        return f"{self.mine.name} – {self.other.name}"


def comparisons(cells: Iterable[Cell]) -> list[Comparison]:
    """Those that the cells have both sides of, by context: the one with dense, those with quest by
    budget, and those of fewer recent tokens with the most.
    """
    settings: dict[int, dict[Setting, None]] = {}
    for cell in cells:
        settings.setdefault(cell.context, {})[cell.setting] = None
    found = []
    for context, known in sorted(settings.items()):
        budgets = sorted(
            s.budget
            for s in known
            if s.retriever == "dlm" and s.budget is not None and s == Setting("dlm", s.budget)
        )
        near = min(
            budgets, key=lambda budget: abs(math.log(budget / (SHARE * context))), default=None
        )
        if near is not None and max(near / (SHARE * context), SHARE * context / near) <= WITHIN:
            found.append(
                Comparison(NEAR_DENSE, context, Setting("dlm", near), Setting(DENSE), -POINT)
            )
        found += [
            Comparison(LIKE_QUEST, context, Setting("dlm", b), Setting("quest", FOLD * b), 0.0)
            for b in budgets
        ]
        found += [
            Comparison(FEWER_RECENTS, context, s, most, 0.0)
            for s in known
            if s.recents is not None and (most := _with_most_recents(s, known)) != s
        ]
        found = [c for c in found if c.context != context or c.other in known]
    return found


def _with_most_recents(setting: Setting, known: Iterable[Setting]) -> Setting:
    return max(
        (s for s in known if replace(s, recents=setting.recents) == setting),
        key=lambda s: s.recents or 0,
    )


def verdict(low: float, high: float, mark: float) -> str:
    """What an interval says of a mark."""
    return MET if low >= mark else NOT_MET if high < mark else OPEN


def rows(scores: Mapping[Cell, Sequence[float]], tasks: Mapping[str, Task]) -> list[dict[str, Any]]:
    """The table's rows; tasks that dense cannot do in a context are left out.

    Args:
        scores: of each prompt, by cell, in the order of the prompts.
    """
    out = []
    for comparison in comparisons(scores):
        pairs = {}
        for name, task in tasks.items():
            mine, other, dense = (
                scores.get(Cell(name, comparison.context, s))
                for s in (comparison.mine, comparison.other, Setting(DENSE))
            )
            if mine and other and dense and not says_nothing(task, dense):
                pairs[name] = (mine, other)
        asked = {
            "compared": comparison.name,
            "kind": comparison.kind,
            "mark": comparison.mark,
            "wanted": f"≥ {comparison.mark:g}",
        }
        for row in _differences(comparison.context, pairs, tasks):
            out.append(asked | row | {"verdict": verdict(row["low"], row["high"], comparison.mark)})
    return out


AGAINST = (
    report.Column("against", "setting"),
    report.Column("context", "context", ","),
    report.Column("compared_task", "task"),
    report.Column("better", "better"),
    report.Column("equal", "equal"),
    report.Column("worse", "worse"),
    report.Column("difference", "difference", "+.4f"),
    report.Column("difference_interval", "95 %"),
)


def rows_against(
    scores: Mapping[Cell, Sequence[float]],
    other: Mapping[str, Sequence[float]],
    tasks: Mapping[str, Task],
) -> list[dict[str, Any]]:
    """Each cell against the one of the same name in another result, prompt by prompt; by context
    and setting.

    Args:
        other: scores of each prompt by the cells' names.
    """
    pairs: dict[tuple[int, Setting], dict[str, tuple[Sequence[float], Sequence[float]]]] = {}
    for cell, mine in scores.items():
        if cell.name in other:
            pairs.setdefault((cell.context, cell.setting), {})[cell.task] = (mine, other[cell.name])
    return [
        {"against": setting.name, "kind": "against", **row}
        for (context, setting), found in pairs.items()
        for row in _differences(context, found, tasks)
    ]


def _differences(
    context: int,
    pairs: Mapping[str, tuple[Sequence[float], Sequence[float]]],
    tasks: Mapping[str, Task],
) -> list[dict[str, Any]]:
    """One side less the other, task by task, and the tasks that are scored in 0 to 1 together."""
    out, scored = [], []
    for name, (mine, other) in pairs.items():
        if tasks[name].kind == "perplexity":  # its scores are negative log-probabilities
            differences = [b - a for a, b in zip(mine, other, strict=True)]
            out.append(_row(context, name, differences, *student(differences)))
        else:
            scored.append([a - b for a, b in zip(mine, other, strict=True)])
            out.append(_row(context, name, scored[-1], *paired(scored[-1])))
    if len(scored) > 1:
        together = sum(scored, [])
        out.append(_row(context, ALL, together, *paired(together)))
    return out


def _row(
    context: int, task: str, differences: Sequence[float], low: float, high: float
) -> dict[str, Any]:
    """What the differences of one task come to."""
    signs = [0 if abs(d) < 1e-9 else math.copysign(1, d) for d in differences]
    return {
        "context": context,
        "task": task,
        "compared_task": task.removeprefix("longbench/").replace("_", " "),
        "prompts": len(differences),
        "better": signs.count(1),
        "equal": signs.count(0),
        "worse": signs.count(-1),
        "difference": sum(differences) / len(differences),
        "low": low,
        "high": high,
        "difference_interval": f"{low:+.3f} to {high:+.3f}",
    }


def counts(lines: Sequence[dict[str, Any]]) -> dict[str, dict[str, int]]:
    """How many comparisons of each of dlm's goals, task by task, had which verdict:
    ``{kind: {"met", "not_met", "open", "all"}}``.
    """
    out = {}
    for kind in (NEAR_DENSE, LIKE_QUEST):
        found = [line["verdict"] for line in lines if line["kind"] == kind and line["task"] != ALL]
        out[kind] = {word.replace(" ", "_"): found.count(word) for word in (MET, NOT_MET, OPEN)} | {
            "all": len(found)
        }
    return out
