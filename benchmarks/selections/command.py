"""The command `selections`."""

from __future__ import annotations

import tempfile
import time
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer

from benchmarks import machine, report
from benchmarks.children import ChildError, engine_env, run_child
from benchmarks.marks.command import REFUSALS
from benchmarks.marks.heads import load_head
from benchmarks.marks.inputs import DTYPES, load_model, make_prompts, names, numbers
from benchmarks.real.options import ModelFolder, NamedHeads, TestTexts
from benchmarks.real.settings import OptionError, parse_heads
from benchmarks.selections import plots
from benchmarks.selections.buffers import DECILES, Policy
from benchmarks.selections.emulated import Chooser, measure
from benchmarks.selections.engine import Load, run_engine
from benchmarks.selections.scored_steps import Course
from benchmarks.selections.tally import STRETCHES, share_figures

KINDS = ("text", "generation")
SERVINGS = ("dense", "own", "own-look")
ATTENTION = "the model's attention"
ENGINE = "engine"


def tables() -> dict[str, tuple[report.Column, ...]]:
    """All of them; the last two show what the emulation alone knows."""
    setting = (
        report.Column("kind", "text"),
        report.Column("by", "pages chosen by"),
        report.Column("budget", "budget", ",d"),
    )
    buffers = (
        report.Column("stickiness", "stickiness", "g"),
        report.Column("slots", "slots", "g"),
    )
    return {
        "Missed a step, as a share of what is selected": (
            *setting,
            *buffers,
            report.Column("share", "missed, mean", ".1%"),
            report.Column("p50", "median step", ".1%"),
            report.Column("p90", "90th percentile", ".1%"),
            report.Column("overlap", "selected the step before", ".1%"),
            report.Column("free_overlap", "the same, no sinks and recents", ".1%"),
            report.Column("repeated", "repeated text", ".1%"),
        ),
        f"Missed by stretch of the run, {STRETCHES} of equal length": (
            *setting,
            *buffers,
            *(report.Column(f"stretch_{n}", str(n + 1), ".1%") for n in range(STRETCHES)),
        ),
        "Missed of what is selected there, by tenth of the context from its beginning": (
            *(
                report.Column(f"{column.key}_placed", column.heading, column.style)
                for column in setting
            ),
            *(report.Column(f"place_{n}", str(n + 1), ".1%") for n in range(DECILES)),
        ),
    }


