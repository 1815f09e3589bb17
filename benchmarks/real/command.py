"""The command: reads the options, asks engines for the cells that are missing, writes tables."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Any

import typer

from benchmarks import report
from benchmarks.accuracy.longbench import LongBenchError
from benchmarks.fingerprints import code_digest, folder_digest
from benchmarks.kv_cache import KVGib
from benchmarks.machine import device_slug, facts, gpus
from benchmarks.prefilled import EngineSpec
from benchmarks.real import files, forced, labels, ruler, tables
from benchmarks.real.engine import Generation
from benchmarks.real.leaks import WORDS, Training, check_leaks
from benchmarks.real.options import ModelFolder, NamedHeads, TestTexts
from benchmarks.real.prompts import Group, PromptError, Task
from benchmarks.real.run import Run, fill
from benchmarks.real.settings import (
    DENSE,
    OptionError,
    Setting,
    engines,
    parse_heads,
    parse_numbers,
    parse_variants,
    settings_of,
)
from benchmarks.real.store import Store
from benchmarks.real.tasks import Sources, make_groups
from benchmarks.real.texts import TextError
from specontext_vllm.config import PAGE_SIZE, ConfigError, pages_for
from specontext_vllm.retrieval.rules import find_rule

SCORING = (files, forced, labels, ruler)
"""What scores replies, besides LongBench's metrics."""

WORK = Path(__file__).parents[1] / ".work"
TASKS = "text,copy,niah_single_2"


def main(
    model: ModelFolder,
    texts: TestTexts,
    head: NamedHeads = None,
    tasks: Annotated[str, typer.Option(help="Names separated by commas, or all.")] = TASKS,
    retrievers: Annotated[
        str, typer.Option(help="Besides dense; those with a head run with each head.")
    ] = "dlm,quest",
    variant: Annotated[
        list[str] | None,
        typer.Option(
            help="One more way of choosing: NAME:retriever=dlm,recent_tokens=16. Settings of the "
            "plugin or of the rule; head=NAME for one head only."
        ),
    ] = None,
    budgets: Annotated[
        str, typer.Option(help="Tokens per KV head that a decode step reads.")
    ] = "128,256,512,1024",
    contexts: Annotated[str, typer.Option(help="Tokens of a prompt with its reply.")] = "4096,8064",
    prompts: Annotated[int, typer.Option(min=2, help="Of each task and context.")] = 200,
    seed: Annotated[
        int, typer.Option(help="Another one draws other prompts, and joins the result's name.")
    ] = 0,
    forced_tokens: Annotated[
        int, typer.Option("--forced", min=2, help="Tokens of a forced passage.")
    ] = 128,
    long_tokens: Annotated[int, typer.Option(min=16, help="Tokens that task long writes.")] = 2048,
    temperature: Annotated[
        float, typer.Option(min=0, help="Of long replies; 0: greedy, else drawn from --seed.")
    ] = 0.0,
    qa: Annotated[
        Path | None,
        typer.Option(help="Folder with squad.json and hotpotqa.json, for RULER's qa_1 and qa_2."),
    ] = None,
    longbench: Annotated[
        Path | None, typer.Option(help="Folder of LongBench's JSONL files.")
    ] = None,
    leaks: Annotated[
        list[Path] | None,
        typer.Option(
            help="Files or folders that the head was trained on; prompts that stand there are "
            "refused."
        ),
    ] = None,
    dtype: Annotated[
        str, typer.Option(help="auto: float32 on a CPU, the model's own on a GPU.")
    ] = "auto",
    head_keys: Annotated[
        str, typer.Option(help="What the head's keys are kept in: auto, fp8 or model.")
    ] = "auto",
    requests: Annotated[int, typer.Option(min=1, help="Prompts that are answered at once.")] = 64,
    kv_gib: KVGib = None,
    label: Annotated[str | None, typer.Option(help="Word that joins the result's name.")] = None,
    work: Annotated[
        Path | None,
        typer.Option(help="Folder of finished cells, which a later run goes on with, and of logs."),
    ] = None,
    engine_seconds: Annotated[
        int, typer.Option(min=1, help="Time limit of each engine; the rest stays open.")
    ] = 6 * 3600,
    measure: Annotated[
        bool, typer.Option(help="Whether to measure what is missing, or only to write.")
    ] = True,
    out: Annotated[Path, typer.Option(help="Folder of the result files.")] = report.RESULTS,
) -> None:
    """A real model on real text: what reading a few pages costs, against dense attention on the
    same prompts. Exit code 1 if anything failed.
    """
    on_gpu, generation = bool(gpus()), Generation(temperature, seed)
    if dtype == "auto" and not on_gpu:
        dtype = "float32"
    try:
        heads = parse_heads(model, head or [])
        variants = parse_variants(retrievers, variant or [], heads)
        settings = settings_of(variants, parse_numbers("--budgets", budgets))
        sources = Sources(model, tuple(texts), qa, longbench, forced_tokens, long_tokens)
        known, notes = sources.tasks()
        chosen = {name: known[name] for name in _names("--tasks", tasks, known)}
        lengths = parse_numbers("--contexts", contexts)
        reach = _reach(model, max(lengths))
        typer.echo("making the prompts")
        groups = make_groups(sources, list(chosen), lengths, prompts, seed)
        shares = _leaks(model, leaks or [], groups)
        words = [model.resolve().name, *_label(label), *([f"seed{seed}"] if seed else [])]
        machine = facts()
        shared = {
            "model": folder_digest(model),
            "temperature": generation.temperature,
            "dtype": dtype,
            "head keys": head_keys,
            "device": device_slug(machine),
            "vllm": machine["packages"]["vllm"],
            "code": code_digest(*(Path(module.__file__ or "") for module in SCORING)),
        }
    except (OptionError, PromptError, TextError, LongBenchError, ConfigError) as error:
        typer.echo(str(error), err=True)
        raise typer.Exit(2) from None
    folder = work or WORK / "-".join(["real", *words, device_slug(machine)])
    result = report.Report(
        "-".join(["real", *words]),
        f"{' '.join(words)} on real text: {prompts} prompts a cell, seed {seed}",
        {},
        machine=machine,
        details={
            "shared": shared,
            "heads": {name: str(path) for name, path in heads.items()},
            "texts": [str(path) for path in texts],
            "leaks": shares,
        },
        notes=[*_notes(chosen, generation, shares), *notes],
    )
    digests = {name: folder_digest(path) for name, path in heads.items()}
    run = Run(chosen, groups, settings, Store(folder / "cells.jsonl", shared, digests), result, out)
    try:
        if measure:
            for number, (kind, mine) in enumerate(engines(settings, on_gpu).items()):
                spec = EngineSpec(
                    model=str(model),
                    head=str(heads[kind.head]) if kind.head else None,
                    head_keys=head_keys,
                    retriever=_first_retriever(mine),
                    dtype=dtype,
                    on_gpu=on_gpu,
                    eager=kind.eager,
                    max_model_len=reach,
                    kv_gib=kv_gib,
                    requests=requests,
                    settings=dict(kind.at_start),
                )
                log = folder / f"engine{number}.log"
                fill(run, spec, mine, sources, generation, log, engine_seconds)
    finally:
        lines = run.write()
    result.show()
    typer.echo(tables.compact(lines))
    typer.echo(f"written: {out}")
    raise typer.Exit(1 if result.failures else 0)


