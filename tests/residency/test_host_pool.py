"""A host pool that the machine or its driver will not give is refused with the numbers."""

from __future__ import annotations

from types import SimpleNamespace

import psutil
import pytest
import torch

from specontext_vllm.residency.host_pool import HostPoolError, allocate_host_pool


def test_a_pool_has_exactly_its_size(device):
    pool = allocate_host_pool((3, 5, 7), torch.bfloat16, device)
    assert pool.device.type == "cpu" and pool.untyped_storage().nbytes() == 3 * 5 * 7 * 2 and not pool.any()


def test_more_than_is_free_is_refused(monkeypatch):
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=2**30))
    with pytest.raises(HostPoolError, match=r"host_kv_gib: the pool needs 2\.00 GiB and this machine has 1\.00 GiB of memory free; lower it"):
        allocate_host_pool((2**31,), torch.uint8, torch.device("cpu"))


def test_a_driver_that_locks_no_more_is_heard(monkeypatch):
    """Root is above the limit on locked memory, on the GPU machine too, so the driver's answer is made up here."""
    asked = []
    runtime = SimpleNamespace(cudaHostRegister=lambda pointer, size, flags: asked.append(size) or 2)
    monkeypatch.setattr(torch.cuda, "cudart", lambda: runtime)
    with pytest.raises(HostPoolError, match=r"host_kv_gib: the driver refused to lock 0\.00 GiB of memory \(2\); raise .* \(ulimit -l\) or lower host_kv_gib"):
        allocate_host_pool((4096,), torch.uint8, torch.device("cuda"))
    assert asked == [4096]
