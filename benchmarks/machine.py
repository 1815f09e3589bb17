"""The machine's facts that stand beside every result. Opens no CUDA context."""

from __future__ import annotations

import os
import platform
import re
import shutil
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

PACKAGES = ("torch", "vllm", "triton", "transformers", "numpy")


def facts() -> dict[str, Any]:
    """GPUs (name, driver, MiB of memory), CPU, memory in GiB, package versions and the git commit,
    where each is known.
    """
    return {
        "gpus": gpus(),
        "cpu": _cpu_name(),
        "cores": os.cpu_count(),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "os": platform.platform(),
        "python": platform.python_version(),
        "packages": {name: _version(name) for name in PACKAGES},
        "commit": _commit(),
    }


def gpus() -> list[dict[str, str]]:
    """One dict per GPU, as nvidia-smi names it; empty without one."""
    listing = _output(
        "nvidia-smi", "--query-gpu=name,driver_version,memory.total", "--format=csv,noheader"
    )
    fields = ("name", "driver", "memory")
    return [
        dict(zip(fields, (part.strip() for part in line.split(",")), strict=True))
        for line in listing.splitlines()
        if line
    ]


def device_slug(machine: dict[str, Any]) -> str:
    """Short name for result files: `h200`, `rtx-4060`, `cpu`."""
    if not machine["gpus"]:
        return "cpu"
    name = re.sub(r"nvidia|geforce", "", machine["gpus"][0]["name"].lower())
    return re.sub(r"[^a-z0-9]+", "-", name).strip("-")


def describe(machine: dict[str, Any]) -> str:
    """The facts in one line."""
    return f"{describe_device(machine)}; commit {machine['commit'] or 'unknown'}"


def describe_device(machine: dict[str, Any]) -> str:
    """The facts in one line, without the commit; machines of one kind, which are lent in turn, are
    described alike.
    """
    devices = [
        f"{gpu['name']} ({gpu['memory']}, driver {gpu['driver']})" for gpu in machine["gpus"]
    ]
    packages = ", ".join(
        f"{name} {number}" for name, number in machine["packages"].items() if number
    )
    return "; ".join([*devices, f"{machine['cpu']}, {machine['cores']} cores", packages])


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        found = re.search(r"^model name\s*:\s*(.+)$", info.read_text(), re.MULTILINE)
        if found:
            return found.group(1).strip()
    return platform.processor() or platform.machine()


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _commit() -> str | None:
    """Short hash, with `+` when the tree has changes."""
    root = str(Path(__file__).parents[1])
    commit = _output("git", "-C", root, "rev-parse", "--short=12", "HEAD")
    return (
        (commit + ("+" if _output("git", "-C", root, "status", "--porcelain") else ""))
        if commit
        else None
    )


def _output(*command: str) -> str:
    if shutil.which(command[0]) is None:
        return ""
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return done.stdout.strip() if done.returncode == 0 else ""
