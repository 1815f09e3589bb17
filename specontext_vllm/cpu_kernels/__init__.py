"""The C++ kernels of csrc/cpu, where they were built for this machine's torch and CPU.

The operators are ``torch.ops.specontext_cpu``; csrc/cpu/bindings.cpp has their signatures. What
they compute is defined by the torch code beside each call, which runs where they are missing.
"""

from __future__ import annotations

import os
from functools import cache
from pathlib import Path

SWITCH = "SPECONTEXT_CPU_KERNELS"
"""Environment variable; 0: run the definitions in torch instead, to compare."""

OPERATORS = ("sparse_decode", "write_kv", "score_pages", "select_pages", "pack_pages")
FOLDER = Path(__file__).parent


def available() -> bool:
    """Whether the kernels run; loads them at first."""
    return why_not() is None


@cache
def why_not() -> str | None:
    """Why the definitions in torch run instead of the kernels, a sentence that says what to do;
    None: the kernels run.
    """
    import torch

    if os.environ.get(SWITCH) == "0":
        return f"{SWITCH}: found 0, so a CPU runs plain torch, which is slow; unset it."
    major, minor = torch.__version__.split(".")[:2]
    capability = torch.backends.cpu.get_cpu_capability().lower()
    # Only x86 has a library for each capability.
    names = [f"{name}-torch{major}_{minor}.so" for name in (capability, "default")]
    library = next((FOLDER / name for name in names if (FOLDER / name).exists()), None)
    if library is None:
        return (
            f"no C++ kernels for torch {major}.{minor} and a CPU with {capability} are installed, "
            "so a CPU runs plain torch, which is slow; install specontext-vllm from source with a "
            "C++ compiler and pip's --no-build-isolation."
        )
    try:
        torch.ops.load_library(library)
    except OSError as error:
        return (
            f"{library} does not load ({error}), so a CPU runs plain torch, which is slow; install "
            "specontext-vllm from source again."
        )
    for name in OPERATORS:
        torch.library.register_fake(f"specontext_cpu::{name}", _writes_into_its_arguments)
    return None


def _writes_into_its_arguments(*arguments: object, **named: object) -> None:
    """What tracing is told of each operator: it returns nothing."""
