"""The command: reads the options, asks an engine, writes tables and a picture."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from benchmarks import report
from benchmarks.acceptance import plots
from benchmarks.acceptance.chat import ABOUT, CHAT, chat_group
from benchmarks.acceptance.engine import (
    EAGLE3,
    EAGLE3_DRAFTS,
    LOSSLESS,
    AcceptanceSpec,
    Verdicts,
    run_engine,
)
from benchmarks.children import ChildError, engine_env, run_child
from benchmarks.fingerprints import folder_digest
from benchmarks.machine import gpus
from benchmarks.real.options import ModelFolder, TestTexts
from benchmarks.real.prompts import Group
from benchmarks.real.settings import OptionError, parse_numbers
from benchmarks.real.tasks import Sources, make_groups
from specontext_vllm.engine.draft_length import MAX_DRAFTS

SAME = ("method", "folders", "budget", "answer_tokens", "dtype")
"""Details that all cells of a result have in common."""


class Method(StrEnum):
    """Who drafts."""

    LOSSLESS = LOSSLESS
    EAGLE3 = EAGLE3

    @property
    def lengths(self) -> range:
        """Numbers of drafts."""
        return range(1, (MAX_DRAFTS if self is Method.LOSSLESS else EAGLE3_DRAFTS) + 1)

    def tables(self) -> dict[str, tuple[report.Column, ...]]:
        """Of a report."""
        cell = (report.Column("context", "context", ",d"), report.Column("task", "text"))
        again = report.Column("repeated", "repeated 4-grams", ".0%")

        def each(key: str, style: str, heading: str = "of {}") -> tuple[report.Column, ...]:
            return tuple(
                report.Column(f"{key}_{k}", heading.format(k), style) for k in self.lengths
            )

        accepted, share = each("accepted", ".2f"), each("share", ".0%", "{}")
        by_position = {"Share accepted where all before were, by position": (*cell, *share)}
        if self is Method.LOSSLESS:
            rounds = report.Column("rounds", "rounds", ",d")
            return {
                "Drafts accepted in a row, of as many as are made": (
                    *(*cell, rounds, again),
                    *accepted,
                ),
                **by_position,
            }
        return {
            "Drafts accepted in a row, mean of the rounds that make as many": (
                *(*cell, again),
                *accepted,
            ),
            **by_position,
            "Rounds, by how many drafts they make": (*cell, *each("rounds", ",d")),
        }

    def notes(self) -> list[str]:
        """What the figures are."""
        if self is Method.LOSSLESS:
            return [
                "Drafts are the likeliest tokens after the selected pages, and so are answers "
                "after all pages. Of k drafts as many are accepted as agree from the first one on."
            ]
        return [
            "Drafts are the likeliest tokens of the EAGLE-3 head, answers those of the model after "
            "the selected pages. Of k drafts as many are accepted as agree from the first one on, "
            "by vLLM's own counters (vllm:spec_decode_*).",
            "Each prompt is answered anew with each number of drafts: the chain of k drafts begins "
            "that of k + 1, but rounds of fewer drafts begin at other tokens, and a round's tokens "
            "read the pages that its first one chose. By position: rounds of "
            f"{EAGLE3_DRAFTS} drafts.",
        ]


def main(
    model: ModelFolder,
    texts: TestTexts,
    method: Annotated[
        Method,
        typer.Option(
            help="Who drafts: the model itself in lossless mode, or an EAGLE-3 head, whose drafts "
            "are verified over the selected pages."
        ),
    ] = Method.LOSSLESS,
    head: Annotated[
        Path | None,
        typer.Option(help="Folder of the retrieval head. Default with eagle3: the drafter."),
    ] = None,
    drafter: Annotated[
        Path | None,
        typer.Option(
            help="With eagle3: folder of the EAGLE-3 head, which must read the same layers as the "
            "retrieval head."
        ),
    ] = None,
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
    """How many drafts a model accepts on real text, greedily. In lossless mode every round drafts
    the most tokens there are, so each position is seen; an EAGLE-3 head answers with each number
    of drafts. Cells that stand in the result are not measured again.
    """
    name = model.resolve().name
    try:
        retrieval = _retrieval_head(method, head, drafter)
        sources = Sources(model, tuple(texts))
        lengths = parse_numbers("--contexts", contexts)
        names = [name.strip() for name in tasks.split(",")]
        about = {key: task.about for key, task in sources.tasks()[0].items()} | {CHAT: ABOUT}
        for task in names:
            if task not in about:
                raise OptionError(f"--tasks: found {task!r}; use {', '.join(about)}.")
        folders = {"model": model, "head": retrieval} | ({"drafter": drafter} if drafter else {})
        result = report.Report(
            f"acceptance-{name}" + (f"-{EAGLE3}" if drafter else ""),
            f"{name} {'with an EAGLE-3 head that drafts' if drafter else 'in lossless mode'} on "
            f"real text: budget {budget}, {prompts} prompts a cell, answers of {answer_tokens} "
            f"tokens, {dtype}",
            method.tables(),
            details={
                "method": method.value,
                "folders": {key: folder_digest(folder) for key, folder in folders.items()},
                "budget": budget,
                "prompts": prompts,
                "answer_tokens": answer_tokens,
                "dtype": dtype,
                "cells": {},
                "runs": {},
            },
        )
        result.take_over(out, SAME)
        groups = _groups(sources, names, lengths, prompts, answer_tokens, seed)
    except ValueError as error:
        typer.echo(str(error), err=True)
        raise typer.Exit(2) from None
    details = result.details
    details["prompts"] = prompts
    result.failures.clear()
    cells = details["cells"]
    waiting = groups_left(groups, cells)

    def save() -> None:
        shown = [(group, cells[_name(group)]) for group in groups if _measured(group, cells)]
        result.rows = [make_row(group, cell, method.lengths) for group, cell in shown]
        result.notes = [
            *method.notes(),
            *(f"{name}: {about[name]}." for name in names),
            "Answers to chat end where the model ends them, the others at the limit. Repeated "
            "4-grams: of an answer, those that stood in it before; what goes in circles is easy to "
            "draft.",
            *report.run_notes(
                (details["runs"][cell["run"]], _name(group)) for group, cell in shown
            ),
        ]
        path = result.write(out)
        if result.rows:
            title = f"{name}: drafts accepted" + (f", {EAGLE3}" if drafter else "")
            plots.draw(result.rows, method.lengths, title, path.with_suffix(".png"))

    if waiting:
        details["runs"][result.date] = result.run()
        work.mkdir(parents=True, exist_ok=True)
        on_gpu = bool(gpus())
        spec = AcceptanceSpec(
            str(model),
            str(retrieval),
            str(drafter) if drafter else None,
            on_gpu,
            dtype,
            budget,
            answer_tokens,
            tuple(waiting),
        )
        try:
            for index, verdicts in run_child(
                run_engine,
                spec,
                log=work / f"{result.case}.log",
                seconds=engine_seconds,
                env=engine_env(on_gpu, cpu_kv_gib=4),
            ):
                group = waiting[int(index)]
                cell = cells[_name(group)] = _cell(group, verdicts, result.date)
                save()
                print(f"{_name(group)}: {make_row(group, cell, method.lengths)}", flush=True)
        except ChildError as error:
            result.failures["engine"] = str(error)
    save()
    result.show()
    if result.failures:
        raise typer.Exit(1)


def _retrieval_head(method: Method, head: Path | None, drafter: Path | None) -> Path:
    """The retrieval head's folder.

    Raises:
        OptionError: the method needs a folder that is not there, or has no use for one.
    """
    if method is Method.EAGLE3 and drafter is None:
        raise OptionError("--drafter: found none; with --method eagle3 name an EAGLE-3 head.")
    if method is Method.LOSSLESS and drafter is not None:
        raise OptionError("--drafter: in lossless mode the model drafts; use --method eagle3.")
    if (found := head or drafter) is None:
        raise OptionError("--head: found none; name the folder of a retrieval head.")
    for option, folder in (("--head", found), ("--drafter", drafter or found)):
        if not (folder / "config.json").exists():
            raise OptionError(f"{option}: found no config.json in {folder}; give a head's folder.")
    return found


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


def _name(group: Group) -> str:
    return f"{group.task} at {group.context:,}"


def _cell(group: Group, verdicts: Verdicts, run: str) -> dict[str, Any]:
    """What a result keeps of a group, so that others' prompts do not take its place."""
    return {
        "prompts": group.digest,
        "tokens": verdicts.tokens,
        "repeated": verdicts.repeated,
        # As JSON has it.
        "reached": {str(drafts): counts for drafts, counts in verdicts.reached.items()},
        "run": run,
    }


