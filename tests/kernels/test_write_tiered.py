"""Writing new tokens into frames and the mirror: the kernel against the torch path and a loop."""

import pytest
import torch

from specontext_vllm.config import PAGE_SIZE, pages_for
from specontext_vllm.float8 import FP8, KVScales, to_float8
from specontext_vllm.residency.transfer import write
from specontext_vllm.step_data import PageTable, RowQueries
from specontext_vllm.tier_data import LayerMemory
from specontext_vllm.triton_kernels.write_tiered import write_tiered

HEADS = 2
PAGES, FRAMES, LAYER = 12, 9, 4


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
        decode_tokens=decodes,
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
        decode_tokens=decodes,
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


@pytest.mark.parametrize("mirrored", [True, False], ids=["mirrored", "no-mirror"])
@pytest.mark.parametrize("resident", [True, False], ids=["resident", "offloaded"])
@pytest.mark.parametrize(
    ("heads", "width"), [pytest.param(2, 32, id="gqa"), pytest.param(3, 40, id="odd")]
)
def test_tokens_go_where_their_layer_reads_them_and_to_the_mirror(
    heads, width, resident, mirrored, device
):
    decodes, prompts = 3, 5
    table = PageTable.allocate(decodes + 1, heads, 4, device)
    table.pages.fill_(-1)
    # Each KV head has pages of its own, none in the last frame, so that one is always free; the
    # new token is the last of its head's last page.
    lengths = torch.tensor([1, 40, 16], dtype=torch.int32).repeat_interleave(heads)
    head_pages = torch.randperm((FRAMES - 1) * heads)[: decodes * heads].int()
    for sequence, tokens in enumerate(lengths.tolist()):
        table.pages[sequence, pages_for(tokens) - 1] = int(head_pages[sequence])
    table.lengths[: len(lengths)] = lengths.to(device)
    # A padding token among the prompt's; tokens behind the slots that belong to no row.
    slots = torch.randperm(PAGES * PAGE_SIZE)[: decodes + prompts]
    slots[decodes + 2] = -1
    # Frames that the decode rows' pages do not use.
    free = [f for f in range(FRAMES) if not (head_pages // heads == f).any()]
    frames = torch.tensor([free[page % len(free)] for page in range(PAGES)], dtype=torch.int32)
    key, value = torch.randn(2, decodes + prompts + 2, heads, width)
    arena, mirror = (
        torch.full((count, heads, PAGE_SIZE, 2 * width), float("nan")) for count in (FRAMES, PAGES)
    )
    on_device, mirror_there = arena.to(device, copy=True), mirror.to(device, copy=True)
    memory = LayerMemory(
        LAYER,
        table,
        frames.to(device),
        torch.tensor([LAYER + resident], dtype=torch.int32, device=device),
        on_device,
        mirror_there if mirrored else None,
    )
    write_tiered(key.to(device), value.to(device), slots.to(device), memory, decode_tokens=decodes)
    for token, slot in enumerate(slots.tolist()):
        if slot < 0:
            continue
        page, offset = divmod(slot, PAGE_SIZE)
        new = torch.cat([key[token], value[token]], -1)
        if mirrored:
            mirror[page, :, offset] = new
        for head in range(heads):
            if token < decodes:
                at = int(head_pages[token * heads + head])
                last = (int(lengths[token * heads + head]) - 1) % PAGE_SIZE
                arena[at // heads, at % heads, last] = new[head]
            elif resident:
                arena[int(frames[page]), head, offset] = new[head]
    torch.testing.assert_close(on_device.cpu(), arena, rtol=0, atol=0, equal_nan=True)
    torch.testing.assert_close(mirror_there.cpu(), mirror, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("padding", [0, 2], ids=["as many rows", "rows of padding"])
def test_drafts_go_behind_their_row_s_first_token_on_the_page_before_too(padding, device):
    """The kernel and the torch path; a row of each number of tokens, pages crossed."""
    query_lens, lengths = [1, 4, 3, 2], [17, 34, 48, 16]
    rows, tokens, d = len(query_lens), sum(query_lens), 4
    starts = torch.tensor([0, 1, 5, 8, 10, *[10] * padding], dtype=torch.int32)
    table = PageTable.allocate(rows + padding, HEADS, 3, device)
    table.pages.copy_(torch.randperm(table.pages.numel()).view(table.pages.shape))
    table.lengths[: rows * HEADS] = torch.tensor(lengths).repeat_interleave(HEADS).int().to(device)
    slots = torch.full((tokens + 3,), -1)
    slots[:tokens] = torch.randperm(PAGES * PAGE_SIZE)[:tokens]
    key, value = torch.randn(2, tokens + 3, HEADS, d)
    shape = (table.pages.numel() // HEADS, HEADS, PAGE_SIZE, 2 * d)
    expected = torch.full(shape, float("nan"))
    token = 0
    for row, count in enumerate(query_lens):
        for place in range(lengths[row] - count, lengths[row]):
            for head in range(HEADS):
                page = int(table.pages[row * HEADS + head, place // PAGE_SIZE])
                new = torch.cat([key[token, head], value[token, head]])
                expected.view(-1, PAGE_SIZE, 2 * d)[page, place % PAGE_SIZE] = new
            token += 1
    for function, where in ((write_tiered, device), (write, torch.device("cpu"))):
        arena = torch.full(shape, float("nan"), device=where)
        memory = LayerMemory(
            layer=0,
            table=PageTable(table.pages.to(where), table.lengths.to(where), HEADS),
            frames=torch.zeros(PAGES, dtype=torch.int32, device=where),
            resident=torch.zeros(1, dtype=torch.int32, device=where),
            arena=arena,
            mirror=None,
        )
        function(
            key.to(where),
            value.to(where),
            slots.to(where),
            memory,
            decode_tokens=tokens,
            queries=RowQueries(starts.to(where), max(query_lens)),
        )
        torch.testing.assert_close(arena.cpu(), expected, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("mirrored", [True, False], ids=["mirrored", "no-mirror"])
def test_memory_in_8_bit_floats_takes_what_is_written_divided_and_rounded(mirrored, device):
    """The kernel and the torch path; decode rows, prompt rows, padding."""
    decodes, prompts, d = 3, 4, 32
    scales = [torch.tensor(scale, device=device) for scale in (0.037, 2.5, 1.0)]
    table = PageTable.allocate(decodes, HEADS, 2, device)
    table.pages.copy_(torch.randperm(table.pages.numel()).view(table.pages.shape))
    table.lengths.fill_(17)
    slots = torch.randperm(PAGES * PAGE_SIZE)[: decodes + prompts]
    slots[-1] = -1
    frames = torch.randperm(PAGES) + decodes * HEADS
    key, value = 10 * torch.randn(2, decodes + prompts, HEADS, d)
    largest = [1e4, -1e4, float("nan")]
    if device.type == "cpu":
        # Triton's interpreter does not carry where rounding reaches the next power of two, and
        # makes a number of NaN: so all are rounded towards zero.
        key, value = (
            1.01 * to_float8(new).float() * scale.cpu()
            for new, scale in zip((key, value), scales[:2], strict=True)
        )
        largest.pop()
    key[0, 0, : len(largest)] = torch.tensor(largest)
    stored = torch.cat(
        (to_float8(key, float(scales[0])), to_float8(value, float(scales[1]))), -1
    ).float()
    shape = (decodes * HEADS + PAGES, HEADS, PAGE_SIZE, 2 * d)
    expected, expected_mirror = torch.zeros(shape), torch.zeros(PAGES, *shape[1:])
    for token, slot in enumerate(slots.tolist()):
        if slot < 0:
            continue
        page, offset = divmod(slot, PAGE_SIZE)
        expected_mirror[page, :, offset] = stored[token]
        if token >= decodes:
            expected[frames[page], :, offset] = stored[token]
            continue
        for head in range(HEADS):
            at = int(table.pages[token * HEADS + head, 1])
            expected[at // HEADS, at % HEADS, 0] = stored[token, head]
    for function, where in ((write_tiered, device), (write, torch.device("cpu"))):
        arena = torch.zeros(shape, device=where).to(FP8)
        mirror = torch.zeros(PAGES, *shape[1:], device=where).to(FP8)
        memory = LayerMemory(
            layer=0,
            table=PageTable(table.pages.to(where), table.lengths.to(where), HEADS),
            frames=frames.int().to(where),
            resident=torch.ones(1, dtype=torch.int32, device=where),
            arena=arena,
            mirror=mirror if mirrored else None,
        )
        function(
            key.to(where),
            value.to(where),
            slots.to(where),
            memory,
            decode_tokens=decodes,
            scales=KVScales(*(scale.to(where) for scale in scales)),
        )
        for found, wanted in ((arena, expected), (mirror, expected_mirror))[: 1 + mirrored]:
            torch.testing.assert_close(found.float().cpu(), wanted, rtol=0, atol=0, equal_nan=True)
