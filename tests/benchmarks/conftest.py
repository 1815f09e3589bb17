"""What tests of several benchmarks share."""

from collections.abc import Iterator
from random import Random
from types import SimpleNamespace

import pytest

from tests.conftest import CUDA
from tests.forked import fork_server


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    """A file that stays the same, whatever is written in the docs."""
    random, path = Random(0), tmp_path_factory.mktemp("texts") / "words.txt"
    path.write_text(" ".join("".join(random.choices("aeinorst", k=4)) for _ in range(4000)))
    return path


@pytest.fixture
def forked_children(monkeypatch) -> Iterator[None]:
    """Children on a CPU are forked from one that has imported vLLM. ``run_child`` spawns them, as
    test_report.py's do.
    """
    if CUDA:
        yield
        return
    imported = (
        "vllm.v1.worker.cpu_worker",
        "vllm.v1.worker.cpu_model_runner",
        "vllm.v1.engine.core",
    )
    with fork_server("vllm.entrypoints.llm", *imported) as context:
        get_context = SimpleNamespace(get_context=lambda method: context)
        monkeypatch.setattr("benchmarks.children.multiprocessing", get_context)
        yield
