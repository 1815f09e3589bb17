"""The command: reads the options, asks an engine, writes tables and a picture."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from benchmarks import report
from benchmarks.acceptance import plots
from benchmarks.acceptance.chat import ABOUT, CHAT, chat_group
from benchmarks.acceptance.engine import AcceptanceSpec, run_engine
from benchmarks.children import ChildError, engine_env, run_child
from benchmarks.machine import gpus
from benchmarks.real.options import ModelFolder, TestTexts
from benchmarks.real.prompts import Group, PromptError
from benchmarks.real.settings import OptionError, parse_numbers
from benchmarks.real.tasks import Sources, make_groups
from benchmarks.real.texts import TextError
from specontext_vllm.engine.draft_length import MAX_DRAFTS

LENGTHS = range(1, MAX_DRAFTS + 1)
TABLES = {
    "Drafts accepted in a row, of as many as are made": (
        report.Column("context", "context", ",d"),
        report.Column("task", "text"),
        report.Column("rounds", "rounds", ",d"),
        report.Column("repeated", "repeated 4-grams", ".0%"),
        *(report.Column(f"accepted_{k}", f"of {k}", ".2f") for k in LENGTHS),
    ),
    "Share accepted where all before were, by position": (
        report.Column("context", "context", ",d"),
        report.Column("task", "text"),
        *(report.Column(f"share_{k}", f"{k}", ".0%") for k in LENGTHS),
    ),
}


def main(
    model: ModelFolder,
    texts: TestTexts,
    head: Annotated[Path, typer.Option(help="Folder of the retrieval head.")],
    tasks: Annotated[
        str, typer.Option(help="chat, or tasks of case real: names separated by commas.")
    ] = "text,copy,chat",
    contexts: Annotated[str, typer.Option(help="Tokens of a prompt.")] = "2048,4096,8000",
    prompts: Annotated[int, typer.Option(min=1, help="Of each task and context.")] = 8,
    answer_tokens: Annotated[int, typer.Option(min=8, help="Tokens of an answer.")] = 96,
    budget: Annotated[int, typer.Option(help="Tokens per KV head that a draft reads.")] = 512,
    seed: Annotated[int, typer.Option(help="Another one draws other prompts.")] = 0,
    dtype: Annotated[str, typer.Option(help="As vLLM's --dtype.")] = "auto",
    engine_seconds: Annotated[int, typer.Option(min=1, help="Time limit.")] = 3600,
    work: Annotated[Path, typer.Option(help="Folder of the log.")] = Path("benchmarks/.work"),
    out: Annotated[Path, typer.Option(help="Folder of the result files.")] = report.RESULTS,
) -> None:
    """How many of its own drafts a model accepts on real text, greedily, in lossless mode: every
    round drafts the most tokens there are, so each position is seen.
    """
    try:
        sources = Sources(model, tuple(texts))
        lengths = parse_numbers("--contexts", contexts)
        names = [name.strip() for name in tasks.split(",")]
        about = {key: task.about for key, task in sources.tasks()[0].items()} | {CHAT: ABOUT}
        for name in names:
            if name not in about:
                raise OptionError(f"--tasks: found {name!r}; use {', '.join(about)}.")
        groups = _groups(sources, names, lengths, prompts, answer_tokens, seed)
    except (OptionError, PromptError, TextError) as error:
        typer.echo(str(error), err=True)
        raise typer.Exit(2) from None
    on_gpu, name = bool(gpus()), model.resolve().name
    spec = AcceptanceSpec(
        str(model), str(head), on_gpu, dtype, budget, answer_tokens, tuple(groups)
    )
    result = report.Report(
        f"acceptance-{name}",
        f"{name} in lossless mode on real text: budget {budget}, {prompts} prompts a cell, "
        f"answers of {answer_tokens} tokens, {dtype}",
        TABLES,
        details={"budget": budget, "prompts": prompts, "answer_tokens": answer_tokens},
    )
    work.mkdir(parents=True, exist_ok=True)
    try:
        events = run_child(
            run_engine,
            spec,
            log=work / f"acceptance-{name}.log",
            seconds=engine_seconds,
            env=engine_env(on_gpu, cpu_kv_gib=4),
        )
        for index, verdicts in events:
            group = groups[int(index)]
            result.rows.append(
                {
                    "context": group.context,
                    "task": group.task,
                    "tokens": verdicts.tokens,
                    "repeated": verdicts.repeated,
                    **accepted_rows(verdicts.accepted),
                }
            )
            print(f"{group.task} at {group.context}: {result.rows[-1]}", flush=True)
    except ChildError as error:
        result.failures["engine"] = str(error)
    result.notes = [
        "Drafts are the likeliest tokens after the selected pages, and so are answers after all "
        "pages. Of k drafts as many are accepted as agree from the first one on.",
        *(f"{name}: {about[name]}." for name in names),
        "Answers to chat end where the model ends them, the others at the limit. Repeated 4-grams: "
        "of an answer, those that stood in it before; what goes in circles is easy to draft.",
    ]
    path = result.write(out)
    if result.rows:
        plots.draw(result.rows, LENGTHS, f"{name}: drafts accepted", path.with_suffix(".png"))
    result.show()
    if result.failures:
        raise typer.Exit(1)


def _groups(
    sources: Sources,
    names: Sequence[str],
    contexts: Sequence[int],
    prompts: int,
    answer: int,
    seed: int,
) -> list[Group]:
    """The prompts of all tasks, the shorter contexts first."""
    made = make_groups(sources, [name for name in names if name != CHAT], contexts, prompts, seed)
    if CHAT in names:
        writer = sources.writer()
        made += [chat_group(writer, context, prompts, answer, seed) for context in contexts]
    return sorted(made, key=lambda group: (group.context, names.index(group.task)))


def accepted_rows(verdicts: Sequence[int]) -> dict[str, Any]:
    """What the accepted drafts of each round, of ``MAX_DRAFTS``, say of every smaller number."""
    counts, rounds = Counter(verdicts), len(verdicts)
    reached = [sum(n for accepted, n in counts.items() if accepted >= k) for k in (0, *LENGTHS)]
    row: dict[str, Any] = {"rounds": rounds}
    for k in LENGTHS:
        row[f"accepted_{k}"] = sum(reached[1 : k + 1]) / max(rounds, 1)
        row[f"share_{k}"] = reached[k] / reached[k - 1] if reached[k - 1] else None
    return row