def groups_left(groups: Sequence[Group], cells: Mapping[str, dict[str, Any]]) -> list[Group]:
    """Those whose very prompts are not in ``cells`` yet."""
    return [group for group in groups if not _measured(group, cells)]


def _measured(group: Group, cells: Mapping[str, dict[str, Any]]) -> bool:
    return cells.get(_name(group), {}).get("prompts") == group.digest


def make_row(group: Group, cell: dict[str, Any], lengths: Sequence[int]) -> dict[str, Any]:
    """A group's row."""
    reached = {int(drafts): counts for drafts, counts in cell["reached"].items()}
    return {
        "context": group.context,
        "task": group.task,
        "tokens": cell["tokens"],
        "repeated": cell["repeated"],
        **accepted_row(reached, lengths),
    }


def accepted_row(reached: Mapping[int, Sequence[int]], lengths: Sequence[int]) -> dict[str, Any]:
    """What the rounds of each number of drafts accepted. Of a number that was not measured: what
    rounds of the most drafts say of it.

    Args:
        reached: as ``Verdicts.reached``.

    Returns:
        ``rounds`` of the most drafts; for each k of ``lengths`` ``rounds_k``, ``accepted_k`` (mean
        of a round), ``positions_k`` (share of the rounds that accepted the draft at each of k
        positions) and ``share_k`` (of the rounds of the most drafts that accepted the first k - 1,
        those that accepted one more). None where there are no such rounds.
    """
    most = reached[max(reached)]
    row: dict[str, Any] = {"rounds": most[0]}
    for k in lengths:
        rounds, *accepted = reached.get(k, most)[: k + 1]
        row[f"rounds_{k}"] = rounds
        row[f"accepted_{k}"] = sum(accepted) / rounds if rounds else None
        row[f"positions_{k}"] = [count / rounds for count in accepted] if rounds else None
        row[f"share_{k}"] = most[k] / most[k - 1] if most[k - 1] else None
    return row
