"""The side stream of the copies: no layer reads before its pages are there, and one that waits in
vain ends the worker.
"""

import time

import pytest
import torch

from specontext_vllm.config import PAGE_SIZE
from specontext_vllm.residency.copy_stream import CopyStream
from specontext_vllm.residency.host_pool import HostPool
from specontext_vllm.residency.transfer import fetch
from specontext_vllm.step_data import Misses
from specontext_vllm.tier_data import KVPools
from specontext_vllm.triton_kernels import counters


def test_the_host_ends_the_engine_when_copies_did_not_come():
    copies = CopyStream(torch.device("cpu"), num_layers=7, seconds=3)
    copies.check()
    copies.progress.overdue.fill_(5 + 1)
    with pytest.raises(
        RuntimeError, match="layer 5 did not come from the host pool within 3 s.*Xid"
    ):
        copies.check()


@pytest.mark.gpu
@pytest.mark.parametrize("captured", [True, False])
def test_copies_that_were_never_started_are_noticed_at_the_next_look(captured):
    device, layers = torch.device("cuda"), 6
    resident, copies = (
        torch.full((1,), 2, dtype=torch.int32, device=device),
        CopyStream(device, layers, seconds=0.5),
    )
    end = torch.cuda.Event()

    def read() -> None:
        for layer in range(layers):
            copies.wait(layer, resident, None)

    read()
    torch.cuda.synchronize()
    copies.check()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        read()
    copies.announce()
    begin = time.monotonic()
    graph.replay() if captured else read()
    end.record()
    copies.check()
    assert not end.query(), "the look at the flag waited for the GPU"
    torch.cuda.synchronize()
    assert 0.5 <= time.monotonic() - begin < 1.5
    with pytest.raises(RuntimeError, match="layer 2 did not come from the host pool within 0.5 s"):
        copies.check()


@pytest.mark.gpu
def test_no_layer_goes_on_before_its_pages_are_there():
    """Rounds of copies against a stream that reads each layer as soon as it may, in a captured
    graph and outside one.
    """
    device, layers, heads, places = torch.device("cuda"), 6, 4, 64
    generator = torch.Generator().manual_seed(0)
    host = HostPool((layers - 2, places, heads, PAGE_SIZE, 64), torch.float32, device).tensor
    arena = torch.zeros(layers * places, heads, PAGE_SIZE, 64, device=device)
    seen = torch.zeros(layers, places, heads, PAGE_SIZE, 64, device=device)
    frames = (
        torch.randperm(layers * places, generator=generator).int().view(layers, places).to(device)
    )
    pools = KVPools(arena, host, 2)
    sources = torch.randperm(places * heads, generator=generator).int().to(device)
    targets = torch.randperm(places * heads, generator=generator).int().to(device)
    count, resident = (
        torch.tensor([n], dtype=torch.int32, device=device) for n in (places * heads, 2)
    )
    counts = torch.zeros(counters.COUNTERS, dtype=torch.int64, device=device)
    copies = CopyStream(device, layers)

    def read() -> None:
        for layer in range(2, layers):
            copies.wait(layer, resident, counts)
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
        copies.announce()
        copies.start(
            lambda done: fetch(
                pools,
                Misses(sources, targets, count),
                frames[2:],
                resident,
                layers=range(2, layers),
                done=done,
            )
        )
        graph.replay() if step % 2 else read()
        got = seen[2:].flatten(1, 2)[:, targets.long()].cpu()
        assert torch.equal(got, fresh.flatten(1, 2)[:, sources.cpu().long()]), step
    waited, late = counts[[counters.AWAITED, counters.LATE]].tolist()
    assert waited == 60 * (layers - 2) and 0 < late <= waited
