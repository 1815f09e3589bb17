"""Copies between the tiers: what they copy, and that no layer reads before they have."""

import pytest
import torch

from specontext_vllm.config import PAGE_SIZE
from specontext_vllm.residency.host_pool import allocate_host_pool
from specontext_vllm.residency.transfer import Copier, fetch
from specontext_vllm.triton_kernels import counters
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
    sources = torch.cat([torch.randperm(9 * HEADS, generator=generator)[:listed], torch.tensor([9999])]).int()
    targets = torch.cat([torch.randperm(11 * HEADS, generator=generator)[:listed], torch.tensor([-9999])]).int()
    reference = torch.full((31, HEADS, PAGE_SIZE, 8), float("nan"))
    arena, done = reference.clone().to(device), torch.zeros(7, dtype=torch.int32, device=device)
    numbers = [torch.tensor([listed], dtype=torch.int32), places, torch.tensor([resident], dtype=torch.int32)]
    fetch(host, reference, sources, targets, *numbers, layers=range(5, 7), first_mirrored=4)
    on_device = [t.to(device) for t in (sources, targets, *numbers)]
    rows = host.pin_memory() if device.type == "cuda" else host
    fetch_pages(
        rows.view(torch.int32).view(-1, PAGE_SIZE * 8), arena.view(torch.int32).view(-1, PAGE_SIZE * 8), *on_device,
        layers=range(5, 7), first_source=9 * HEADS, layer_sources=9 * HEADS, num_kv_heads=HEADS, done=done, programs=2, tile_bytes=1024,
    )  # fmt: skip
    torch.testing.assert_close(arena.cpu(), reference, rtol=0, atol=0, equal_nan=True)
    expected = torch.full_like(reference, float("nan"))
    for layer in range(max(5, resident), 7):
        for source, target in zip(sources[:listed].tolist(), targets[:listed].tolist()):
            expected[places[layer - 5, target // HEADS], target % HEADS] = host[layer - 4, source // HEADS, source % HEADS]
    torch.testing.assert_close(reference, expected, rtol=0, atol=0, equal_nan=True)
    # Resident or not, each program tells that it is through with a layer.
    assert done.tolist() == [0] * 5 + [2, 2]


@pytest.mark.parametrize("done", [6, 7, -(2**31)])
def test_waiting_ends_at_once_when_the_copies_are_there(done, device):
    """Three rounds of two programs; the counters wrap around."""
    epoch = 3 if done > 0 else 2**30
    told = torch.zeros(3, dtype=torch.int32, device=device)
    told[1] = done
    resident = torch.ones(1, dtype=torch.int32, device=device)
    await_pages(told, torch.tensor([epoch], dtype=torch.int32, device=device), resident, None, layer=1, programs=2)
    # A resident layer does not wait, whatever was copied.
    await_pages(told - 100, torch.tensor([epoch], dtype=torch.int32, device=device), resident, None, layer=0, programs=2)


@pytest.mark.gpu
def test_no_layer_goes_on_before_its_pages_are_there():
    """Rounds of copies against a stream that reads each layer as soon as it may, in a captured graph and outside one."""
    device, layers, heads, places = torch.device("cuda"), 6, 4, 64
    generator = torch.Generator().manual_seed(0)
    host = allocate_host_pool((layers - 2, places, heads, PAGE_SIZE, 64), torch.float32, device)
    arena = torch.zeros(layers * places, heads, PAGE_SIZE, 64, device=device)
    seen = torch.zeros(layers, places, heads, PAGE_SIZE, 64, device=device)
    frames = torch.randperm(layers * places, generator=generator).int().view(layers, places).to(device)
    sources = torch.randperm(places * heads, generator=generator).int().to(device)
    targets = torch.randperm(places * heads, generator=generator).int().to(device)
    count, resident = (torch.tensor([n], dtype=torch.int32, device=device) for n in (places * heads, 2))
    counts = torch.zeros(counters.COUNTERS, dtype=torch.int64, device=device)
    copier = Copier(device, layers)

    def read() -> None:
        for layer in range(2, layers):
            copier.wait(layer, resident, counts)
            seen[layer].copy_(arena[frames[layer].long()])

    read()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        read()
    counts.zero_()
    for step in range(60):
        fresh = torch.randn(host.shape, generator=generator)
        host.copy_(fresh)
        copier.expect()
        copier.start(
            lambda done: fetch(host, arena, sources, targets, count, frames[2:], resident, layers=range(2, layers), first_mirrored=2, done=done)
        )
        graph.replay() if step % 2 else read()
        got = seen[2:].flatten(1, 2)[:, targets.long()].cpu()
        assert torch.equal(got, fresh.flatten(1, 2)[:, sources.cpu().long()]), step
    waited, late = counts[[counters.AWAITED, counters.LATE]].tolist()
    assert waited == 60 * (layers - 2) and 0 < late <= waited
