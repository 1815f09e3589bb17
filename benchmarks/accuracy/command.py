"""The command: reads the options, asks an engine for the cells that are missing, writes tables, CSV
and pictures.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, get_args

import typer

from benchmarks import report
from benchmarks.accuracy import plots, summary, wanted
from benchmarks.accuracy.cells import DENSE, Cell, CellError, CellStore, Group, Setting
from benchmarks.accuracy.engine import EngineSpec, run_engine
from benchmarks.accuracy.longbench import LongBenchError, find_tasks, read_folder
from benchmarks.accuracy.tasks import TASKS, PromptError, Task, Writer
from benchmarks.children import ChildError, engine_env, run_child
from benchmarks.machine import device_slug, facts, gpus
from benchmarks.shapes import DEMO_MODEL
from specontext_vllm.config import PAGE_SIZE, ConfigError, HeadKeyDtype, Retriever, pages_for

WORK = Path(__file__).parents[1] / ".work"
CONTEXTS = (4096, 8192, 16384, 32768)
BUDGETS = (64, 128, 256, 512, 1024, 2048, 4096)
THRESHOLDS = (0.05, 0.1, 0.15, 0.2, 0.3, 0.5)
ENGINE_SECONDS = 6 * 3600
PER_LAYER = frozenset({"quest", "oracle"})
"""Retrievers that select in each layer's forward pass, which a captured decode graph does not hold.
"""


class OptionError(ValueError):
    """An option that cannot be used; the message is one sentence."""


@dataclass(frozen=True)
class Grid:
    """What is asked for, checked."""

    model: Path
    head: str | None
    tasks: dict[str, Task]
    retrievers: list[str]
    budgets: list[int]
    contexts: list[int]
    prompts: int
    thresholds: list[float]
    threshold_budget: int

    def settings(self, context: int) -> list[Setting]:
        """Dense first, then every retriever with every budget that is less than the context, then
        the thresholds of the fallback.
        """
        out = [Setting(DENSE)]
        out += [
            Setting(name, budget)
            for name in self.retrievers
            if name != DENSE
            for budget in self.budgets
            if budget < context
        ]
        out += [
            Setting("dlm", self.threshold_budget, threshold)
            for threshold in self.thresholds
            if threshold
        ]
        return out

    def groups(self, writer: Writer) -> list[Group]:
        """All prompts, the shorter contexts first."""
        return [
            Group(
                name,
                context,
                [
                    task.make(writer, seed, context)
                    for seed in range(min(self.prompts, task.count or self.prompts))
                ],
            )
            for context in self.contexts
            for name, task in self.tasks.items()
        ]


def _numbers(option: str, text: str, kind: type) -> list[Any]:
    try:
        found = sorted({kind(part) for part in text.split(",")})
    except ValueError:
        raise OptionError(f"{option}: found {text!r}; give numbers separated by commas.") from None
    if found[0] < 0:
        raise OptionError(f"{option}: found {found[0]}; give positive numbers.")
    return found


def _names(option: str, text: str | None, known: Sequence[str]) -> list[str]:
    names = list(known) if text is None else text.split(",")
    for name in names:
        if name not in known:
            raise OptionError(f"{option}: found {name!r}; use some of {', '.join(known)}.")
    return names


def _longest(model: Path) -> int:
    from transformers import AutoConfig

    return int(AutoConfig.from_pretrained(str(model)).get_text_config().max_position_embeddings)


def _find_head(
    model: Path, head: str | None, retrievers: str | None
) -> tuple[str | None, list[str]]:
    """The head, and the retrievers that can run with it."""
    beside = model / "retrieval_head"
    head = head or (str(beside) if beside.is_dir() else None)
    known = list(get_args(Retriever))
    names = _names("--retrievers", retrievers, known)
    if head is None and "dlm" in names:
        if retrievers is not None:
            raise OptionError(
                f"--retrievers: dlm needs a retrieval head and {model} has no retrieval_head "
                "folder; name one with --head."
            )
        names.remove("dlm")
    return head, names


def _own_head(model: Path, head: str | None) -> list[str]:
    """Words that a run with another head than the model's own has in its file names, so that it
    writes over no other; else none.
    """
    if head is None or Path(head).resolve() == (model / "retrieval_head").resolve():
        return []
    return ["head", re.sub(r"[^\w.]+", "-", Path(head).resolve().name).strip("-.")]


def _label(text: str | None) -> list[str]:
    if text is not None and not re.fullmatch(r"[\w.]+", text):
        raise OptionError(
            f"--label: found {text!r}; give one word of letters, digits, dots and underscores."
        )
    return [text] if text else []


def _other(path: Path | None, groups: Sequence[Group]) -> dict[str, Any] | None:
    """The result to compare with.

    Raises:
        OptionError: it is none, or has other numbers of prompts.
    """
    if path is None:
        return None
    try:
        other = json.loads(path.read_text())
        title, scores = other["title"], other["details"]["scores"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise OptionError(
            f"--against: {path} is no result of this case ({type(error).__name__}); give its JSON "
            "file."
        ) from None
    for group in groups:
        found = {
            len(values)
            for name, values in scores.items()
            if name.startswith(f"{group.task}, {group.context}, ")
        }
        if found - {len(group.examples)}:
            raise OptionError(
                f"--against: {path} ({title}) has {found.pop()} prompts of {group.task} at "
                f"{group.context} tokens, this grid has "
                f"{len(group.examples)}; compare results over the same prompts."
            )
    return other


def _weights(folder: Path) -> dict[str, list[int]]:
    """Size and time of the weight files, by which another model in the same place is told."""
    return {
        file.name: [file.stat().st_size, int(file.stat().st_mtime)]
        for file in sorted(folder.glob("*.safetensors"))
    }


def _settings(grid: Grid, spec: EngineSpec, machine: dict[str, Any]) -> dict[str, Any]:
    """What must be the same for cells to stand in one table."""
    return {
        "model": str(grid.model.resolve()),
        "config": hashlib.sha256((grid.model / "config.json").read_bytes()).hexdigest()[:16],
        "weights": _weights(grid.model),
        "retrieval head": {"source": grid.head, **(_weights(Path(grid.head)) if grid.head else {})},
        "dtype": spec.dtype,
        "head keys": spec.head_keys,
        "device": device_slug(machine),
        "CUDA graphs": not spec.eager,
        "vllm": machine["packages"]["vllm"],
        "code": _code(),
    }


def _code() -> str:
    """Digest of the code that makes and scores the replies."""
    root = Path(__file__).parents[2]
    rooms = (
        root / "specontext_vllm" / name
        for name in ("attention", "engine", "residency", "retrieval", "triton_kernels")
    )
    files = [Path(__file__).with_name("metrics.py"), root / "specontext_vllm" / "config.py"]
    files += [file for room in rooms for file in room.glob("*.py")]
    return hashlib.sha256(b"".join(file.read_bytes() for file in sorted(files))).hexdigest()[:16]


def _notes(grid: Grid, spec: EngineSpec, left_out: Sequence[str]) -> list[str]:
    floors = ", ".join(sorted({f"{task.floor:g}" for task in grid.tasks.values()}))
    graphs = "without CUDA graphs, so that retrievers can be switched (speed with graphs: `python -m benchmarks speed`)"
    notes = [
        "Greedy replies; values with 95 % intervals: Wilson for right or wrong, bootstrap over the "
        "prompts for scores and perplexity. "
        "Prefill is dense, and so is the first token of each reply, which prefill makes.",
        *(f"{name.replace('_', ' ')}: {task.about}." for name, task in grid.tasks.items()),
        f"† dense attention itself scores less than the task's floor ({floors}): the model cannot "
        "do the task, so it says nothing about "
        "a retriever; its other cells and longer contexts are left out, and it is not in the "
        "means.",
        "Always read: the first page and the newest 64 tokens (the defaults); with budgets under "
        "112, which have no room for both and a "
        "page to choose, the newest quarter of the budget instead.",
        f"The head's keys (head_key_dtype): {spec.head_keys}.",
        "Mean: over the tasks scored in 0 to 1. Pages read: of all pages that the decode steps "
        "could have read. Kept mass: share of "
        "the head's own attention that lies on them, its confidence. Tokens/s: emitted by up to 16 "
        "requests together, prompts in the "
        f"prefix cache, {graphs if spec.eager else 'with CUDA graphs'}.",
    ]
    if grid.thresholds:
        notes.append(
            f"Confidence fallback: dlm with a budget of {grid.threshold_budget}; a row whose kept "
            "mass is under the threshold reads "
            "four times that."
        )
    if grid.head is None and "dlm" not in grid.retrievers:
        notes.append(
            "dlm was left out: no retrieval head was given or found in the model's folder."
        )
    if "dlm" in grid.retrievers:
        notes.append(wanted.NOTE)
    if left_out:
        notes.append(f"LongBench files left out (not English or code): {', '.join(left_out)}.")
    return notes


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
        """Keep a new cell, and of which run it is."""
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
        # Cells of before 2026-11-25 do not say of which run they are.
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


def main(
    model: Annotated[Path, typer.Option(help="Model folder.")] = DEMO_MODEL,
    head: Annotated[
        str | None,
        typer.Option(
            help="Retrieval head: folder or hub id; its name joins the result's. Default: the model's own."
        ),
    ] = None,
    tasks: Annotated[
        str | None,
        typer.Option(help=f"Some of {','.join(TASKS)}, or longbench/DATASET. Default: all."),
    ] = None,
    retrievers: Annotated[
        str | None,
        typer.Option(
            help=f"Some of {','.join(get_args(Retriever))}; dense is always measured. Default: all."
        ),
    ] = None,
    budgets: Annotated[
        str, typer.Option(help="Tokens per KV head that a decode step reads.")
    ] = ",".join(map(str, BUDGETS)),
    contexts: Annotated[
        str | None,
        typer.Option(
            help=f"Tokens of a prompt. Default: {', '.join(map(str, CONTEXTS))} as far as the model reaches."
        ),
    ] = None,
    prompts: Annotated[int, typer.Option(min=2, help="Prompts of each task and context.")] = 50,
    thresholds: Annotated[
        str, typer.Option(help="Confidence thresholds of dlm's fallback; 0: none.")
    ] = ",".join(f"{threshold:g}" for threshold in THRESHOLDS),
    threshold_budget: Annotated[
        int | None, typer.Option(help="Budget they are tried with. Default: the smallest.")
    ] = None,
    longbench: Annotated[
        Path | None, typer.Option(help="Folder of LongBench's JSONL files.")
    ] = None,
    dtype: Annotated[
        str,
        typer.Option(
            help="float32, bfloat16, or auto: float32 on a CPU, the model's own on a GPU."
        ),
    ] = "auto",
    head_keys: Annotated[
        str, typer.Option(help="What the head's keys are kept in: auto, fp8 or model.")
    ] = "auto",
    kv_gib: Annotated[
        float | None,
        typer.Option(
            min=0,
            help="GPU memory for KV, so that several runs can share a GPU. Default: what vLLM finds free.",
        ),
    ] = None,
    against: Annotated[
        Path | None,
        typer.Option(
            help="JSON of an earlier result over the same prompts, with which every cell is compared prompt by prompt."
        ),
    ] = None,
    label: Annotated[
        str | None,
        typer.Option(
            help="Word that joins the result's name, so that another grid over the same model stands beside the first."
        ),
    ] = None,
    work: Annotated[
        Path | None,
        typer.Option(
            help="Folder of finished cells, which a later run goes on from, and of the engine's log."
        ),
    ] = None,
    engine_seconds: Annotated[
        int,
        typer.Option(
            min=1,
            help="Time limit of the engine; cells that it has not measured by then stay open.",
        ),
    ] = ENGINE_SECONDS,
    measure: Annotated[
        bool,
        typer.Option(help="Whether to measure what is missing, or only to write what is there."),
    ] = True,
    out: Annotated[Path, typer.Option(help="Folder of the result files.")] = report.RESULTS,
) -> None:
    """Accuracy by retriever, budget and context, with confidence intervals. Exit code 1 if anything
    failed.
    """
    on_gpu = bool(gpus())
    if dtype == "auto" and not on_gpu:
        dtype = "float32"
    try:
        known = find_tasks(longbench)
        chosen = {name: known[name] for name in _names("--tasks", tasks, list(known))}
        grid = _grid(
            model,
            head,
            chosen,
            retrievers,
            budgets,
            contexts,
            prompts,
            thresholds,
            threshold_budget,
        )
        typer.echo("making the prompts")
        groups = grid.groups(_writer(model))
        spec = _spec(grid, groups, dtype, head_keys, on_gpu, kv_gib)
        machine = facts()
        name, words = model.resolve().name, [*_own_head(model, grid.head), *_label(label)]
        folder = work or WORK / f"{'-'.join(['accuracy', name, *words])}-{device_slug(machine)}"
        title = f"{' '.join([name, *words])}: accuracy by retriever and budget, {prompts} prompts a cell"
        notes = _notes(grid, spec, read_folder(longbench)[1] if longbench else [])
        case = "-".join(
            ["accuracy", *([] if model.resolve() == DEMO_MODEL.resolve() else [name]), *words]
        )
        result = report.Report(case, title, {}, machine=machine, notes=notes)
        run = Run(
            grid,
            groups,
            CellStore(folder, _settings(grid, spec, machine)),
            result,
            out,
            _other(against, groups),
        )
    except (OptionError, PromptError, LongBenchError, CellError, ConfigError) as error:
        typer.echo(str(error), err=True)
        raise typer.Exit(2) from None
    try:
        if measure:
            _fill(run, spec, longbench, folder, engine_seconds)
    finally:
        run.write()
    result.show()
    typer.echo(f"written: {out}")
    raise typer.Exit(1 if result.failures else 0)


def _grid(
    model: Path,
    head: str | None,
    tasks: dict[str, Task],
    retrievers: str | None,
    budgets: str,
    contexts: str | None,
    prompts: int,
    thresholds: str,
    threshold_budget: int | None,
) -> Grid:
    """Check the options.

    Raises:
        OptionError, ConfigError: one cannot be used.
    """
    if not (model / "config.json").exists():
        raise OptionError(f"--model: no config.json in {model}; name a model folder.")
    sizes = _numbers("--budgets", budgets, int)
    fallbacks = [
        threshold for threshold in _numbers("--thresholds", thresholds, float) if threshold
    ]
    lengths = None if contexts is None else _numbers("--contexts", contexts, int)
    found_head, names = _find_head(model, head, retrievers)
    if lengths is None:
        lengths = [context for context in CONTEXTS if context < _longest(model)]
    grid = Grid(
        model,
        found_head,
        tasks,
        names,
        sizes,
        lengths,
        prompts,
        fallbacks if "dlm" in names else [],
        threshold_budget or sizes[0],
    )
    for context in grid.contexts:
        for setting in grid.settings(context):
            setting.changes()
    return grid


def _spec(
    grid: Grid,
    groups: Sequence[Group],
    dtype: str,
    head_keys: str,
    on_gpu: bool,
    kv_gib: float | None,
) -> EngineSpec:
    """The engine that holds the longest prompt with its reply.

    Raises:
        OptionError: the model does not reach so far, or ``head_keys`` is unknown.
    """
    if head_keys not in get_args(HeadKeyDtype):
        raise OptionError(
            f"--head-keys: found {head_keys!r}; use {', '.join(get_args(HeadKeyDtype))}."
        )
    longest = max(
        len(e.prompt) + max(e.reply_tokens, len(e.forced or ()))
        for group in groups
        for e in group.examples
    )
    reach = _longest(grid.model)
    if longest > reach:
        raise OptionError(
            f"--contexts: found {max(grid.contexts)}; with the reply that makes {longest} tokens "
            f"and the model reaches {reach}; use "
            f"shorter ones."
        )
    return EngineSpec(
        model=str(grid.model),
        head=grid.head,
        head_keys=head_keys,
        retriever="quest" if "quest" in grid.retrievers else DENSE,
        dtype=dtype,
        on_gpu=on_gpu,
        eager=not on_gpu or not PER_LAYER.isdisjoint(grid.retrievers),
        max_model_len=min(reach, pages_for(longest + 1) * PAGE_SIZE),
        kv_gib=kv_gib,
    )


def _writer(model: Path) -> Writer:
    from transformers import AutoTokenizer

    return Writer(AutoTokenizer.from_pretrained(str(model)))


def _fill(run: Run, spec: EngineSpec, longbench: Path | None, folder: Path, seconds: float) -> None:
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
