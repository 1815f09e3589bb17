"""The command `marks`."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated

import typer

from benchmarks import report
from benchmarks.marks.heads import SERVINGS, load_head
from benchmarks.marks.inputs import DTYPES, KINDS, load_model, make_prompts, names, numbers
from benchmarks.marks.measuring import Choosers, Size, measure
from benchmarks.marks.own_attention import OWN_SELECTIONS
from benchmarks.marks.results import Results, table
from benchmarks.real.options import ModelFolder, NamedHeads, TestTexts
from benchmarks.real.prompts import PromptError
from benchmarks.real.settings import OptionError, parse_heads
from benchmarks.real.texts import TextError
from specontext_vllm.config import ConfigError
from specontext_vllm.distillation.teacher import TeacherError
from specontext_vllm.retrieval.checkpoint import HeadError

REFUSALS = (ConfigError, HeadError, OptionError, PromptError, TeacherError, TextError)


def main(
    model: ModelFolder,
    texts: TestTexts,
    head: NamedHeads = None,
    context: Annotated[int, typer.Option(help="Tokens of a prompt.", min=256)] = 4096,
    prompts: Annotated[int, typer.Option(help="Of each kind.", min=2)] = 32,
    forced: Annotated[int, typer.Option(help="Tokens of a forced passage.", min=2)] = 64,
    kinds: Annotated[str, typer.Option(help="Of the prompts.")] = ",".join(KINDS),
    budgets: Annotated[
        str, typer.Option(help="Tokens per KV head that a step reads.")
    ] = "128,256,512",
    recent_tokens: Annotated[
        str, typer.Option(help="Newest tokens that are always read, within the budget.")
    ] = "64",
    selections: Annotated[
        str,
        typer.Option(
            help=f"From the model's own attention, some of {', '.join(OWN_SELECTIONS)}, or none."
        ),
    ] = ",".join(OWN_SELECTIONS),
    servings: Annotated[
        str,
        typer.Option(
            help=f"How a head is run, some of {', '.join(SERVINGS)}: with the hidden states of "
            "the dense run or its own, with the last look."
        ),
    ] = ",".join(SERVINGS),
    dtype: Annotated[str, typer.Option(help=" or ".join(DTYPES) + ".")] = "float32",
    at_once: Annotated[int, typer.Option(help="Prompts on the device at once.", min=1)] = 32,
    minutes: Annotated[float, typer.Option(help="Begin nothing after so many.", min=0)] = 60.0,
    seed: Annotated[int, typer.Option(help="Another one draws other prompts.")] = 0,
    label: Annotated[str, typer.Option(help="Word that joins the result's name.")] = "",
    out: Annotated[Path, typer.Option(help="Folder of the result files.")] = report.RESULTS,
) -> None:
    """What a selection of pages costs on real text, by who makes it: the model's own attention or
    a head. Every mark is a line of a .jsonl file as soon as it is there.
    """
    deadline = time.monotonic() + 60 * minutes
    try:
        sizes = [
            Size(budget, recent)
            for recent in numbers("--recent-tokens", recent_tokens)
            for budget in numbers("--budgets", budgets)
        ]
        for size in sizes:
            size.check()
        wanted_kinds = names("--kinds", kinds, KINDS)
        own = [OWN_SELECTIONS[key] for key in names("--selections", selections, OWN_SELECTIONS)]
        ways = [SERVINGS[key] for key in names("--servings", servings, SERVINGS)]
        (float_kind,) = names("--dtype", dtype, DTYPES)[:1] or ["float32"]
        drawn = make_prompts(model, texts, wanted_kinds, context, forced, prompts, seed)
        folders = parse_heads(model, head or []) if ways else {}
        teacher = load_model(model, float_kind)
        heads = {key: load_head(folder, teacher, context) for key, folder in folders.items()}
    except REFUSALS as error:
        typer.echo(str(error), err=True)
        raise typer.Exit(2) from None
    words = [model.resolve().name, str(context), *([label] if label else [])]
    details = {
        "model": str(model),
        "heads": {key: str(folder) for key, folder in folders.items()},
        "context": context,
        "forced": forced,
        "prompts": prompts,
        "dtype": float_kind,
        "seed": seed,
    }
    title = (
        f"Upper marks and heads: {model.resolve().name}, {prompts} prompts of {context:,} tokens, "
        f"the last {forced} forced"
    )
    result = report.Report("-".join(["marks", *words]), title, table(wanted_kinds), details=details)
    result.notes += [
        "The prompt is dense; of its last tokens, each is read with the chosen pages only. "
        "Intervals: Student's t over the prompts. Read: tokens in the pages that a KV head reads, "
        "mean over layers.",
        "The model's own attention is that of a dense pass over the same token, which nobody has "
        "before the step: upper marks. A head is run token by token.",
    ]
    out.mkdir(parents=True, exist_ok=True)
    path = out / f"{result.stem}.jsonl"
    choosers = Choosers(own, heads, ways)

    def in_time() -> bool:
        return time.monotonic() < deadline

    with path.open("w") as lines:
        results = Results(lines)
        for kind in wanted_kinds:
            for portion in drawn[kind].to(teacher.device).split(at_once):
                if not in_time():
                    break
                for mark in measure(teacher, portion, forced, choosers, sizes, in_time):
                    typer.echo(results.add(kind, mark))
            result.rows = results.rows()
            result.write(out)
    if not in_time():
        result.failures["--minutes"] = f"{minutes:g} were over before everything was measured"
        result.write(out)
    result.show()
    raise typer.Exit(1 if result.failures else 0)
