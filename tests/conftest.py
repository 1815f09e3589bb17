"""Shared by all tests: which device they run on, and markers."""

import os

import pytest
import torch

CUDA = torch.cuda.is_available()
if not CUDA:
    # Before Triton is first imported: its interpreter then runs our kernels on CPU tensors. vLLM's CPU build does not
    # use Triton, so engines in this process are not affected.
    os.environ["TRITON_INTERPRET"] = "1"
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if CUDA:
        return
    skip = pytest.mark.skip(reason="needs a CUDA GPU")
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(skip)


@pytest.fixture
def device() -> torch.device:
    """Where kernels run: the GPU, or the CPU through Triton's interpreter."""
    return torch.device("cuda" if CUDA else "cpu")
