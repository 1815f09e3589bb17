"""Finished cells as JSON lines, so that a second run goes on where the first one stopped."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.real.prompts import Group
from benchmarks.real.settings import Setting


@dataclass(frozen=True)
class Cell:
    """One figure: prompts of one task and context under one setting."""

    task: str
    context: int
    setting: Setting

    @property
    def name(self) -> str:
        return f"{self.task}, {self.context}, {self.setting.name}"


class Store:
    """A file with a line for each finished cell. Cells that were measured with something else, or
    asked other prompts, lie beside them under keys of their own.

    Args:
        path: made if it does not exist.
        shared: what all cells of this run were measured with, JSON-serialisable.
        heads: digests of the heads by name.
    """

    def __init__(self, path: Path, shared: dict[str, Any], heads: dict[str, str]) -> None:
        self.path, self._shared, self._heads = path, shared, heads
        path.parent.mkdir(parents=True, exist_ok=True)
        self._found: dict[str, dict[str, Any]] = {}
        whole = 0
        content = path.read_bytes() if path.exists() else b""
        for line in content.splitlines(keepends=True):
            # A run may be killed at any time: its last line is there whole, or counts for nothing.
            if not line.endswith(b"\n"):
                break
            whole += len(line)
            cell = json.loads(line)
            self._found[cell["key"]] = cell
        if whole != len(content):
            path.write_bytes(content[:whole])

    def key(self, group: Group, setting: Setting) -> str:
        """Digest of all that makes a cell's figures."""
        variant = setting.variant
        content = [
            self._shared,
            self._heads.get(variant.head or ""),
            variant.at_start(),
            setting.changes(),
            group.task,
            group.context,
            group.digest,
        ]
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:20]

    def get(self, group: Group, setting: Setting) -> dict[str, Any] | None:
        """The finished cell, or None."""
        return self._found.get(self.key(group, setting))

    def put(self, group: Group, setting: Setting, result: dict[str, Any]) -> None:
        """Keep a finished cell."""
        name = Cell(group.task, group.context, setting).name
        line = {"key": self.key(group, setting), "cell": name, **result}
        self._found[line["key"]] = line
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line, ensure_ascii=False) + "\n")
