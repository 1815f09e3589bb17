"""Where the pages of a step lie in the scoring workspace, and the scores that attention gives them,
on a GPU, on a CPU and in plain torch.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

import specontext_vllm.cpu_kernels as cpu_kernels
from specontext_vllm.config import PAGE_SIZE, pages_for
from specontext_vllm.retrieval.reference import grouped_logits, reduce_to_pages
from specontext_vllm.step_data import PageScores

WORKSPACE_BYTES = 64 << 20
"""Bytes of a scoring workspace; a batch with more pages is scored in several parts. One row always
fits.
"""


@dataclass(frozen=True)
class ScoreInputs:
    """What a rule scores the pages of some rows from.

    Attributes:
        block_table: ``[>= B, W]`` int32; tails beyond a row's pages may be stale.
        seq_lens: ``[>= B]`` int32 tokens per row, the new one included; 0 for padding rows.
        starts: ``[>= len(rows)]`` int32, where each row's pages start in the workspace.
        rows: the rows to score.
        max_pages: upper bound of a row's pages.
        min_pages: ``[>= B]`` int32: rows with no more pages are read whole, and need no scores.
        queries: ``[B, NQ, D]`` rotated queries of the decode rows; None for a rule that needs none.
        keys: ``[num_blocks, NKV, P, D]``: the head's K cache, or the K half of a layer's KV cache.
        first_token: tokens before it take no part. In the head's cache that is token 0, which has
            no (token, aux) pair; its page is always kept.
        keyless: newest tokens of each row that have no key yet, because it is made from what the
            forward pass has still to compute; they take no part, and may have anything in their
            place. Their pages are among the recents.
        page_vectors: ``[num_blocks, H, Rule.page_vectors, D]`` of the layer, for a rule that keeps
            some.
        page_size: tokens of a page.
    """

    block_table: Tensor
    seq_lens: Tensor
    starts: Tensor
    rows: range
    max_pages: int
    min_pages: Tensor
    queries: Tensor | None = None
    keys: Tensor | None = None
    first_token: int = 1
    keyless: int = 0
    page_vectors: Tensor | None = None
    page_size: int = PAGE_SIZE

    def workspace_used(self, scores: PageScores) -> int:
        """Leading pages of the workspace in which all of these rows' pages lie, as far as the host
        knows.
        """
        return min(scores.capacity, len(self.rows) * self.max_pages)

    def score_keys(self, scores: PageScores) -> None:
        """Write each page's largest logit and log-sum-exp under the attention of the queries into
        the workspace, on its device.
        """
        queries, keys = self.queries, self.keys
        assert queries is not None and keys is not None
        if queries.is_cuda:
            from specontext_vllm.triton_kernels.score_pages import score_pages

            score_pages(
                queries,
                keys,
                self.block_table,
                self.seq_lens,
                self.starts,
                scores.page_max,
                scores.page_lse,
                first_row=self.rows.start,
                num_rows=len(self.rows),
                max_pages=self.max_pages,
                min_pages=self.min_pages,
                first_token=self.first_token,
                keyless=self.keyless,
            )
            return
        if cpu_kernels.available():
            torch.ops.specontext_cpu.score_pages(
                queries,
                keys,
                self.block_table,
                self.seq_lens,
                self.starts,
                scores.page_max,
                scores.page_lse,
                self.rows.start,
                len(self.rows),
                self.min_pages,
                self.first_token,
                self.keyless,
            )
            return
        for row, span in self.scored_rows():
            scores.page_max[:, span], scores.page_lse[:, span] = score_row(
                queries[row],
                keys,
                self.block_table[row],
                int(self.seq_lens[row]),
                self.first_token,
                self.keyless,
            )

    def token_logits(self, row: int) -> Tensor:
        """Logits of a row's tokens under the attention of its queries, in torch:
        ``[NQ, pages, P]`` float32, -inf for tokens that take no part. Waits for the device.
        """
        queries, keys = self.queries, self.keys
        assert queries is not None and keys is not None
        tokens = int(self.seq_lens[row])
        logits = row_logits(
            queries[row], keys, self.block_table[row], tokens, self.first_token, self.keyless
        )
        return logits.unflatten(1, (-1, self.page_size))

    def scored_rows(self) -> Iterator[tuple[int, slice]]:
        """Of each row that needs scores, its number and its place in the workspace. Waits for the
        device.
        """
        for row, start in zip(self.rows, self.starts[: len(self.rows)].tolist(), strict=True):
            pages = -(-int(self.seq_lens[row]) // self.page_size)
            if pages > int(self.min_pages[row]):
                yield row, slice(start, start + pages)


def row_starts(seq_lens: Tensor, rows: range) -> Tensor:
    """Where the pages of each of ``rows`` start in the workspace: ``[len(rows)]`` int32, on the
    device.
    """
    if seq_lens.is_cuda:
        from specontext_vllm.triton_kernels import row_starts as kernel

        return kernel.row_starts(seq_lens, rows.start, len(rows), PAGE_SIZE)
    pages = (seq_lens[rows.start : rows.stop] + PAGE_SIZE - 1) // PAGE_SIZE
    return (pages.cumsum(0) - pages).int()


def score_row(
    query: Tensor,
    keys: Tensor,
    block_row: Tensor,
    tokens: int,
    first_token: int = 1,
    keyless: int = 0,
) -> tuple[Tensor, Tensor]:
    """Page maxima and log-sum-exps ``[NQ, pages]`` of one row with ``tokens`` tokens; see
    ``ScoreInputs``.

    Args:
        query: ``[NQ, D]``. block_row: ``[W]`` int32.
    """
    logits = row_logits(query, keys, block_row, tokens, first_token, keyless)
    page_max, page_lse = reduce_to_pages(logits, PAGE_SIZE)
    return page_max, page_lse


def row_logits(
    query: Tensor,
    keys: Tensor,
    block_row: Tensor,
    tokens: int,
    first_token: int,
    keyless: int,
) -> Tensor:
    """Logits ``[NQ, pages * P]`` float32 of one row's tokens, -inf for those that take no part;
    arguments as for ``score_row``.
    """
    # [pages, NKV, P, D] -> [NKV, pages * P, D]
    row_keys = keys[block_row[: pages_for(tokens)].long()].transpose(0, 1).flatten(1, 2)
    logits = grouped_logits(query[None, :, None], row_keys[None])[0, :, 0].flatten(0, 1)
    logits[:, tokens - keyless :] = float("-inf")
    logits[:, :first_token] = float("-inf")
    return logits
