"""Memory in large pieces, where the system gives them to who asks."""

from __future__ import annotations

import mmap
import sys
from pathlib import Path

import pytest
import torch

from specontext_vllm.cpu_kernels import huge_pages


def huge_bytes(tensor: torch.Tensor) -> int:
    """Bytes in large pieces of the mapping that holds the tensor."""
    inside = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        head = line.split()[0]
        if "-" in head and not head.endswith(":"):
            low, high = (int(part, 16) for part in head.split("-"))
            inside = low <= tensor.data_ptr() + tensor.nbytes // 2 < high
        elif inside and head == "AnonHugePages:":
            return int(line.split()[1]) * 1024
    return 0


def test_memory_becomes_zeros_in_large_pieces():
    if sys.platform != "linux" or "[madvise]" not in huge_pages.SETTING.read_text():
        pytest.skip("this system gives large pieces to all or to nobody")
    # A mapping of its own: what tests before have freed may lie in large pieces already.
    mapping = mmap.mmap(-1, 2**24, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    memory = torch.frombuffer(mapping, dtype=torch.uint8).fill_(1)
    assert huge_bytes(memory) == 0
    # Two views of one storage.
    asked = huge_pages.use_huge_pages((memory[: 2**20], memory[2**20 :]))
    assert 2**24 - 2**22 < asked <= 2**24
    assert memory.count_nonzero() <= 2**24 - asked
    assert huge_bytes(memory) > 0


def test_small_tensors_stay_as_they_are():
    memory = torch.ones(2**10)
    assert huge_pages.use_huge_pages((memory,)) == 0
    assert memory.all()


@pytest.mark.parametrize("setting", ["[always] madvise never", "always madvise [never]", None])
def test_nothing_is_asked_where_it_changes_nothing(monkeypatch, tmp_path, setting):
    place = tmp_path / "enabled"
    if setting is not None:
        place.write_text(setting)
    monkeypatch.setattr(huge_pages, "SETTING", place)
    memory = torch.ones(2**23, dtype=torch.uint8)
    assert huge_pages.use_huge_pages((memory,)) == 0
    assert memory.all()
