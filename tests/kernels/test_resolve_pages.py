"""Resolving a selection: the kernel against the torch path over many steps, and both against a
model of what each hot buffer holds.
"""

import pytest
import torch

from specontext_vllm.config import PAGE_SIZE, pages_for
from specontext_vllm.tier_data import DecodeRows
from specontext_vllm.triton_kernels.resolve_pages import resolve_pages
from tests.selections import (
    HEADS,
    LANES,
    LAYERS,
    MAX_PAGES,
    RESIDENT,
    SLOTS,
    listed,
    make_hot_buffers,
    random_selection,
    to_device,
)


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


@pytest.mark.parametrize("capacity", [5, 6], ids=["tight", "spare"])
@pytest.mark.parametrize(
    "before", [0, 2**31 - 12, 2**32 - 12], ids=["at-first", "after-months", "after-more"]
)
def test_resolve_keeps_hits_evicts_the_oldest_and_matches_the_kernel(capacity, before, device):
    generator = torch.Generator().manual_seed(capacity)
    reference, kernel = make_hot_buffers(torch.device("cpu")), make_hot_buffers(device)
    table = torch.stack(
        [torch.randperm(MAX_PAGES, generator=generator) for _ in range(LANES)]
    ).int()
    for hot in (reference, kernel):
        hot.state.capacity.fill_(capacity)
    reference.state.step.fill_(before)
    held = [[{} for _ in range(HEADS)] for _ in range(LANES)]
    returned = selected = missed = 0
    for number in range(1, 25):
        step = before + number
        lanes = torch.tensor([2, 0, -1] if number % 3 else [1, 2, 0], dtype=torch.int32)
        seq_lens = torch.tensor(
            [16 * 9 + number, 70 + 16 * number, 0 if lanes[2] < 0 else 33], dtype=torch.int32
        )
        selection = random_selection(generator, lanes, seq_lens.tolist())
        # The newest tokens may be drafts; their pages were begun in this step.
        first = seq_lens - torch.tensor([number % 4, 0, 0], dtype=torch.int32)
        rows = DecodeRows(lanes, first, table)
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
                    elif page * PAGE_SIZE >= int(first[row]) - 1:
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
