"""All tasks by name."""

from __future__ import annotations

from benchmarks.real import forced, ruler
from benchmarks.real.prompts import Task


def find_tasks() -> dict[str, Task]:
    """The tasks there are."""
    return {**forced.TASKS, **ruler.TASKS}
