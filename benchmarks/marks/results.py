"""Marks as lines of JSON, and as a table."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, TextIO

import numpy as np

from benchmarks import report
from benchmarks.intervals import student
from benchmarks.marks.measuring import DENSE, Mark, Size


@dataclass
class Column:
    """All pieces of one kind, chosen for by one chooser with one size.

    Attributes:
        log_probs, dense: of each piece, the mean over its scored tokens.
    """

    log_probs: list[float] = field(default_factory=list)
    dense: list[float] = field(default_factory=list)
    read: list[float] = field(default_factory=list)

    @property
    def differences(self) -> list[float]:
        return [a - b for a, b in zip(self.log_probs, self.dense, strict=True)]

    def figures(self) -> dict[str, Any]:
        """Mean difference to dense attention, its standard error and 95 % interval (Student's)."""
        found = np.asarray(self.differences)
        low, high = student(found.tolist())
        error = float(found.std(ddof=1)) / len(found) ** 0.5 if len(found) > 1 else float("nan")
        return {
            "difference": float(found.mean()),
            "error": error,
            "low": low,
            "high": high,
            "pieces": len(found),
        }


class Results:
    """Collects marks; each is also a line of ``lines`` at once.

    A line: kind, by, budget, recent_tokens, read (tokens in the pages that a KV head read),
    log_probs and dense (of each piece), and the figures of all pieces so far.
    """

    def __init__(self, lines: TextIO) -> None:
        self.lines = lines
        self.columns: dict[tuple[str, Size | None], dict[str, Column]] = {}
        self._dense: list[float] = []

    def add(self, kind: str, mark: Mark) -> str:
        """Take in a mark of some pieces, that of ``DENSE`` first; one line for people."""
        if mark.by == DENSE:
            self._dense = mark.log_probs
        column = self.columns.setdefault((mark.by, mark.size), {}).setdefault(kind, Column())
        column.log_probs += mark.log_probs
        column.dense += self._dense
        column.read += [mark.read] * len(mark.log_probs)
        figures = column.figures()
        size = (
            {}
            if mark.size is None
            else {"budget": mark.size.budget, "recent_tokens": mark.size.recent_tokens}
        )
        line = {
            "kind": kind,
            "by": mark.by,
            **size,
            "read": mark.read,
            "log_probs": mark.log_probs,
            "dense": self._dense,
            **figures,
        }
        print(json.dumps(line), file=self.lines, flush=True)
        told = ", ".join(f"{key} {value}" for key, value in size.items())
        if mark.size is None:
            return f"{kind}: {mark.by} {np.mean(column.log_probs):+.3f} a token"
        return f"{kind}, {told}: {mark.by} {figures['difference']:+.3f} ({figures['error']:.3f})"

    def rows(self) -> list[dict[str, Any]]:
        """Rows of ``table``, the dense one first, then by size."""
        found = []
        for (by, size), kinds in sorted(self.columns.items(), key=lambda item: _order(item[0][1])):
            read = [value for column in kinds.values() for value in column.read]
            row: dict[str, Any] = {"by": by, "read": float(np.mean(read))}
            if size is not None:
                row |= {"budget": size.budget, "recent_tokens": size.recent_tokens}
            for kind, column in kinds.items():
                if size is None:
                    row[kind] = f"{np.mean(column.log_probs):.3f} a token"
                    continue
                figures = column.figures()
                row[kind] = f"{figures['difference']:+.3f} ({figures['error']:.3f})"
                row[f"{kind}_interval"] = f"{figures['low']:+.2f} to {figures['high']:+.2f}"
                row[f"{kind}_figures"] = figures
            found.append(row)
        return found


def _order(size: Size | None) -> tuple[int, int]:
    return (0, 0) if size is None else (size.budget, size.recent_tokens)


def table(kinds: Sequence[str]) -> dict[str, tuple[report.Column, ...]]:
    """The table of these kinds of prompts."""
    return {
        "Log-probability a token less dense attention's (standard error)": (
            report.Column("by", "pages chosen by"),
            report.Column("budget", "budget", ",d"),
            report.Column("recent_tokens", "recents", "d"),
            report.Column("read", "read", ",.0f"),
            *(
                column
                for kind in kinds
                for column in (
                    report.Column(kind, kind),
                    report.Column(f"{kind}_interval", "95 %"),
                )
            ),
        )
    }
