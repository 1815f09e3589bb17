"""How much host memory there is, for the machine and for a container."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path

CGROUP = Path("/sys/fs/cgroup")
"""Where a container sees its own limits."""
CGROUP_FILES = (
    ("memory.max", "memory.current", "memory.stat", "inactive_file"),
    (
        "memory/memory.limit_in_bytes",
        "memory/memory.usage_in_bytes",
        "memory/memory.stat",
        "total_inactive_file",
    ),
)
"""Of control groups version 2 and 1: the limit, what is used of it, statistics, and the name of
their entry for memory that the kernel can take back. Without a limit the files are missing or the
limit is "max".
"""


def free_host_memory() -> int:
    """Bytes that this process may still take: the machine's available memory, or what its control
    group (a container's limit) has left if that is less.

    Page cache that the kernel can take back counts as free, as it does in psutil's figure.
    """
    import psutil

    free = psutil.virtual_memory().available
    for limit, usage, stat, cached in CGROUP_FILES:
        try:
            allowed, used = int((CGROUP / limit).read_text()), int((CGROUP / usage).read_text())
            reclaimable = dict(line.split() for line in (CGROUP / stat).read_text().splitlines())
        except (OSError, ValueError):
            continue
        free = min(free, max(0, allowed - used + int(reclaimable.get(cached, 0))))
    return free


def machine_memory() -> int:
    """Bytes of the machine's memory, or the control group's limit if that is lower."""
    import psutil

    total = psutil.virtual_memory().total
    for limit, *_ in CGROUP_FILES:
        with suppress(OSError, ValueError):
            total = min(total, int((CGROUP / limit).read_text()))
    return total
