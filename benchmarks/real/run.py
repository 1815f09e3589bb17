"""Cells as engines answer them, and the files made of them."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import typer

from benchmarks import report
from benchmarks.children import ChildError, engine_env, run_child
from benchmarks.prefilled import EngineSpec
from benchmarks.real import figures, plots, tables
from benchmarks.real.engine import Generation, run_engine
from benchmarks.real.prompts import Group, Task
from benchmarks.real.settings import Setting, dense_setting
from benchmarks.real.store import Cell, Store
from benchmarks.real.tasks import Sources


@dataclass
class Run:
    """Cells as they come in, and the files made of them."""

    tasks: dict[str, Task]
    groups: list[Group]
    settings: list[Setting]
    store: Store
    result: report.Report
    out: Path
    notes: list[str] = field(init=False)

    def __post_init__(self) -> None:
        self.notes = list(self.result.notes)

    def cells(self) -> dict[Cell, dict[str, Any]]:
        """What is there, in the order of the tables."""
        out = {}
        for group in self.groups:
            for setting in self.settings:
                result = self.store.get(group, setting)
                if result is not None:
                    out[Cell(group.task, group.context, setting)] = result
        return out

    def missing(self, settings: list[Setting]) -> list[tuple[Group, list[Setting]]]:
        """What is still to be asked of these settings; nothing of a task from the context on in
        which dense cannot do it.
        """
        out: list[tuple[Group, list[Setting]]] = []
        failed: set[str] = set()
        for group in self.groups:
            found = self.store.get(group, dense_setting())
            if found is not None and self.tasks[group.task].says_nothing(found["scores"]):
                failed.add(group.task)
            open_ = [s for s in settings if self.store.get(group, s) is None]
            if open_ and group.task not in failed:
                out.append((group, open_))
        return out

    def add(self, group: Group, setting: Setting, result: dict[str, Any]) -> None:
        """Keep a new cell and the run that measured it."""
        self.store.put(group, setting, {**result, "run": self.result.run()})

    def write(self) -> list[dict[str, Any]]:
        """Tables, CSV and pictures of what is there; returns the lines of the CSV."""
        cells = self.cells()
        lines = figures.figures(cells, self.tasks)
        self.result.rows, self.result.tables = tables.rows(lines), tables.tables(lines)
        self.result.details["scores"] = {
            cell.name: [round(score, 5) for score in result["scores"]]
            for cell, result in cells.items()
        }
        absent = sum(len(open_) for _, open_ in self.missing(self.settings))
        left = (
            [f"{absent} cells have not been measured; run the command again to measure them."]
            if absent
            else []
        )
        made = ((result["run"], f"{cell.task} at {cell.context}") for cell, result in cells.items())
        self.result.notes = [*self.notes, *report.run_notes(made), *left]
        path = self.result.write(self.out)
        figures.write_csv(path.with_suffix(".csv"), lines)
        plots.draw(lines, path.with_suffix(""), self.result.title.partition(":")[0])
        return lines


def fill(
    run: Run,
    spec: EngineSpec,
    settings: list[Setting],
    sources: Sources,
    generation: Generation,
    log: Path,
    seconds: float,
) -> None:
    """Have an engine answer what is missing of its settings; every cell is kept as soon as it is
    there.
    """
    missing = run.missing(settings)
    if not missing:
        return
    count = sum(len(open_) for _, open_ in missing)
    how = f"head {Path(spec.head).name}" if spec.head else "no head"
    typer.echo(f"an engine with {how}{', eager' if spec.eager else ''}: {count} cells")
    try:
        for kind, value in run_child(
            run_engine,
            spec,
            missing,
            sources,
            generation,
            log=log,
            seconds=seconds,
            env=engine_env(spec.on_gpu, cpu_kv_gib=4),
        ):
            if kind == "ready":
                run.result.details.setdefault("engines", []).append(value)
                typer.echo(f"  ready after {value['start_s']} s")
            elif kind == "prefilled":
                index, took = value
                group = missing[index][0]
                typer.echo(f"  {group.task}, {group.context} tokens: prefilled in {took:.0f} s")
            elif kind == "failed":
                index, setting, why = value
                group = missing[index][0]
                run.result.failures[Cell(group.task, group.context, setting).name] = why
                typer.echo(f"    {setting.name}: failed: {why}")
            else:
                index, setting, cell = value
                run.add(missing[index][0], setting, cell)
                value = figures.mean(cell["scores"])
                typer.echo(f"    {setting.name}: {value:.3f}, {cell['seconds']:.1f} s")
    except ChildError as error:
        run.result.failures[f"engine ({how})"] = str(error)
