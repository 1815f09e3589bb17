"""Case `acceptance`: how many of the drafts that a real model makes over the selected pages it
accepts when it reads its whole context: lossless mode on real text.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from benchmarks import report
from benchmarks.children import ChildError, engine_env, run_child
from benchmarks.machine import gpus
from benchmarks.real.options import ModelFolder, TestTexts
from benchmarks.real.prompts import Group, PromptError
from benchmarks.real.settings import OptionError, parse_numbers
from benchmarks.real.tasks import Sources, make_groups
from benchmarks.real.texts import TextError
from specontext_vllm.config import CONFIG_KEY
from specontext_vllm.engine.draft_length import MAX_DRAFTS

LENGTHS = range(1, MAX_DRAFTS + 1)
TABLES = {
    "Drafts accepted in a row, of as many as are made": (
        report.Column("context", "context", ",d"),
        report.Column("task", "text"),
        report.Column("rounds", "rounds", ",d"),
        *(report.Column(f"accepted_{k}", f"of {k}", ".2f") for k in LENGTHS),
    ),
    "Share accepted where all before were, by position": (
        report.Column("context", "context", ",d"),
        report.Column("task", "text"),
        *(report.Column(f"share_{k}", f"{k}", ".0%") for k in LENGTHS),
    ),
}


@dataclass(frozen=True)
class AcceptanceSpec:
    """What the engine's process runs: see the command's options.

    Attributes:
        groups: prompts of one task and context each.
    """

    model: str
    head: str
    on_gpu: bool
    dtype: str
    budget: int
    answer_tokens: int
    groups: tuple[Group, ...]

    def arguments(self) -> dict[str, Any]:
        """Arguments of ``LLM``."""
        longest = max(len(prompt.tokens) for group in self.groups for prompt in group.prompts)
        return {
            "model": self.model,
            "dtype": self.dtype,
            # Room for what is drafted behind an answer's end.
            "max_model_len": longest + self.answer_tokens + MAX_DRAFTS + 1,
            "max_num_seqs": MAX_DRAFTS + 1,
            "seed": 0,
            "attention_backend": "specontext",
            "additional_config": {
                CONFIG_KEY: {
                    "retrieval_head": self.head,
                    "budget": self.budget,
                    "mode": "lossless",
                }
            },
        }


def main(
    model: ModelFolder,
    texts: TestTexts,
    head: Annotated[Path, typer.Option(help="Folder of the retrieval head.")],
    tasks: Annotated[str, typer.Option(help="Of case real: names separated by commas.")] = (
        "text,copy"
    ),
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
        known = sources.tasks()[0]
        for name in names:
            if name not in known:
                raise OptionError(f"--tasks: found {name!r}; use {', '.join(known)}.")
        groups = make_groups(sources, names, lengths, prompts, seed)
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
                {"context": group.context, "task": group.task, **accepted_rows(verdicts)}
            )
            print(f"{group.task} at {group.context}: {result.rows[-1]}", flush=True)
    except ChildError as error:
        result.failures["engine"] = str(error)
    result.notes = [
        "Drafts are the likeliest tokens after the selected pages, and so are answers after all "
        "pages. Of k drafts as many are accepted as agree from the first one on.",
    ]
    result.write(out)
    result.show()
    if result.failures:
        raise typer.Exit(1)


def accepted_rows(verdicts: Sequence[int]) -> dict[str, Any]:
    """What the accepted drafts of each round, of ``MAX_DRAFTS``, say of every smaller number."""
    counts, rounds = Counter(verdicts), len(verdicts)
    reached = [sum(n for accepted, n in counts.items() if accepted >= k) for k in (0, *LENGTHS)]
    row: dict[str, Any] = {"rounds": rounds}
    for k in LENGTHS:
        row[f"accepted_{k}"] = sum(reached[1 : k + 1]) / max(rounds, 1)
        row[f"share_{k}"] = reached[k] / reached[k - 1] if reached[k - 1] else None
    return row


def run_engine(spec: AcceptanceSpec) -> Iterator[tuple[str, Any]]:
    """Answer the groups' prompts.

    Yields:
        A group's index, and the accepted drafts of each round in which all were made.
    """
    from vllm import LLM, SamplingParams

    llm = LLM(**spec.arguments())
    scheduler = llm.llm_engine.engine_core.engine_core.scheduler
    length, verdicts = scheduler.draft_length, []

    def observe(drafted: int, accepted: int) -> None:
        if drafted == MAX_DRAFTS:
            verdicts.append(accepted)

    length.choose, length.observe = lambda contexts: MAX_DRAFTS, observe
    params = SamplingParams(
        temperature=0, max_tokens=spec.answer_tokens, ignore_eos=True, detokenize=False
    )
    for index, group in enumerate(spec.groups):
        verdicts.clear()
        for prompt in group.prompts:
            llm.generate([{"prompt_token_ids": prompt.tokens}], params, use_tqdm=False)
        yield str(index), list(verdicts)