def _first_retriever(settings: list[Setting]) -> str:
    """What keeps vectors of each page does so from the start."""
    names = [setting.variant.retriever for setting in settings]
    return next((name for name in names if find_rule(name).page_vectors), DENSE)


def _names(option: str, text: str, known: dict[str, Any]) -> list[str]:
    names = list(known) if text == "all" else text.split(",")
    for name in names:
        if name not in known:
            raise OptionError(f"{option}: found {name!r}; use some of {', '.join(known)}, or all.")
    return names


def _reach(model: Path, longest: int) -> int:
    """Tokens that the engine is made for."""
    from transformers import AutoConfig

    if not (model / "config.json").exists():
        raise OptionError(f"--model: no config.json in {model}; name a model folder.")
    config = AutoConfig.from_pretrained(str(model)).get_text_config()
    reach = int(config.max_position_embeddings)
    if longest > reach:
        raise OptionError(
            f"--contexts: found {longest}, but the model reaches {reach}; use shorter ones."
        )
    return min(reach, pages_for(longest + 1) * PAGE_SIZE)


def _leaks(model: Path, paths: list[Path], groups: list[Group]) -> dict[str, float]:
    if not paths:
        return {}
    from transformers import AutoTokenizer

    typer.echo("comparing the prompts with the training files")
    return check_leaks(Training(paths), groups, AutoTokenizer.from_pretrained(str(model)))


def _notes(tasks: dict[str, Task], generation: Generation, shares: dict[str, float]) -> list[str]:
    kinds = {task.kind for task in tasks.values()}
    floors = ", ".join(
        sorted({f"{task.floor:g}" for task in tasks.values() if task.kind in ("right", "share")})
    )
    out = [
        "Differences to dense attention on the same prompts, with 95 % intervals: Student's t for "
        "log-probabilities, Agresti and Min for scores. Prefill is dense, and so is the first "
        "token of each reply, which prefill makes.",
        *(f"{name}: {task.about}." for name, task in tasks.items()),
    ]
    if floors:
        out.append(
            f"† dense attention itself scores less than the task's floor ({floors}): the model "
            "cannot do the task, so it says nothing about a retriever, its other cells and longer "
            "contexts are left out, and it is not in the means."
        )
    if "long" in kinds:
        how = f"temperature {generation.temperature:g}" if generation.temperature else "greedy"
        out.append(f"Long replies are {how}, and do not end before their last token.")
    if shares:
        parts = ", ".join(f"{name} {share:.2%}" for name, share in shares.items())
        out.append(
            f"Of all {WORDS} words in a row of the prompts, so many stand in the training files: "
            f"{parts}."
        )
    return out


def _label(text: str | None) -> list[str]:
    if text is not None and not re.fullmatch(r"[\w.]+", text):
        raise OptionError(
            f"--label: found {text!r}; give one word of letters, digits, dots and underscores."
        )
    return [text] if text else []
