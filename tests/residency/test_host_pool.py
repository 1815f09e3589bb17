"""A host pool that the machine or its driver will not give is refused with the numbers."""

from __future__ import annotations

from types import SimpleNamespace

import psutil
import pytest
import torch

from specontext_vllm.residency import host_memory
from specontext_vllm.residency.host_memory import free_host_memory
from specontext_vllm.residency.host_pool import HostPool, HostPoolError


def test_a_pool_has_exactly_its_size(device):
    pool = HostPool((3, 5, 7), torch.bfloat16, device).tensor
    assert (
        pool.device.type == "cpu"
        and pool.untyped_storage().nbytes() == 3 * 5 * 7 * 2
        and not pool.any()
    )


def test_a_pool_gives_its_memory_back_and_takes_it_again(device, monkeypatch):
    def resident() -> int:
        return psutil.Process().memory_info().rss

    pool = HostPool((96 << 20,), torch.uint8, device)
    pool.tensor.fill_(7)
    address, full = pool.tensor.data_ptr(), resident()
    pool.give_back()
    assert resident() < full - (90 << 20)
    with monkeypatch.context() as patch:
        patch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=2**20))
        with pytest.raises(HostPoolError, match=r"the pool needs 0\.094 GiB and this"):
            pool.take_back()
    pool.take_back()
    pool.take_back()
    assert pool.tensor.data_ptr() == address
    # The device reads what the host writes there.
    pool.tensor.fill_(9)
    assert int(pool.tensor.to(device)[-1]) == 9
    pool.give_back()
    pool.give_back()


@pytest.mark.gpu
def test_a_kernel_writes_to_a_pool_that_was_given_back_meanwhile(device):
    from specontext_vllm.residency.transfer import write
    from specontext_vllm.step_data import PageTable
    from specontext_vllm.tier_data import LayerMemory

    pool = HostPool((8, 2, 16, 128), torch.float16, device)
    page_table = PageTable.allocate(1, 2, 4, device)
    arena = torch.zeros(8, 2, 16, 128, dtype=torch.float16, device=device)
    frames = torch.arange(8, dtype=torch.int32, device=device)
    resident = torch.ones(1, dtype=torch.int32, device=device)
    memory = LayerMemory(0, page_table, frames, resident, arena, pool.tensor)
    key, value = (
        torch.full((3, 2, 64), float(n), dtype=torch.float16, device=device) for n in (3, 4)
    )
    slots = torch.tensor([16, 17, 40], device=device)
    for _ in range(2):
        write(key, value, slots, memory, decode_tokens=0, queries=None)
        torch.cuda.synchronize()
        assert pool.tensor[1, :, :2, :64].eq(3).all() and pool.tensor[2, :, 8, 64:].eq(4).all()
        pool.give_back()
        pool.take_back()
        assert not pool.tensor.any()


def test_more_than_is_free_is_refused(monkeypatch):
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=2**30))
    with pytest.raises(
        HostPoolError,
        match=r"host_kv_gib: the pool needs 2\.00 GiB and this machine has 1\.00 GiB of memory "
        "free; lower it",
    ):
        HostPool((2**31,), torch.uint8, torch.device("cpu"))


def test_a_driver_that_locks_no_more_refuses_the_pool(monkeypatch):
    """Root is above the limit on locked memory, on the GPU machine too, so the driver's answer is
    made up here.
    """
    asked = []
    runtime = SimpleNamespace(cudaHostRegister=lambda pointer, size, flags: asked.append(size) or 2)
    monkeypatch.setattr(torch.cuda, "cudart", lambda: runtime)
    with pytest.raises(
        HostPoolError,
        match=r"host_kv_gib: the driver refused to lock 0\.000004 GiB of memory \(2\); raise .* "
        r"\(ulimit -l\) or lower host_kv_gib",
    ):
        HostPool((4096,), torch.uint8, torch.device("cuda"))
    assert asked == [4096]


@pytest.mark.parametrize(
    ("files", "free"),
    [
        ({}, 100 << 30),
        ({"memory.max": "max", "memory.current": "5", "memory.stat": "anon 1"}, 100 << 30),
        (
            {
                "memory.max": str(64 << 30),
                "memory.current": str(20 << 30),
                "memory.stat": f"anon 1\ninactive_file {4 << 30}",
            },
            48 << 30,
        ),
        (
            {"memory.max": str(10 << 30), "memory.current": str(12 << 30), "memory.stat": "anon 1"},
            0,
        ),
        (
            {
                "memory/memory.limit_in_bytes": str(32 << 30),
                "memory/memory.usage_in_bytes": str(2 << 30),
                "memory/memory.stat": f"total_inactive_file {1 << 30}",
            },
            31 << 30,
        ),
    ],
    ids=["no control group", "no limit", "a container's limit", "over its limit", "version 1"],
)
def test_a_containers_limit_counts(tmp_path, monkeypatch, files, free):
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=100 << 30))
    monkeypatch.setattr(host_memory, "CGROUP", tmp_path)
    (tmp_path / "memory").mkdir()
    for name, text in files.items():
        (tmp_path / name).write_text(text + "\n")
    assert free_host_memory() == free
    if free < 50 << 30:
        with pytest.raises(HostPoolError, match=r"the pool needs 50\.00 GiB"):
            HostPool((50 << 30,), torch.uint8, torch.device("cpu"))
