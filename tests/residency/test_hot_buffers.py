"""Hot buffers: the Triton kernels against the torch path over many steps, and both against what
they promise.
"""

import pytest
import torch

from specontext_vllm.config import PAGE_SIZE, pages_for
from specontext_vllm.residency.hot_buffers import HotBuffers
from specontext_vllm.residency.transfer import write
from specontext_vllm.step_data import PageTable, Selection
from specontext_vllm.tier_data import DecodeRows, LayerMemory, TierTables
from specontext_vllm.triton_kernels import counters
from specontext_vllm.triton_kernels.layer_tables import layer_tables
from specontext_vllm.triton_kernels.resolve_pages import resolve_pages
from specontext_vllm.triton_kernels.write_tiered import write_tiered

HEADS, SLOTS, LANES, MAX_PAGES, TABLE = 2, 6, 3, 30, 5
LAYERS, RESIDENT = 7, 3


def make(device):
    resident = torch.tensor([RESIDENT], dtype=torch.int32, device=device)
    counts = torch.zeros(counters.COUNTERS, dtype=torch.int64, device=device)
    return HotBuffers(
        LANES,
        HEADS,
        SLOTS,
        MAX_PAGES,
        max_rows=LANES,
        table_pages=TABLE,
        num_layers=LAYERS,
        resident=resident,
        counts=counts,
        device=device,
    )


def random_selection(generator, lanes, seq_lens):
    """A selection of sinks, the newest page and random ones; ids are page * H + head."""
    selection = torch.full((LANES * HEADS, TABLE), -7, dtype=torch.int32)
    lengths = torch.zeros(LANES * HEADS, dtype=torch.int32)
    for row, tokens in enumerate(seq_lens):
        count = pages_for(tokens)
        for head in range(HEADS if lanes[row] >= 0 else 0):
            kept = min(count, TABLE)
            middle = torch.randperm(max(count - 2, 0), generator=generator)[: kept - 2] + 1
            pages = (
                torch.cat([torch.tensor([0]), middle, torch.tensor([count - 1])])[-kept:]
                .unique()
                .sort()
                .values
            )
            kept = len(pages)
            selection[row * HEADS + head, :kept] = pages.int() * HEADS + head
            lengths[row * HEADS + head] = tokens - (count - kept) * PAGE_SIZE
    return Selection(selection, lengths, torch.ones(LANES, HEADS))


def to_device(data, device):
    """A dataclass of tensors, on a device."""
    return type(data)(*(tensor.to(device) for tensor in vars(data).values()))


def run_kernel(hot, selection, rows, step):
    device = hot.state.step.device
    hot.state.step.fill_(step)
    hot.misses.count.zero_()
    resolve_pages(
        to_device(selection, device),
        to_device(rows, device),
        hot.state,
        hot.misses,
        resident=hot.resident,
        counts=hot.counts,
        num_layers=LAYERS,
        num_rows=LANES,
        page_size=PAGE_SIZE,
    )


def listed(misses):
    count = int(misses.count)
    return sorted(zip(misses.sources[:count].tolist(), misses.targets[:count].tolist()))


