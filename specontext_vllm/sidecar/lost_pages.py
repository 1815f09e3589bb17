"""Which pages the sidecar does not know, because it was away when they were written."""

from __future__ import annotations

import numpy as np

from specontext_vllm.config import PAGE_SIZE, pages_for


class LostPages:
    """Which pages of KV have lost a part, kept up to date only while there are any.

    A page has two parts in the head's caches: the keys of its tokens, and the fused aux of its
    latest token, from which the next token's key is made. A restarted sidecar has neither for the
    pages that were written while it was away, and is not sent them again: the next token learned in
    a page replaces its fused aux, and the keys are whole once the page is reused from its first
    token on.

    Args:
        num_blocks: pages.
    """

    def __init__(self, num_blocks: int) -> None:
        self.keys = np.zeros(num_blocks, dtype=bool)
        self.fused = np.zeros(num_blocks, dtype=bool)

    @property
    def count(self) -> int:
        """Pages with a lost part."""
        return int(np.count_nonzero(self.keys | self.fused))

    def lose(self, blocks: np.ndarray) -> None:
        """Mark both parts of the pages ``blocks [n]`` as lost: they were written in a step whose
        tokens the sidecar did not learn.
        """
        self.keys[blocks] = self.fused[blocks] = True

    def note_step(self, block_table: np.ndarray, starts: np.ndarray, seq_lens: np.ndarray) -> None:
        """Update what is lost by a step that the sidecar has selected for: the pages that it writes
        get their parts back where they can. If the sidecar then fails to learn the step's tokens,
        ``lose`` marks those pages again.

        Args:
            block_table: ``[>= R, W]``, tails may be stale.
            starts: ``[R]`` positions of the rows' first tokens in this step.
            seq_lens: ``[R]`` tokens after it.
        """
        if not (self.keys.any() or self.fused.any()):
            return
        for row, start, tokens in zip(
            block_table, starts.tolist(), seq_lens.tolist(), strict=False
        ):
            first, *others = row[start // PAGE_SIZE : pages_for(tokens)]
            # Only a row's first token is paired with an aux state that an earlier step computed;
            # token 0 with none.
            unsound = start > 0 and self.fused[row[(start - 1) // PAGE_SIZE]]
            self.keys[first] = unsound or (start % PAGE_SIZE != 0 and self.keys[first])
            self.keys[others] = False
            self.fused[first] = self.fused[others] = False

    def touched_rows(self, block_table: np.ndarray, seq_lens: np.ndarray) -> list[int]:
        """Rows of ``block_table [>= R, W]`` with ``seq_lens [R]`` tokens that hold a page whose
        keys are lost.
        """
        if not self.keys.any():
            return []
        return [
            row
            for row, tokens in enumerate(seq_lens.tolist())
            if self.keys[block_table[row, : pages_for(tokens)]].any()
        ]
