"""Copying head pages from the host pool, against the torch path and a loop; waiting for them."""

import itertools
import time

import pytest
import torch
import triton.language as tl

from specontext_vllm.config import PAGE_SIZE
from specontext_vllm.residency.transfer import fetch
from specontext_vllm.step_data import Misses
from specontext_vllm.tier_data import CopyProgress, KVPools
from specontext_vllm.triton_kernels import counters
from specontext_vllm.triton_kernels import fetch_pages as module
from specontext_vllm.triton_kernels.fetch_pages import await_pages, fetch_pages

HEADS = 2


@pytest.mark.parametrize("resident", [4, 5, 6, 7])
def test_fetch_copies_what_is_listed_and_nothing_else(resident, device):
    """Layers 5 and 6 of a pool that begins with layer 4."""
    generator = torch.Generator().manual_seed(3)
    host = torch.randn(3, 9, HEADS, PAGE_SIZE, 8, generator=generator)
    places = torch.randperm(31, generator=generator).int()[:22].view(2, 11)
    listed = 9 * HEADS - 2
    # Behind the listed ones lie indices that must not be read.
    sources = torch.cat(
        [torch.randperm(9 * HEADS, generator=generator)[:listed], torch.tensor([9999])]
    ).int()
    targets = torch.cat(
        [torch.randperm(11 * HEADS, generator=generator)[:listed], torch.tensor([-9999])]
    ).int()
    reference = torch.full((31, HEADS, PAGE_SIZE, 8), float("nan"))
    arena, done = reference.clone().to(device), torch.zeros(7, dtype=torch.int32, device=device)
    count, number = (torch.tensor([n], dtype=torch.int32) for n in (listed, resident))
    fetch(
        KVPools(reference, host, 4),
        Misses(sources, targets, count),
        places,
        number,
        layers=range(5, 7),
    )
    rows = host.pin_memory() if device.type == "cuda" else host
    fetch_pages(
        rows.view(torch.int32).view(-1, PAGE_SIZE * 8),
        arena.view(torch.int32).view(-1, PAGE_SIZE * 8),
        Misses(sources.to(device), targets.to(device), count.to(device)),
        places.to(device),
        number.to(device),
        layers=range(5, 7),
        first_source=9 * HEADS,
        layer_sources=9 * HEADS,
        num_kv_heads=HEADS,
        done=done,
        programs=2,
        tile_bytes=1024,
    )
    torch.testing.assert_close(arena.cpu(), reference, rtol=0, atol=0, equal_nan=True)
    expected = torch.full_like(reference, float("nan"))
    for layer in range(max(5, resident), 7):
        for source, target in zip(sources[:listed].tolist(), targets[:listed].tolist()):
            expected[places[layer - 5, target // HEADS], target % HEADS] = host[
                layer - 4, source // HEADS, source % HEADS
            ]
    torch.testing.assert_close(reference, expected, rtol=0, atol=0, equal_nan=True)
    # Resident or not, each program tells that it is through with a layer.
    assert done.tolist() == [0] * 5 + [2, 2]


@pytest.mark.parametrize("done", [6, 7, -(2**31)])
def test_waiting_ends_at_once_when_the_copies_are_there(done, device):
    """Three rounds of two programs; the counters wrap around."""
    epoch = 3 if done > 0 else 2**30
    told = torch.zeros(3, dtype=torch.int32, device=device)
    told[1] = done
    resident, overdue = (
        torch.ones(1, dtype=torch.int32, device=device),
        torch.zeros(1, dtype=torch.int32, device=device),
    )
    started = torch.tensor([epoch], dtype=torch.int32, device=device)
    # In the interpreter a look at the GPU's clock, as by one who waits, is an error.
    await_pages(
        CopyProgress(told, started, overdue),
        resident,
        None,
        layer=1,
        programs=2,
        seconds=20,
    )
    # A resident layer does not wait, whatever was copied.
    await_pages(
        CopyProgress(told - 100, started, overdue),
        resident,
        None,
        layer=0,
        programs=2,
        seconds=20,
    )
    assert overdue.item() == 0


@pytest.mark.parametrize("timed", [True, False])
def test_a_copy_that_never_comes_is_told_of_and_holds_the_stream_up_but_once(
    timed, monkeypatch, device
):
    ticks = itertools.count()
    if device.type == "cpu":
        # The interpreter has no such clock: each look at it is a quarter of a second after the
        # last.
        monkeypatch.setattr(
            module, "clock", lambda: tl.full((), next(ticks) * 25 * 10**7, tl.int64)
        )
    told = torch.tensor([0, 0, 5, 6, 5], dtype=torch.int32, device=device)
    resident, epoch = (
        torch.ones(1, dtype=torch.int32, device=device),
        torch.full((1,), 3, dtype=torch.int32, device=device),
    )
    overdue = torch.zeros(1, dtype=torch.int32, pin_memory=device.type == "cuda")
    counts = torch.zeros(counters.COUNTERS, dtype=torch.int64, device=device)
    looks, begin = [], time.monotonic()
    for layer in range(5):
        await_pages(
            CopyProgress(told, epoch, overdue),
            resident,
            counts if timed else None,
            layer=layer,
            programs=2,
            seconds=1,
        )
        looks.append(next(ticks))
    if device.type == "cuda":
        torch.cuda.synchronize()
        assert 1 <= time.monotonic() - begin < 2
    else:
        # Of layer 0, resident, and 3, whose copies are there, none; of the first in vain all that a
        # second takes; of those behind it one.
        spent = [after - before - 1 - timed for before, after in itertools.pairwise([-1, *looks])]
        assert spent == [0 - timed, 5, 2, 0 - timed, 2]
    assert overdue.item() == 1 + 1
    assert counts[[counters.AWAITED, counters.LATE]].tolist() == ([4, 3] if timed else [0, 0])
