"""Writing new tokens into frames and the mirror: the kernel against the torch path."""

import pytest
import torch

from specontext_vllm.config import PAGE_SIZE
from specontext_vllm.residency.transfer import write
from specontext_vllm.step_data import PageTable
from specontext_vllm.tier_data import LayerMemory
from specontext_vllm.triton_kernels.write_tiered import write_tiered

HEADS = 2


@pytest.mark.parametrize("mirrored", [True, False])
@pytest.mark.parametrize("resident", [1, 0], ids=["resident", "offloaded"])
def test_write_kernel_matches_reference(mirrored, resident, device):
    generator = torch.Generator().manual_seed(5)
    tokens, decodes, d = 7, 2, 4
    key, value = (
        torch.randn(tokens + 2, HEADS, d, generator=generator),
        torch.randn(tokens + 2, HEADS, d, generator=generator),
    )
    slots = torch.tensor([40, 55, 16, 17, -1, 19, 100])
    lengths = torch.tensor([17, 17, 30, 30], dtype=torch.int32)
    table = torch.tensor([[2, 4, -9], [3, 5, -9], [6, 8, -9], [7, 9, -9]], dtype=torch.int32)
    frames = torch.randperm(9, generator=generator).int() + 8
    arena, mirror = (
        torch.full((20, HEADS, PAGE_SIZE, 2 * d), float("nan")),
        torch.full((9, HEADS, PAGE_SIZE, 2 * d), float("nan")),
    )
    mine, my_mirror = arena.clone().to(device), mirror.clone()
    if device.type == "cuda":
        my_mirror = my_mirror.pin_memory()
    flag = torch.tensor([resident], dtype=torch.int32)
    write(
        key,
        value,
        slots,
        LayerMemory(
            layer=0,
            table=PageTable(table, lengths, HEADS),
            frames=frames,
            resident=flag,
            arena=arena,
            mirror=mirror if mirrored else None,
        ),
        num_decodes=decodes,
    )
    write_tiered(
        *(t.to(device) for t in (key, value, slots)),
        LayerMemory(
            layer=0,
            table=PageTable(table.to(device), lengths.to(device), HEADS),
            frames=frames.to(device),
            resident=flag.to(device),
            arena=mine,
            mirror=my_mirror if mirrored else None,
        ),
        num_decodes=decodes,
    )
    if device.type == "cuda":
        torch.cuda.synchronize()
    torch.testing.assert_close(mine.cpu(), arena, rtol=0, atol=0, equal_nan=True)
    torch.testing.assert_close(my_mirror, mirror, rtol=0, atol=0, equal_nan=True)
    assert torch.equal(arena[2, 0, 0], torch.cat([key[0, 0], value[0, 0]]))
    if mirrored:
        assert torch.equal(mirror[3, 1, 7], torch.cat([key[1, 1], value[1, 1]]))
    if resident:
        assert torch.equal(arena[frames[1], 1, 3], torch.cat([key[5, 1], value[5, 1]]))
