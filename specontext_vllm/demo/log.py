"""The training's log."""

from __future__ import annotations

import time
from pathlib import Path


class Log:
    """Lines to the terminal and to a file, with seconds since the start."""

    def __init__(self, file: Path) -> None:
        self.start, self.file = time.time(), file.open("w")

    def __call__(self, text: str) -> None:
        line = f"[{self.seconds:6.1f} s] {text}"
        print(line, flush=True)
        self.file.write(line + "\n")
        self.file.flush()

    @property
    def seconds(self) -> float:
        return time.time() - self.start
