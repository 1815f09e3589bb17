"""Timed steps that have the machine to themselves, though other work shares it: that stands still.

Engines take minutes to start and seconds to be timed, so others can start, or tests run, on the
same GPU meanwhile; they are stopped for these seconds.
"""

from __future__ import annotations

import fcntl
import os
import signal
import tempfile
import time
from pathlib import Path
from typing import TextIO

ROOT = "BENCHMARKS_STANDSTILL"
"""Environment variable: the process whose descendants share the machine."""
DRAIN_S = 3.0
"""What was launched on the GPU before its process stopped ends by then: prefill steps of long
contexts take half a second each, and an engine is two ahead.
"""


class Standstill:
    """A ``with`` block in which others can be told to stop; they go on at its end. Of several such
    blocks on a machine one at a time stops the others, the next one waits.

    Others are all descendants of the process that ``BENCHMARKS_STANDSTILL`` names, but for this
    process, its ancestors and its descendants. Without the variable nothing is stopped.
    """

    def __init__(self) -> None:
        self.root = int(os.environ.get(ROOT, "0"))
        self._lock: TextIO | None = None
        self._stopped: list[int] = []

    def __enter__(self) -> Standstill:
        return self

    def __exit__(self, *_: object) -> None:
        _send(self._stopped, signal.SIGCONT)
        self._stopped = []
        if self._lock is not None:
            self._lock.close()
            self._lock = None

    def stop_others(self) -> None:
        """Stop them, if they do not stand still yet."""
        if not self.root or self._lock is not None:
            return
        self._lock = Path(tempfile.gettempdir(), f"standstill-{self.root}.lock").open("w")
        fcntl.flock(self._lock, fcntl.LOCK_EX)
        self._stopped = _others(self.root)
        _send(self._stopped, signal.SIGSTOP)
        time.sleep(DRAIN_S)


def _others(root: int) -> list[int]:
    parents = _parents()
    me = os.getpid()
    ancestors = _line(me, parents)
    return [
        pid
        for pid in parents
        if pid not in ancestors
        and (line := _line(pid, parents))
        and root in line
        and me not in line
    ]


def _line(pid: int, parents: dict[int, int]) -> list[int]:
    """The process and its ancestors."""
    line = [pid]
    while (pid := parents.get(pid, 0)) and pid not in line:
        line.append(pid)
    return line


def _parents() -> dict[int, int]:
    """Each process' parent."""
    found = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            # The name, in brackets, may hold anything.
            found[int(stat.parent.name)] = int(stat.read_text().rpartition(")")[2].split()[1])
        except OSError:
            continue  # it has ended
    return found


def _send(pids: list[int], number: int) -> None:
    for pid in pids:
        try:
            os.kill(pid, number)
        except ProcessLookupError:
            continue
