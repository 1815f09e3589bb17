"""The option --tensor-parallel-size of benchmarks, and how a result says what it was."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from benchmarks.machine import gpus

Workers = Annotated[
    int,
    typer.Option(
        "--tensor-parallel-size",
        min=1,
        help="vLLM's, of all engines of vLLM, with a GPU for each worker; over 1 it joins the "
        "result's name.",
    ),
]


def tensor_parallel(workers: int) -> dict[str, Any]:
    """Arguments of ``LLM`` for so many workers."""
    return (
        {"tensor_parallel_size": workers, "distributed_executor_backend": "mp"}
        if workers > 1
        else {}
    )


def refuse_workers(workers: int) -> None:
    """Raise a ValueError where the machine has GPUs, but fewer than ``workers``."""
    found = len(gpus())
    if 0 < found < workers:
        raise ValueError(
            f"--tensor-parallel-size: found {workers}, but this machine has {found} GPU(s); give "
            "no more than these."
        )


def workers_suffix(workers: int) -> str:
    """What joins the name of a result."""
    return f"-tp{workers}" if workers > 1 else ""


def workers_title(workers: int) -> str:
    """What joins a result's title."""
    return f", {workers} workers" if workers > 1 else ""
