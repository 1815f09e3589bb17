"""What tests of several benchmarks share."""

from random import Random
from types import SimpleNamespace

import pytest

from tests.conftest import CUDA
from tests.forked import context


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    """A file that stays the same, whatever is written in the docs."""
    random, path = Random(0), tmp_path_factory.mktemp("texts") / "words.txt"
    path.write_text(" ".join("".join(random.choices("aeinorst", k=4)) for _ in range(4000)))
    return path


@pytest.fixture
def forked_children(monkeypatch) -> None:
    """Children on a CPU are forked from one that has imported vLLM. ``run_child`` spawns them, as
    test_report.py's do.
    """
    if CUDA:
        return
    stand_in = SimpleNamespace(get_context=lambda method: context())
    monkeypatch.setattr("benchmarks.children.multiprocessing", stand_in)
