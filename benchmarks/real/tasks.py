"""All tasks by name, and the prompts of those that are asked."""

from __future__ import annotations

import os
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from random import Random
from typing import Any

from benchmarks.real import files, forced, labels, long, ruler
from benchmarks.real.prompts import Group, Prompt, Task, Writer
from benchmarks.real.texts import Texts, read_texts

CHUNK = 25
"""Prompts that one process makes in a row."""

FEW = 150
"""Prompts that are not worth further processes."""


@dataclass(frozen=True)
class Sources:
    """Where prompts come from.

    Attributes:
        model: folder with the tokenizer.
        texts, qa, longbench: see the command's options.
        forced_tokens, long_tokens: see ``Writer``.
    """

    model: Path
    texts: tuple[Path, ...]
    qa: Path | None = None
    longbench: Path | None = None
    forced_tokens: int = 128
    long_tokens: int = 2048

    def tasks(self) -> tuple[dict[str, Task], list[str]]:
        """The tasks there are, and sentences on those that are left out.

        Raises:
            OptionError, LongBenchError: a file of another form.
        """
        qa, absent = files.qa_tasks(self.qa)
        from_files, other_files = files.longbench_tasks(self.longbench)
        left_out = []
        if absent:
            names = " and ".join(f"{name} ({files.QA_FILES[name][0]})" for name in absent)
            left_out.append(f"Of RULER's tasks {names} left out: --qa names no folder with it.")
        if other_files:
            left_out.append(
                f"LongBench files left out (not English or code): {', '.join(other_files)}."
            )
        known = {**forced.TASKS, **labels.TASKS, **ruler.TASKS, **qa, **long.TASKS, **from_files}
        return known, left_out

    def writer(self) -> Writer:
        """A writer over these texts.

        Raises:
            TextError: no text there.
        """
        from transformers import AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(str(self.model))
        texts = Texts(read_texts("--texts", self.texts), tokenizer)
        return Writer(tokenizer, texts, self.forced_tokens, self.long_tokens)


@dataclass(frozen=True)
class _Part:
    """Some prompts of a group, by their numbers."""

    task: str
    context: int
    numbers: range
    seed: int

    def make(self, tasks: dict[str, Task], writer: Writer) -> list[Prompt]:
        # What fitted before must not depend on what this process made before.
        writer.sizes.clear()
        out = []
        for number in self.numbers:
            rng = Random(f"{self.seed} {self.task} {self.context} {number}")
            out.append(tasks[self.task].make(writer, rng, self.context, number))
        return out


_worker: tuple[dict[str, Task], Writer] | None = None


def _start_worker(sources: Sources) -> None:
    global _worker
    _worker = sources.tasks()[0], sources.writer()


def _work(part: _Part) -> list[Prompt]:
    assert _worker is not None
    return part.make(*_worker)


def make_groups(
    sources: Sources, names: Sequence[str], contexts: Sequence[int], prompts: int, seed: int
) -> list[Group]:
    """All prompts, the shorter contexts first; the same ones for the same arguments.

    Args:
        prompts: of each task and context, fewer where the task has no more.
        seed: another one draws other prompts.

    Raises:
        PromptError, TextError: a prompt cannot be made.
    """
    tasks = sources.tasks()[0]
    parts: dict[tuple[str, int], list[_Part]] = {}
    for context in contexts:
        for name in names:
            count = min(prompts, tasks[name].count or prompts)
            parts[name, context] = [
                _Part(name, context, range(first, min(first + CHUNK, count)), seed)
                for first in range(0, count, CHUNK)
            ]
    flat = [part for mine in parts.values() for part in mine]
    processes = min(len(flat), len(os.sched_getaffinity(0)))
    if processes == 1 or sum(len(part.numbers) for part in flat) <= FEW:
        writer = sources.writer()
        made: Any = iter([part.make(tasks, writer) for part in flat])
        return _grouped(parts, made)
    with ProcessPoolExecutor(
        processes, get_context("spawn"), initializer=_start_worker, initargs=(sources,)
    ) as pool:
        return _grouped(parts, pool.map(_work, flat))


def _grouped(parts: dict[tuple[str, int], list[_Part]], made: Any) -> list[Group]:
    return [
        Group(name, context, [prompt for _ in mine for prompt in next(made)])
        for (name, context), mine in parts.items()
    ]
