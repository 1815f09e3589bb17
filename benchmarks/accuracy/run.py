"""Cells as an engine answers them, and the files made of them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import typer

from benchmarks import report
from benchmarks.accuracy import plots, summary, wanted
from benchmarks.accuracy.cells import DENSE, Cell, CellStore, Group, Setting
from benchmarks.accuracy.engine import run_engine
from benchmarks.accuracy.grid import Grid
from benchmarks.children import ChildError, engine_env, run_child
from benchmarks.prefilled import EngineSpec


@dataclass
class Run:
    """Cells as they come in, and the files made of them."""

    grid: Grid
    groups: list[Group]
    store: CellStore
    result: report.Report
    out: Path
    other: dict[str, Any] | None = None

    def __post_init__(self) -> None:
        self.notes = list(self.result.notes)
        wanted = (
            (group, setting)
            for group in self.groups
            for setting in self.grid.settings(group.context)
        )
        found = (
            (group.cell(setting), self.store.get(group.cell(setting), group.digest))
            for group, setting in wanted
        )
        self.cells = {cell: result for cell, result in found if result is not None}

    def missing(self) -> list[tuple[Group, list[Setting]]]:
        """What is still to be asked; nothing of a task from the context on in which dense cannot do
        it.
        """
        out: list[tuple[Group, list[Setting]]] = []
        failed: set[str] = set()
        for group in self.groups:
            dense = self.cells.get(group.cell(Setting(DENSE)))
            if dense is not None and summary.says_nothing(
                self.grid.tasks[group.task], dense["scores"]
            ):
                failed.add(group.task)
            settings = [
                setting
                for setting in self.grid.settings(group.context)
                if group.cell(setting) not in self.cells
            ]
            if settings and group.task not in failed:
                out.append((group, settings))
        return out

    def add(self, group: Group, setting: Setting, result: dict[str, Any]) -> None:
        """Keep a new cell and the run that measured it."""
        result = {**result, "run": self.result.run()}
        self.store.put(group.cell(setting), group.digest, result)
        self.cells[group.cell(setting)] = result

    def ordered(self) -> dict[Cell, dict[str, Any]]:
        """The cells in the grid's order, whatever run they came from."""
        wanted = (
            group.cell(setting)
            for group in self.groups
            for setting in self.grid.settings(group.context)
        )
        return {cell: self.cells[cell] for cell in wanted if cell in self.cells}

    def write(self) -> None:
        """Tables, CSV and pictures of what is there."""
        cells = self.ordered()
        lines = summary.all_figures(cells, self.grid.tasks)
        figures, tables = summary.rows(lines), summary.tables(lines)
        scores = {cell: result["scores"] for cell, result in cells.items()}
        compared = wanted.rows(scores, self.grid.tasks)
        if compared:
            tables = {"What was wanted": wanted.COLUMNS, **tables}
        if self.other is not None:
            compared += wanted.rows_against(
                scores, self.other["details"]["scores"], self.grid.tasks
            )
            tables = {f"Less the same cells of: {self.other['title']}": wanted.AGAINST, **tables}
        self.result.rows, self.result.tables = compared + figures, tables
        self.result.details |= {
            "scores": {cell.name: values for cell, values in scores.items()},
            "wanted": wanted.counts(compared),
        }
        # Cells of old folders may not say which run measured them.
        parts = (
            (result.get("run", {}), f"{cell.task} at {cell.context}")
            for cell, result in cells.items()
        )
        absent = sum(len(settings) for _, settings in self.missing())
        left = (
            [
                f"{absent} cells of this grid have not been measured; run the command again to "
                "measure them."
            ]
            if absent
            else []
        )
        self.result.notes = [*self.notes, *report.run_notes(parts), *left]
        path = self.result.write(self.out)
        summary.write_csv(path.with_suffix(".csv"), lines)
        plots.draw(lines, figures, path.with_suffix(""), self.grid.model.resolve().name)


def fill(run: Run, spec: EngineSpec, longbench: Path | None, folder: Path, seconds: float) -> None:
    """Have an engine answer what is missing; every cell is kept as soon as it is there."""
    missing = run.missing()
    count = sum(len(settings) for _, settings in missing)
    typer.echo(f"{len(run.cells)} cells are there, up to {count} are to be measured ({folder})")
    if not missing:
        return
    env = engine_env(spec.on_gpu, cpu_kv_gib=4)
    try:
        log = folder / "engine.log"
        for kind, value in run_child(
            run_engine, spec, missing, longbench, log=log, seconds=seconds, env=env
        ):
            if kind == "ready":
                run.result.details["engine"] = value
                typer.echo(f"engine: ready after {value['start_s']} s")
            elif kind == "prefilled":
                index, took = value
                typer.echo(
                    f"{missing[index][0].task}, {missing[index][0].context} tokens: prompts "
                    f"prefilled in {took:.0f} s"
                )
            elif kind == "failed":
                index, setting, why = value
                run.result.failures[missing[index][0].cell(setting).name] = why
                typer.echo(f"  {setting.name}: failed: {why}")
            else:
                index, setting, cell = value
                run.add(missing[index][0], setting, cell)
                task = run.grid.tasks[missing[index][0].task]
                typer.echo(
                    f"  {setting.name}: {summary.value(task, cell['scores']):.3f}, "
                    f"{cell['seconds']:.1f} s"
                )
    except ChildError as error:
        run.result.failures["engine"] = str(error)
