"""The command `marks`."""

from __future__ import annotations

import time
from pathlib import Path
from random import Random
from typing import Annotated

import torch
import typer

from benchmarks import machine, report
from benchmarks.marks.heads import SERVINGS, load_head
from benchmarks.marks.measuring import Choosers, Size, measure
from benchmarks.marks.options import OptionError, names, numbers
from benchmarks.marks.own_attention import OWN_SELECTIONS
from benchmarks.marks.results import Results, table
from benchmarks.passages import KINDS, Passages, TextsError, read_texts
from specontext_vllm.config import ConfigError
from specontext_vllm.distillation.teacher import (
    TeacherError,
    load_teacher,
    read_config,
    read_tokenizer,
)
from specontext_vllm.retrieval.checkpoint import HeadError

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def main(
    model: Annotated[Path, typer.Option(help="Folder of a Hugging Face model.")],
    texts: Annotated[
        Path,
        typer.Option(help="Folder of .txt files, one such file, or JSON: {kind: [text, ...]}."),
    ],
    heads: Annotated[
        str, typer.Option(help="Folders of retrieval heads of the model, separated by commas.")
    ] = "",
    context: Annotated[int, typer.Option(help="Tokens of a prompt.", min=256)] = 4096,
    pieces: Annotated[int, typer.Option(help="Prompts of each kind.", min=2)] = 32,
    scored: Annotated[int, typer.Option(help="Tokens at a prompt's end, forced.", min=2)] = 64,
    kinds: Annotated[str, typer.Option(help="Of the prompts.")] = ",".join(KINDS),
    budgets: Annotated[
        str, typer.Option(help="Tokens per KV head that a step reads.")
    ] = "128,256,512",
    recent_tokens: Annotated[
        str, typer.Option(help="Newest tokens that are always read, within the budget.")
    ] = "64",
    selections: Annotated[
        str,
        typer.Option(help=f"From the model's own attention: {', '.join(OWN_SELECTIONS)}, or none."),
    ] = ",".join(OWN_SELECTIONS),
    servings: Annotated[
        str,
        typer.Option(
            help=f"How a head is run: {', '.join(SERVINGS)} (aux states of the dense run or its "
            "own; with the last look)."
        ),
    ] = ",".join(SERVINGS),
    dtype: Annotated[str, typer.Option(help="float32 or bfloat16.")] = "float32",
    at_once: Annotated[int, typer.Option(help="Prompts held on the device at once.", min=1)] = 32,
    minutes: Annotated[float, typer.Option(help="Begin no selection after so many.", min=0)] = 60.0,
    seed: Annotated[int, typer.Option(help="Of the prompts.")] = 1,
    name: Annotated[
        str, typer.Option(help="Of the result. Default: the model's folder and the context.")
    ] = "",
    out: Annotated[Path, typer.Option(help="Folder of the result files.")] = report.RESULTS,
) -> None:
    """What a selection of pages costs on real text, by who makes it. Each finished mark is also a
    line of NAME.jsonl in --out.
    """
    deadline = time.monotonic() + 60 * minutes
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        sizes = [
            Size(budget, recent)
            for recent in numbers("--recent-tokens", recent_tokens)
            for budget in numbers("--budgets", budgets)
        ]
        for size in sizes:
            _ = size.pages  # refuses one without room
        wanted_kinds = names("--kinds", kinds, KINDS)
        own = [OWN_SELECTIONS[key] for key in names("--selections", selections, OWN_SELECTIONS)]
        ways = [SERVINGS[key] for key in names("--servings", servings, SERVINGS)]
        (kind_of_float,) = names("--dtype", dtype, DTYPES) or ["float32"]
        read_config(model)  # refuses what the backend does not serve
        tokenizer = read_tokenizer(model)
        passages = {
            kind: Passages(read_texts(texts), tokenizer, context, scored, Random(f"{seed} {kind}"))
            for kind in wanted_kinds
        }
        teacher = load_teacher(model, device, DTYPES[kind_of_float])
        choosers = Choosers(
            own,
            {
                folder.resolve().name: load_head(folder, teacher, context)
                for folder in map(Path, filter(None, heads.split(",")))
            },
            ways,
        )
    except (ConfigError, HeadError, OptionError, TeacherError, TextsError) as error:
        typer.echo(str(error), err=True)
        raise typer.Exit(2) from None

    case = f"marks-{name or f'{model.resolve().name}-{context}'}"
    details = {
        "model": str(model),
        "heads": [str(Path(folder)) for folder in filter(None, heads.split(","))],
        "context": context,
        "scored": scored,
        "pieces": pieces,
        "dtype": kind_of_float,
        "seed": seed,
    }
    title = (
        f"Upper marks and heads: {model.resolve().name}, {pieces} prompts of {context:,} tokens, "
        f"the last {scored} forced"
    )
    result = report.Report(case, title, table(wanted_kinds), details=details)
    result.notes += [
        "The prompt is dense; of its last tokens, each is read with the chosen pages only. "
        "Intervals: Student's t over the prompts. Read: tokens in the pages that a KV head reads, "
        "mean over layers.",
        "The model's own attention is that of a dense pass over the same token, which nobody has "
        "before the step: upper marks. A head is run token by token.",
    ]
    out.mkdir(parents=True, exist_ok=True)
    path = out / f"{case}-{machine.device_slug(result.machine)}.jsonl"

    def in_time() -> bool:
        return time.monotonic() < deadline

    with path.open("w") as lines:
        results = Results(lines)
        for kind in wanted_kinds:
            prompts = [passages[kind].draw(kind) for _ in range(pieces)]
            drawn = torch.tensor(prompts, device=device)
            for portion in drawn.split(at_once):
                if not in_time():
                    break
                for mark in measure(teacher, portion, scored, choosers, sizes, in_time):
                    print(results.add(kind, mark), flush=True)
            result.rows = results.rows()
            result.write(out)
    if not in_time():
        result.failures["--minutes"] = f"{minutes:g} were over before all selections were through"
    result.write(out)
    result.show()
    raise typer.Exit(1 if result.failures else 0)
