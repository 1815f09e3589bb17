"""How much of the prompts stands in the texts that a head was trained on."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.real.prompts import Group
from benchmarks.real.settings import OptionError

WORDS = 13
"""Words of an n-gram; 13 is what GPT-3's authors looked for overlaps with (arXiv 2005.14165)."""

ALLOWED = 0.01
"""Share of a task's n-grams that may stand in the training texts: turns of phrase do."""


def _hashes(text: str) -> np.ndarray:
    """A number for each run of ``WORDS`` words, ``[N]`` uint64, whatever case and punctuation."""
    words = np.fromiter(
        (hash(word) & (2**64 - 1) for word in re.findall(r"[^\W_]+", text.lower())), np.uint64
    )
    if len(words) < WORDS:
        return np.empty(0, np.uint64)
    count, prime = len(words) - WORDS + 1, np.uint64(0x9E3779B97F4A7C15)
    out = np.zeros(count, np.uint64)
    for offset in range(WORDS):
        out = out * prime + words[offset : offset + count]
    return out


def _strings(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for part in value.values():
            yield from _strings(part)
    elif isinstance(value, list):
        for part in value:
            yield from _strings(part)


def _texts(path: Path) -> Iterator[str]:
    """All texts of a file: its lines' strings where it is JSON lines, else the whole."""
    content = path.read_text(encoding="utf-8", errors="replace")
    if path.suffix != ".jsonl":
        yield content
        return
    for line in content.split("\n"):
        if line.strip():
            yield " ".join(_strings(json.loads(line)))


class Training:
    """The n-grams of training files; folders are read whole.

    Raises:
        OptionError: a file that cannot be read.
    """

    def __init__(self, paths: Sequence[Path]) -> None:
        found = []
        for path in paths:
            files = (
                sorted(file for file in path.rglob("*") if file.is_file())
                if path.is_dir()
                else [path]
            )
            try:
                found += [_hashes(text) for file in files for text in _texts(file)]
            except (OSError, ValueError) as error:
                raise OptionError(f"--leaks: {path} cannot be read ({error}).") from None
        self._grams = np.unique(np.concatenate([*found, np.empty(0, np.uint64)]))

    def share(self, texts: Sequence[str]) -> float:
        """Share of the texts' n-grams that stand in the training files."""
        grams = np.concatenate([*map(_hashes, texts), np.empty(0, np.uint64)])
        return float(np.isin(grams, self._grams).mean()) if len(grams) else 0.0


def check_leaks(training: Training, groups: Sequence[Group], tokenizer: Any) -> dict[str, float]:
    """Share by task; of prompts and forced replies.

    Raises:
        OptionError: more than ``ALLOWED``.
    """
    texts: dict[str, list[str]] = {}
    for group in groups:
        texts.setdefault(group.task, []).extend(
            tokenizer.decode([*prompt.tokens, *(prompt.forced[0] if prompt.forced else [])])
            for prompt in group.prompts
        )
    shares = {task: training.share(mine) for task, mine in texts.items()}
    task = max(shares, key=lambda name: shares[name])
    if shares[task] > ALLOWED:
        raise OptionError(
            f"--leaks: {shares[task]:.1%} of all {WORDS} words in a row of task {task} stand in "
            f"the training files, more than {ALLOWED:.0%}; give --texts that were not trained on."
        )
    return shares
