"""The grid's cells: what one is, and the folder that keeps those that are done."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.accuracy.writer import Example
from specontext_vllm.config import SpeContextConfig

DENSE = "dense"


class CellError(ValueError):
    """A folder whose cells cannot be used; the message is one sentence."""


@dataclass(frozen=True)
class Setting:
    """What the decode steps read: a retriever, its budget in tokens (None for dense), the threshold
    of its fallback (0: off), and the newest tokens that are always among them (None: the default).
    """

    retriever: str
    budget: int | None = None
    threshold: float = 0.0
    recents: int | None = None

    @property
    def name(self) -> str:
        words = [self.retriever, *([] if self.budget is None else [str(self.budget)])]
        words += [f"threshold {self.threshold:g}"] if self.threshold else []
        return " ".join([*words, *([] if self.recents is None else [f"recents {self.recents}"])])

    @property
    def recent_tokens(self) -> int | None:
        """Newest tokens that are always read, None where all are. The default wherever it leaves a
        page to choose; else a quarter of the budget.
        """
        if self.budget is None or self.recents is not None:
            return self.recents
        default = SpeContextConfig()
        return default.recent_tokens if self.budget >= default.min_budget else self.budget // 4

    def changes(self) -> dict[str, Any]:
        """Arguments of ``specontext_set``.

        Raises:
            ConfigError: no such setting can be.
        """
        settings = {"retriever": self.retriever, "confidence_threshold": self.threshold}
        if self.budget is not None:
            settings |= {"budget": self.budget, "recent_tokens": self.recent_tokens}
        SpeContextConfig.from_settings(settings)
        return settings


@dataclass(frozen=True)
class Cell:
    """One figure of the grid."""

    task: str
    context: int
    setting: Setting

    @property
    def name(self) -> str:
        return f"{self.task}, {self.context}, {self.setting.name}"


@dataclass
class Group:
    """Cells over the same prompts, which are prefilled once."""

    task: str
    context: int
    examples: Sequence[Example]

    def cell(self, setting: Setting) -> Cell:
        return Cell(self.task, self.context, setting)

    @property
    def digest(self) -> str:
        """Of everything that is asked."""
        content = [[e.prompt, e.answers, e.reply_tokens, e.forced] for e in self.examples]
        return hashlib.sha256(json.dumps(content).encode()).hexdigest()[:16]


class CellStore:
    """A folder with a file for each finished cell, and one that says what they were measured with.

    Args:
        folder: made if it does not exist.
        settings: all that must be the same for cells to stand in one table, JSON-serialisable.

    Raises:
        CellError: the folder's cells were measured with something else.
    """

    def __init__(self, folder: Path, settings: dict[str, Any]) -> None:
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / "settings.json"
        if path.exists():
            found = json.loads(path.read_text())
            different = sorted(
                key for key in {*found, *settings} if found.get(key) != settings.get(key)
            )
            if different:
                key = different[0]
                raise CellError(
                    f"--work: {folder} holds cells measured with another {key} "
                    f"({found.get(key)!r}, now {settings.get(key)!r}); name "
                    f"another folder, or delete this one to start anew."
                )
        _write(path, settings)

    def get(self, cell: Cell, digest: str) -> dict[str, Any] | None:
        """The finished cell, or None.

        Raises:
            CellError: it was asked other prompts, or had other settings under the same name.
        """
        path = self._path(cell)
        if not path.exists():
            return None
        found = json.loads(path.read_text())
        if (found["digest"], found["changes"]) != (digest, cell.setting.changes()):
            raise CellError(
                f"--work: {self.folder} holds the cell ({cell.name}) for other prompts (another "
                "number of them, or other texts) or other "
                f"settings; name another folder, or delete this one to start anew."
            )
        return found

    def put(self, cell: Cell, digest: str, result: dict[str, Any]) -> None:
        """Keep a finished cell."""
        _write(
            self._path(cell),
            {"cell": cell.name, "digest": digest, "changes": cell.setting.changes(), **result},
        )

    def _path(self, cell: Cell) -> Path:
        name = f"{cell.task}-{cell.context}-{cell.setting.name}"
        return self.folder / f"{name.replace('/', '_').replace(', ', '-').replace(' ', '-')}.json"


def _write(path: Path, content: dict[str, Any]) -> None:
    # A run may be killed at any time: a file is there whole or not at all.
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(content, ensure_ascii=False) + "\n")
    partial.replace(path)
