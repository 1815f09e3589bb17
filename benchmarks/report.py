"""Results: a JSON file with everything, and Markdown tables of what matters."""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks import machine

RESULTS = Path(__file__).parent / "results"


@dataclass(frozen=True)
class Column:
    """One column of the table: the row's key, its heading, and the format of a number in it
    (`format` mini-language).
    """

    key: str
    heading: str
    style: str = ""

    def cell(self, row: dict[str, Any]) -> str:
        """The row's value as text; an en dash where there is none."""
        value = row.get(self.key)
        if value is None:
            return "–"
        return (
            format(value, self.style)
            if isinstance(value, int | float) and self.style
            else str(value)
        )


@dataclass
class Report:
    """One run of one case.

    Attributes:
        case: the case's name.
        title: what the table shows, in one line.
        tables: columns of each table by its heading; a table shows the rows that have a value for
            its first column.
        rows: values by column key.
        details: everything else that was measured, JSON-serialisable.
        notes: sentences under the table.
        failures: what failed, and how.
    """

    case: str
    title: str
    tables: Mapping[str, Sequence[Column]]
    rows: list[dict[str, Any]] = field(default_factory=list)
    details: dict[str, Any] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    failures: dict[str, str] = field(default_factory=dict)
    machine: dict[str, Any] = field(default_factory=machine.facts)
    date: str = field(default_factory=lambda: datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"))
    command: str = field(
        default_factory=lambda: shlex.join(["python", "-m", "benchmarks", *sys.argv[1:]])
    )

    @property
    def stem(self) -> str:
        """The name of its files without their ends. It may hold a dot, as of a model's version."""
        return f"{self.case}-{machine.device_slug(self.machine)}"

    def rows_of(self, columns: Sequence[Column]) -> list[dict[str, Any]]:
        """Rows of one table."""
        return [row for row in self.rows if row.get(columns[0].key) is not None]

    def markdown(self) -> str:
        """The tables, the notes, and how to get them again."""
        lines = [f"# {self.title}", ""]
        for heading, columns in self.tables.items():
            lines += [f"## {heading}", ""]
            lines.append("| " + " | ".join(column.heading for column in columns) + " |")
            lines.append("|" + "---|" * len(columns))
            for row in self.rows_of(columns):
                lines.append(
                    "| "
                    + " | ".join(column.cell(row).replace("|", "\\|") for column in columns)
                    + " |"
                )
            lines.append("")
        lines += [f"- {note}" for note in self.notes]
        lines += [f"- **failed: {what}**: {why}" for what, why in self.failures.items()]
        lines += [f"- {machine.describe(self.machine)}", f"- {self.date}: `{self.command}`", ""]
        return "\n".join(lines)

    def write(self, folder: Path) -> Path:
        """Write `<case>-<device>.json` and `.md` (replacing those of an earlier run); returns the
        path of the latter.
        """
        folder.mkdir(parents=True, exist_ok=True)
        content = {
            "case": self.case,
            "title": self.title,
            "date": self.date,
            "command": self.command,
            "machine": self.machine,
            "rows": self.rows,
            "details": self.details,
            "notes": self.notes,
            "failures": self.failures,
        }
        (folder / f"{self.stem}.json").write_text(
            json.dumps(content, indent=1, ensure_ascii=False) + "\n"
        )
        tables = folder / f"{self.stem}.md"
        tables.write_text(self.markdown())
        return tables

    def take_over(self, folder: Path, same: Sequence[str]) -> None:
        """Start from the details and failures that an earlier run of this case left in ``folder``;
        without one, from nothing.

        Args:
            same: keys of ``details`` that must be as they were.

        Raises:
            ValueError: a result that was made otherwise; the message says what differs.
        """
        path = folder / f"{self.stem}.json"
        if not path.exists():
            return
        earlier = json.loads(path.read_text())
        for key in same:
            wanted, found = json.loads(json.dumps(self.details[key])), earlier["details"].get(key)
            if found != wanted:
                raise ValueError(
                    f"--out: {path} was made with another {key} ({found}, now {wanted}); give "
                    "another folder or remove it."
                )
        self.details, self.failures = earlier["details"], earlier["failures"]

    def run(self) -> dict[str, str | None]:
        """What ``run_notes`` tells of this run."""
        where = machine.describe_device(self.machine)
        return {
            "date": self.date,
            "command": self.command,
            "commit": self.machine["commit"],
            "machine": where,
        }

    def show(self) -> None:
        """Print the tables, the notes and the failures."""
        # A pipe has no width; wrapping at 80 columns would tear a table apart.
        console = Console(width=None if sys.stdout.isatty() else 160, highlight=False)
        console.print(self.title, style="bold", markup=False)
        for heading, columns in self.tables.items():
            table = Table(title=heading, title_justify="left")
            for column in columns:
                table.add_column(column.heading, justify="right" if column.style else "left")
            for row in self.rows_of(columns):
                table.add_row(*(column.cell(row) for column in columns))
            console.print(table)
        for note in self.notes:
            console.print(f"- {note}", markup=False)
        for what, why in self.failures.items():
            console.print(f"FAILED {what}: {why}", style="red", markup=False)


def run_notes(made: Iterable[tuple[dict[str, Any], str]]) -> list[str]:
    """Which run made which part of a table, where several did, and on which machine, where those
    differ.

    Args:
        made: of each part its ``Report.run`` (results of before 2026-11-25 have no ``machine``),
            and its name.
    """
    runs: dict[tuple[str | None, ...], dict[str, None]] = {}
    for run, part in made:
        runs.setdefault(
            tuple(run.get(key) for key in ("date", "command", "commit", "machine")), {}
        )[part] = None
    if len(runs) < 2:
        return []
    several = len({machine for *_, machine in runs}) > 1
    told = []
    for (date, command, commit, where), parts in sorted(
        runs.items(), key=lambda item: item[0][0] or ""
    ):
        on = f", on {where or 'a machine that was not recorded'}" if several else ""
        told.append(f"{date} (`{command}`, commit {commit or 'unknown'}{on}): {', '.join(parts)}")
    return ["Several runs made this table. " + "; ".join(told) + "."]
