"""The figures of the variants as lines of JSON, as tables and as a picture."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from statistics import fmean
from typing import Any, TextIO

from benchmarks import report
from benchmarks.heads.held_out import Point
from benchmarks.heads.variants import DEFAULT
from benchmarks.intervals import student
from benchmarks.marks.measuring import DENSE, Mark
from benchmarks.panels import add_legend, make_panels, name_panel

Cell = tuple[str, int, int]
"""Kind, context, budget."""


class Results:
    """Collects figures; each group of them is also a line of ``lines`` at once.

    Args:
        contexts, kinds, budgets: what is measured.
    """

    def __init__(
        self, lines: TextIO, contexts: Sequence[int], kinds: Sequence[str], budgets: Sequence[int]
    ) -> None:
        self._lines = lines
        self.contexts, self.kinds, self.budgets = contexts, kinds, budgets
        self.tokens: list[int] = []
        """Trained on, at each point."""
        self._points: list[dict[tuple[str, Cell], list[Point]]] = []
        self._marks: dict[tuple[str, Cell], list[float]] = {}
        self._dense: dict[tuple[str, int], list[float]] = {}

    def add_points(self, step: int, tokens: int, seconds: float, points: Iterable[Point]) -> None:
        """One place of the curve: all variants there."""
        found = defaultdict(list)
        for point in points:
            found[point.variant, (point.kind, point.context, point.budget)].append(point)
        self.tokens.append(tokens)
        self._points.append(found)
        for (name, (kind, context, budget)), group in found.items():
            self._write(
                variant=name,
                step=step,
                tokens=tokens,
                seconds=round(seconds, 1),
                kind=kind,
                context=context,
                budget=budget,
                share=round(share(group), 5),
                **{
                    field: [round(value, 5) for value in values]
                    for field, values in _transposed(group).items()
                },
            )

    def add_mark(self, variant: str, kind: str, context: int, mark: Mark) -> None:
        """Log-probabilities of one variant, or of ``DENSE``, that of a portion of the prompts."""
        if mark.by == DENSE:
            values = self._dense.setdefault((kind, context), [])
        else:
            assert mark.size is not None
            cell = (kind, context, mark.size.budget)
            values = self._marks.setdefault((variant, cell), [])
        values += mark.log_probs
        self._write(
            variant=variant,
            kind=kind,
            context=context,
            budget=mark.size and mark.size.budget,
            read=mark.read,
            log_probs=mark.log_probs,
        )

    def _write(self, **line: Any) -> None:
        print(json.dumps(line), file=self._lines, flush=True)

    def row(self, name: str) -> dict[str, Any]:
        """A variant's row of the tables: what it has at the end, and how that differs from the
        default's, paired by prompt, with the 95 % interval (Student's t).
        """
        row: dict[str, Any] = {"name": name}
        for cell in self._cells():
            key = cell_key(cell)
            for measure, of in MEASURES.items():
                last = self._points[-1]
                mine, plain = ([of(p) for p in last[who, cell]] for who in (name, DEFAULT))
                row[f"{measure}_{key}"] = fmean(mine)
                if name != DEFAULT:
                    row[f"{measure}_{key}_difference"] = _difference(mine, plain)
            row[f"share_{key}"] = share(self._points[-1][name, cell])
            if (name, cell) in self._marks:
                dense = self._dense[cell[:2]]
                mine, plain = (
                    [a - b for a, b in zip(self._marks[who, cell], dense)]
                    for who in (name, DEFAULT)
                )
                row[f"forced_{key}"] = fmean(mine)
                if name != DEFAULT and len(mine) == len(plain):
                    row[f"forced_{key}_difference"] = _difference(mine, plain)
        return row

    def told(self) -> str:
        """The latest point, for people: of the smallest budget, all cells as columns."""
        cells = [(k, c, self.budgets[0]) for c in self.contexts for k in self.kinds]
        names = dict.fromkeys(name for name, _ in self._points[-1])
        lines = [f"{self.tokens[-1]:,} tokens; recall / best, heaviest at {self.budgets[0]}:"]
        for name in names:
            groups = [self._points[-1][name, cell] for cell in cells]
            told = "  ".join(
                f"{cell[0]} {cell[1]} {share(group):.3f} {heaviest(group):.3f}"
                for cell, group in zip(cells, groups, strict=True)
            )
            lines.append(f"  {name:<22} {told}")
        return "\n".join(lines)

    def curve(self, name: str, cell: Cell, of: Callable[[list[Point]], float]) -> list[float]:
        """One figure of a variant at each point."""
        return [of(points[name, cell]) for points in self._points]

    def _cells(self) -> list[Cell]:
        return [(k, c, b) for c in self.contexts for k in self.kinds for b in self.budgets]

    def tables(self) -> dict[str, tuple[report.Column, ...]]:
        """A table for each figure and context; differences at the smallest budget."""
        headings = {
            "share": ("Recall, as a share of the best choice's", ".3f"),
            "heaviest": ("How often the heaviest page is chosen", ".3f"),
            "forced": ("Log-probability a token less dense attention's, by force", "+.3f"),
        }
        found = {}
        for measure, (heading, style) in headings.items():
            # The share is one of two means, so its difference is the recall's.
            compared = "recall" if measure == "share" else measure
            for context in self.contexts:
                columns = [
                    report.Column("name", "variant"),
                    report.Column("parameters", "M", ".2f"),
                ]
                budgets = [
                    budget
                    for budget in self.budgets
                    if measure != "forced"
                    or any((DEFAULT, (kind, context, budget)) in self._marks for kind in self.kinds)
                ]
                if not budgets:
                    continue
                for kind in self.kinds:
                    for budget in budgets:
                        key = cell_key((kind, context, budget))
                        columns.append(report.Column(f"{measure}_{key}", f"{kind} {budget}", style))
                    key = cell_key((kind, context, budgets[0]))
                    what = "of recall, " if measure == "share" else ""
                    columns.append(
                        report.Column(
                            f"{compared}_{key}_difference",
                            f"{what}{kind} {budgets[0]}, difference",
                        )
                    )
                found[f"{heading}, {context:,} tokens"] = tuple(columns)
        return found

    def draw(self, names: Sequence[str], title: str, path: Path) -> None:
        """The curves over the tokens, at the smallest budget."""
        from matplotlib import colormaps

        budget = self.budgets[0]
        cells = [(k, c, budget) for c in self.contexts for k in self.kinds]
        figure, axes = make_panels(2 * len(cells), 4.6, 3.6)
        colours = colormaps["tab20"](range(20))
        figures = {"share of the best choice": share, "heaviest page": heaviest}
        panels = [(cell, what) for what in figures for cell in cells]
        for axis, (cell, what) in zip(axes, panels, strict=True):
            for number, name in enumerate(names):
                axis.plot(
                    [count / 1e6 for count in self.tokens],
                    self.curve(name, cell, figures[what]),
                    label=name,
                    color=colours[number % len(colours)],
                    linestyle=("-", "--", ":")[number // len(colours) % 3],
                    marker="o",
                    markersize=3,
                    linewidth=2.4 if name == DEFAULT else 1.2,
                )
            name_panel(
                axis, f"{cell[0]}, {cell[1]:,} tokens, budget {budget}", "million tokens", what
            )
        add_legend(figure, axes)
        figure.suptitle(title, fontsize=10)
        figure.savefig(path, dpi=110)


def share(points: Sequence[Point]) -> float:
    """Recall over that of the best choice."""
    best = sum(point.recall.best for point in points)
    return sum(point.recall.found for point in points) / best if best else float("nan")


def heaviest(points: Sequence[Point]) -> float:
    """How often the heaviest page is chosen."""
    return fmean(point.recall.heaviest for point in points)


MEASURES: dict[str, Callable[[Point], float]] = {
    "recall": lambda point: point.recall.found,
    "heaviest": lambda point: point.recall.heaviest,
}


def cell_key(cell: Cell) -> str:
    """Of a row."""
    return "_".join(map(str, cell))


def _transposed(points: Sequence[Point]) -> dict[str, list[float]]:
    rows = [asdict(point.recall) for point in points]
    return {field: [row[field] for row in rows] for field in rows[0]}


def _difference(mine: Sequence[float], plain: Sequence[float]) -> str:
    found = [a - b for a, b in zip(mine, plain, strict=True)]
    low, high = student(found)
    return f"{fmean(found):+.3f} ({low:+.3f} to {high:+.3f})"