def main(
    model: ModelFolder,
    texts: TestTexts,
    head: NamedHeads = None,
    context: Annotated[int, typer.Option(help="Tokens of a text.", min=256)] = 8064,
    steps: Annotated[
        int, typer.Option(help="Of these, the last that are decode steps.", min=16)
    ] = 2048,
    prompts: Annotated[int, typer.Option(help="Texts, all at once.", min=1)] = 16,
    kinds: Annotated[
        str, typer.Option(help="text: the steps are forced; generation: they are greedy.")
    ] = ",".join(KINDS),
    budgets: Annotated[
        str, typer.Option(help="Tokens per KV head that a step reads.")
    ] = "128,256,512,1024,2048",
    stickiness: Annotated[str, typer.Option(help="The engine's setting.")] = "0,1,3",
    slots: Annotated[str, typer.Option(help="Size of the hot buffers, in budgets.")] = "1,2",
    serving: Annotated[
        str,
        typer.Option(
            help="What the emulated heads see: dense, the states of one dense run that all "
            "settings follow; own, those of a sparse run for each setting; own-look, with the "
            "last look."
        ),
    ] = "dense",
    attention: Annotated[
        bool, typer.Option(help="Whether the model's own attention chooses too.")
    ] = True,
    emulate: Annotated[bool, typer.Option(help="Whether to follow them in transformers.")] = True,
    engine: Annotated[
        bool, typer.Option(help="Whether to count them in an engine with two tiers.")
    ] = True,
    dtype: Annotated[str, typer.Option(help="auto: float32 on a CPU, bfloat16 on a GPU.")] = "auto",
    minutes: Annotated[float, typer.Option(help="Begin nothing after so many.", min=0)] = 60.0,
    seed: Annotated[int, typer.Option(help="Another one draws other texts.")] = 0,
    label: Annotated[str, typer.Option(help="Word that joins the result's name.")] = "",
    out: Annotated[Path, typer.Option(help="Folder of the result files.")] = report.RESULTS,
) -> None:
    """How the selections of real text and long generations change from step to step, and what hot
    buffers miss of them. Exit code 1 if anything failed.
    """
    deadline = time.monotonic() + 60 * minutes
    on_gpu = bool(machine.gpus())
    if dtype == "auto":
        dtype = "bfloat16" if on_gpu else "float32"
    try:
        policies = [
            Policy(budget, sticky, size)
            for budget in numbers("--budgets", budgets)
            for size in numbers("--slots", slots, float)
            for sticky in numbers("--stickiness", stickiness, float)
        ]
        for policy in policies:
            policy.check()
        wanted_kinds = names("--kinds", kinds, KINDS)
        (served,) = names("--serving", serving, SERVINGS)
        names("--dtype", dtype, DTYPES)
        tokens = make_prompts(model, texts, ["text"], context, steps, prompts, seed)["text"]
        folders = parse_heads(model, head or [])
        loads = {
            key: Load(str(model), str(folder), dtype, prompts, context, policies, on_gpu)
            for key, folder in folders.items()
            if engine
        }
        for load in loads.values():
            load.arguments()  # refuses what cannot be
    except REFUSALS as error:
        typer.echo(str(error), err=True)
        raise typer.Exit(2) from None
    words = [model.resolve().name, *([label] if label else [])]
    details: dict[str, Any] = {
        "model": str(model),
        "heads": {key: str(folder) for key, folder in folders.items()},
        "context": context,
        "steps": steps,
        "prompts": prompts,
        "serving": served,
        "dtype": dtype,
        "seed": seed,
        "steady_shares": {},
        "stats": {},
    }
    title = (
        f"Selections of {model.resolve().name}: {prompts} texts of {context:,} tokens, the last "
        f"{steps:,} decoded"
    )
    result = report.Report("-".join(["selections", *words]), title, tables(), details=details)
    result.notes += [
        "Slots: size of a hot buffer, in budgets. A text's first step, which misses its whole "
        "selection, is left out, and a page that a step begins is no miss.",
        f"Rows without `{ENGINE}` are followed in transformers, with the engine's own hot buffers: "
        + {
            "dense": "all of them follow one dense run, so that heads see its states.",
            "own": "each in a sparse run of its own.",
            "own-look": "each in a sparse run of its own, with the last look.",
        }[served]
        + f" {ATTENTION.capitalize()}: a page's largest weight in any layer of a dense run.",
        "Generation is greedy and goes on behind the end of a text; repeated: share of its runs of "
        "8 tokens that stood there before. Text that goes in circles selects the same pages.",
    ]

    def in_time() -> bool:
        return time.monotonic() < deadline

    def add(kind: str, by: str, policy: Policy, figures: dict[str, Any]) -> None:
        result.rows.append(make_row(kind, by, policy, figures))
        details["steady_shares"][f"{kind}, {by}, {policy.name}"] = figures["shares"]
        typer.echo(f"{kind}, {by}, {policy.name}: {figures['share']:.1%} a step")

    if emulate:
        teacher = load_model(model, dtype)
        choosers = [Chooser(ATTENTION)] if attention else []
        try:
            for key, folder in folders.items():
                loaded = load_head(folder, teacher, context)
                if loaded.spec.layer_groups > 1:
                    raise OptionError(
                        f"--head: {folder} has queries for {loaded.spec.layer_groups} groups of "
                        "layers, and this case follows one selection; give another head."
                    )
                choosers.append(Chooser(key, loaded, served != "dense", "look" in served))
        except REFUSALS as error:
            typer.echo(str(error), err=True)
            raise typer.Exit(2) from None
        for kind in wanted_kinds:
            course = Course(tokens.to(teacher.device), context - steps, kind == "text")
            for chooser in choosers:
                for policy, figures in measure(teacher, chooser, policies, course, in_time):
                    add(kind, chooser.name, policy, figures)
                result.write(out)
        del teacher, choosers
        torch.cuda.empty_cache()  # the engine's memory
    courses = {kind: (tokens.tolist(), context - steps, kind == "text") for kind in wanted_kinds}
    for key, load in loads.items():
        log = Path(tempfile.mkdtemp(prefix="specontext-bench-")) / f"{key}.log"
        typer.echo(f"starting an engine with the head {key} (log {log})")
        seconds = max(1.0, deadline - time.monotonic())
        try:
            for what, value in run_child(
                run_engine, load, courses, log=log, seconds=seconds, env=engine_env(on_gpu, 4)
            ):
                if what == "policy":
                    kind, policy, counted = value
                    by = f"{key}, {ENGINE}"
                    details["stats"][f"{kind}, {by}, {policy.name}"] = counted["stats"]
                    missed, selected = np.asarray(counted["steps"], dtype=float).T
                    add(kind, by, policy, share_figures(missed / selected))
                    result.write(out)
        except ChildError as error:
            result.failures[f"engine with {key}"] = str(error)
    if not in_time():
        result.failures["--minutes"] = f"{minutes:g} were over before everything was measured"
    path = result.write(out)
    picture = path.with_name(f"{path.stem}.png")
    if plots.draw(result.rows, title, picture):
        typer.echo(f"written: {picture}")
    result.show()
    raise typer.Exit(1 if result.failures else 0)


def make_row(kind: str, by: str, policy: Policy, figures: dict[str, Any]) -> dict[str, Any]:
    """A row of ``tables``; that by place only with the smallest buffers and without stickiness,
    where what is missed is what is new.
    """
    row = {"kind": kind, "by": by, **asdict(policy), **figures}
    row |= {f"stretch_{n}": share for n, share in enumerate(figures["by_stretch"])}
    if policy.slots == 1 and policy.stickiness == 0 and "missed_by_place" in figures:
        row |= {"kind_placed": kind, "by_placed": by, "budget_placed": policy.budget}
        row |= {f"place_{n}": share for n, share in enumerate(figures["missed_by_place"])}
    del row["shares"]
    return row
