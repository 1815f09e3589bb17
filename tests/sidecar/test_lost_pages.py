"""Lost pages agree with a count of every single token, whatever the requests do."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from specontext_vllm.config import PAGE_SIZE, pages_for
from specontext_vllm.sidecar.lost_pages import LostPages

BLOCKS, ROWS, WIDTH = 12, 3, 3


class Oracle:
    """What an actor knows, token by token: whether a slot's key is right, and which token a page's
    fused aux is of.
    """

    def __init__(self):
        self.key = np.ones(BLOCKS * PAGE_SIZE, dtype=bool)
        self.fused = np.ones(BLOCKS, dtype=bool)

    def step(self, row, start, end, present):
        right = present and (start == 0 or self.fused[row[(start - 1) // PAGE_SIZE]])
        for position in range(start, end):
            block = row[position // PAGE_SIZE]
            self.key[block * PAGE_SIZE + position % PAGE_SIZE] = right
            # The next token of this step takes the aux of this very token.
            self.fused[block] = right = present

    def knows(self, row, tokens):
        return all(self.key[row[p // PAGE_SIZE] * PAGE_SIZE + p % PAGE_SIZE] for p in range(tokens))


@settings(max_examples=100, deadline=None)
@given(st.data())
def test_rows_with_an_unknown_key_are_found(data):
    """Requests grow, end, and begin anew in any free blocks, perhaps behind a page of another's,
    with the actor there or away.
    """
    lost, oracle = LostPages(BLOCKS), Oracle()
    table = 1 + np.arange(ROWS * WIDTH).reshape(ROWS, WIDTH)
    lengths = np.zeros(ROWS, dtype=int)
    for _ in range(data.draw(st.integers(1, 12))):
        row = data.draw(st.integers(0, ROWS - 1))
        if lengths[row] == WIDTH * PAGE_SIZE or data.draw(st.integers(0, 4)) == 0:
            other = (row + 1) % ROWS
            shared = int(lengths[other] >= PAGE_SIZE and data.draw(st.booleans()))
            free = sorted(set(range(1, BLOCKS)) - set(np.delete(table, row, axis=0).flat))
            table[row] = data.draw(st.permutations(free))[:WIDTH]
            table[row, :shared] = table[other, :shared]
            lengths[row] = shared * PAGE_SIZE
        room = WIDTH * PAGE_SIZE - lengths[row]
        start = int(lengths[row])
        end = lengths[row] = start + data.draw(st.sampled_from([1, min(room, 5), room]))
        present = data.draw(st.booleans())
        if present:
            lost.note_step(table[row : row + 1], np.array([start]), np.array([end]))
        else:
            lost.lose(table[row, start // PAGE_SIZE : pages_for(end)])
        oracle.step(table[row], start, end, present)
        assert bool(lost.touched_rows(table[row : row + 1], np.array([end]))) == (
            not oracle.knows(table[row], end)
        )


def test_a_mended_page_is_forgotten():
    lost = LostPages(4)
    lost.lose(np.array([2, 3]))
    assert lost.count == 2
    # The next token of page 3 mends its aux, not its keys; the page begun anew behind it is sound.
    table, start = np.array([[2, 3, 1]]), 2 * PAGE_SIZE - 1
    lost.note_step(table, np.array([start]), np.array([start + 1]))
    assert not lost.fused[3] and lost.keys[3]
    lost.note_step(table, np.array([start + 1]), np.array([start + 2]))
    assert not lost.keys[1] and lost.touched_rows(table, np.array([start + 2])) == [0]
    lost.note_step(np.array([[3, 2]]), np.array([0]), np.array([2 * PAGE_SIZE]))
    assert lost.count == 0