@pytest.mark.parametrize("capacity", [5, 6], ids=["tight", "spare"])
def test_resolve_keeps_hits_evicts_the_oldest_and_matches_the_kernel(capacity, device):
    generator = torch.Generator().manual_seed(capacity)
    reference, kernel = make(torch.device("cpu")), make(device)
    table = torch.stack(
        [torch.randperm(MAX_PAGES, generator=generator) for _ in range(LANES)]
    ).int()
    for hot in (reference, kernel):
        hot.state.capacity.fill_(capacity)
    held = [[{} for _ in range(HEADS)] for _ in range(LANES)]
    returned = selected = missed = 0
    for step in range(1, 25):
        lanes = torch.tensor([2, 0, -1] if step % 3 else [1, 2, 0], dtype=torch.int32)
        seq_lens = torch.tensor(
            [16 * 9 + step, 70 + 16 * step, 0 if lanes[2] < 0 else 33], dtype=torch.int32
        )
        selection = random_selection(generator, lanes, seq_lens.tolist())
        rows = DecodeRows(lanes, seq_lens, table)
        reference.resolve(selection, rows, LANES)
        run_kernel(kernel, selection, rows, step)
        for name in ("slot_of", "page_of", "source_of", "stamp"):
            expected, found = (getattr(hot.state, name).cpu() for hot in (reference, kernel))
            assert torch.equal(expected, found), name
        assert listed(reference.misses) == listed(kernel.misses)
        new_misses = dict((target, source) for source, target in listed(reference.misses))
        missed += len(new_misses)
        for row, lane in enumerate(lanes.tolist()):
            for head in range(HEADS if lane >= 0 else 0):
                sequence = row * HEADS + head
                count = pages_for(int(selection.lengths[sequence]))
                pages = (selection.pages[sequence, :count] // HEADS).tolist()
                slots = reference.state.slots[sequence, :count].tolist()
                assert slots == kernel.state.slots[sequence, :count].tolist()
                assert len(set(slots)) == count and max(slots) < capacity
                mine = held[lane][head]
                selected += count
                returned += sum(page in mine and mine[page][1] < step - 1 for page in pages)
                for page, slot in zip(pages, slots):
                    source = int(table[row, page]) * HEADS + head
                    target = (lane * SLOTS + slot) * HEADS + head
                    if page in mine:
                        assert mine[page][0] == slot and target not in new_misses
                    elif (
                        page == (int(seq_lens[row]) - 1) // PAGE_SIZE
                        and int(seq_lens[row]) % PAGE_SIZE == 1
                    ):
                        assert target not in new_misses
                    else:
                        assert new_misses[target] == source
                evicted = [p for p, (slot, _) in mine.items() if p not in pages and slot in slots]
                kept = [p for p in mine if p not in pages and p not in evicted]
                if evicted and kept:
                    assert max(mine[p][1] for p in evicted) <= min(mine[p][1] for p in kept), (
                        "not the least recently used"
                    )
                for page in evicted:
                    del mine[page]
                mine.update({page: (slot, step) for page, slot in zip(pages, slots)})
    assert (
        reference.counts.tolist()
        == kernel.counts.tolist()
        == [selected, missed, returned, missed * (LAYERS - RESIDENT), 0, 0, 0, 0]
    )
    assert returned > 0


def test_reset_and_contents():
    hot = make(torch.device("cpu"))
    hot.state.capacity.fill_(6)
    selection = random_selection(torch.Generator().manual_seed(1), [0, 1, 2], [90, 40, 16])
    seq_lens, lanes = torch.tensor([90, 40, 16]).int(), torch.arange(3).int()
    table = torch.arange(LANES * MAX_PAGES).view(LANES, MAX_PAGES).int()
    hot.resolve(selection, DecodeRows(lanes, seq_lens, table), 3)
    contents = hot.contents()
    assert int(contents.count) == int((selection.pages >= 0).sum())
    assert len(contents.sources) == len(contents.targets) == hot.state.page_of.numel()
    assert listed(contents) == listed(hot.misses)
    hot.reset(torch.tensor([0, 2]))
    hot.state.capacity[1] = 0
    assert int(hot.contents().count) == 0


def test_trim_forgets_what_lies_beyond_the_capacity():
    hot = make(torch.device("cpu"))
    state = hot.state
    state.capacity.fill_(6)
    table = torch.arange(LANES * MAX_PAGES).view(LANES, MAX_PAGES).int()
    lanes, generator = torch.arange(3).int(), torch.Generator().manual_seed(2)
    for tokens in (200, 201):
        seq_lens = torch.full((3,), tokens, dtype=torch.int32)
        selection = random_selection(generator, [0, 1, 2], [tokens] * 3)
        hot.resolve(selection, DecodeRows(lanes, seq_lens, table), 3)
    assert (state.page_of[1, 0] >= 0).all()
    state.capacity[1] = 5
    hot.trim()
    assert (
        (state.page_of[1, :, 5] < 0).all()
        and (state.page_of[1, :, :5] >= 0).all()
        and (state.page_of[0] >= 0).all()
    )
    for lane in range(LANES):
        for head in range(HEADS):
            held = {
                int(page): slot for slot, page in enumerate(state.page_of[lane, head]) if page >= 0
            }
            assert held == {
                page: int(slot) for page, slot in enumerate(state.slot_of[lane, head]) if slot >= 0
            }


def test_layer_tables_point_at_frames_or_hot_slots(device):
    layers, rows, resident = 3, 2, 1
    generator = torch.Generator().manual_seed(4)
    table = torch.stack([torch.randperm(MAX_PAGES, generator=generator) for _ in range(rows)]).int()
    lanes = torch.tensor([2, 0], dtype=torch.int32)
    selection = random_selection(generator, [2, 0], [90, 40])
    slots = torch.randint(0, SLOTS, (LANES * HEADS, TABLE), generator=generator).int()
    frames = torch.randperm(layers * MAX_PAGES, generator=generator).view(layers, MAX_PAGES).int()
    hot = (
        torch.randperm(layers * LANES * SLOTS, generator=generator).view(layers, LANES, SLOTS).int()
        + 1000
    )
    out = torch.full((layers, LANES * HEADS, TABLE), -7, dtype=torch.int32, device=device)
    number = torch.tensor([resident], dtype=torch.int32)
    layer_tables(
        to_device(selection, device),
        slots.to(device),
        to_device(DecodeRows(lanes, torch.tensor([90, 40]).int(), table), device),
        to_device(TierTables(number, frames, hot, out), device),
        num_rows=rows,
        num_kv_heads=HEADS,
        page_size=PAGE_SIZE,
    )
    for layer in range(layers):
        for row in range(rows):
            for head in range(HEADS):
                sequence = row * HEADS + head
                for k in range(TABLE):
                    found = int(out[layer, sequence, k])
                    if k >= pages_for(int(selection.lengths[sequence])):
                        assert found == -7
                    elif layer < resident:
                        assert (
                            found
                            == frames[layer, table[row, selection.pages[sequence, k] // HEADS]]
                            * HEADS
                            + head
                        )
                    else:
                        assert found == hot[layer, lanes[row], slots[sequence, k]] * HEADS + head


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
