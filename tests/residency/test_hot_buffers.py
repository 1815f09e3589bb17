"""Hot buffers: what they list, forget and trim."""

import torch

from specontext_vllm.tier_data import DecodeRows
from tests.selections import (
    HEADS,
    LANES,
    MAX_PAGES,
    listed,
    make_hot_buffers,
    random_selection,
)


def test_the_contents_are_the_misses_of_the_first_step_until_they_are_forgotten():
    hot = make_hot_buffers(torch.device("cpu"))
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
    hot = make_hot_buffers(torch.device("cpu"))
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
