"""The kernels of csrc/cpu; where they are not built, only the test that says so runs."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from specontext_vllm import cpu_kernels

if folder := os.environ.get("SPECONTEXT_TEST_KERNELS"):
    # Built otherwise: test_sanitizer.py.
    cpu_kernels.FOLDER = Path(folder)


@pytest.fixture(scope="module")
def ops() -> object:
    """The operators; skips where they are missing (test_build.py says whether they may be)."""
    if (reason := cpu_kernels.why_not()) is not None:
        pytest.skip(reason)
    return torch.ops.specontext_cpu


@pytest.fixture
def threads() -> Iterator[Callable[[int], None]]:
    """Sets the number of threads; the one before comes back."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)
