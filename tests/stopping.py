"""Stopping another process, and knowing that it has stopped."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path


def stop(pid: int, seconds: float = 30) -> None:
    """Send SIGSTOP and wait until every thread has stopped.

    One thread is woken by the signal and stops the others once it runs: on a busy machine these go
    on meanwhile, and may answer what was sent after the signal.

    Raises:
        TimeoutError: they have not stopped within ``seconds``.
    """
    os.kill(pid, signal.SIGSTOP)
    deadline = time.monotonic() + seconds
    while any(state != "T" for state in _thread_states(pid)):
        if time.monotonic() > deadline:
            raise TimeoutError(f"process {pid} has not stopped within {seconds:g} s")
        time.sleep(0.001)


def _thread_states(pid: int) -> list[str]:
    """The letters of proc(5), a thread each."""
    stats = Path(f"/proc/{pid}/task").glob("*/stat")
    return [stat.read_text().rpartition(")")[2].split()[0] for stat in stats]
