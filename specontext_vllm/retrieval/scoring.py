"""Scores of KV pages under the retrieval head's attention (paper C1; design/paper.md)."""

from __future__ import annotations

import torch
from torch import Tensor

from specontext_vllm.config import PAGE_SIZE, pages_for
from specontext_vllm.step_data import PageScores

WORKSPACE_BYTES = 64 << 20
"""Bytes of a scoring workspace; a batch with more pages is scored in several parts. One row always
fits.
"""


def score_rows(
    queries: Tensor,
    keys: Tensor,
    block_table: Tensor,
    seq_lens: Tensor,
    starts: Tensor,
    scores: PageScores,
    *,
    rows: range,
    max_pages: int,
    least_pages: int,
    first_token: int = 1,
) -> None:
    """Score the pages of ``rows`` into the workspace, on the device of ``queries``.

    Args:
        queries: ``[B, NQ, D]`` rotated queries of the decode rows.
        keys: ``[num_blocks, nkv, P, D]`` the rows' newest keys included: the head's K cache, or the
            K half of a layer's KV cache.
        block_table: ``[>= B, W]`` int32; tails beyond a row's pages may be stale.
        seq_lens: ``[>= B]`` int32 tokens per row, the new one included.
        starts: ``row_starts(seq_lens, rows)``.
        max_pages: upper bound of a row's pages.
        least_pages: rows with no more pages are skipped; they are read whole.
        first_token: tokens before it take no part. In the head's cache that is token 0, which has
            no (token, aux) pair; its page is always kept.
    """
    if queries.is_cuda:
        from specontext_vllm.triton_kernels.score_pages import score_pages

        score_pages(
            queries,
            keys,
            block_table,
            seq_lens,
            starts,
            scores.page_max,
            scores.page_lse,
            first_row=rows.start,
            num_rows=len(rows),
            max_pages=max_pages,
            least_pages=least_pages,
            first_token=first_token,
        )
        return
    for row, start in zip(rows, starts[: len(rows)].tolist(), strict=True):
        tokens = int(seq_lens[row])
        pages = pages_for(tokens)
        if pages > least_pages:
            page_max, page_lse = score_row(
                queries[row], keys, block_table[row], tokens, first_token
            )
            scores.page_max[:, start : start + pages] = page_max
            scores.page_lse[:, start : start + pages] = page_lse


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
    query: Tensor, keys: Tensor, block_row: Tensor, tokens: int, first_token: int = 1
) -> tuple[Tensor, Tensor]:
    """Page maxima and log-sum-exps ``[NQ, pages]`` of one row with ``tokens`` tokens; see
    ``score_rows``.
    """
    num_queries, head_dim = query.shape
    nkv = keys.shape[1]
    pages = pages_for(tokens)
    row_keys = (
        keys[block_row[:pages].long()]
        .transpose(0, 1)
        .reshape(nkv, pages * PAGE_SIZE, head_dim)
        .float()
    )
    grouped = query.view(nkv, num_queries // nkv, head_dim).float()
    logits = (
        torch.einsum("hgd,htd->hgt", grouped, row_keys).reshape(num_queries, -1) * head_dim**-0.5
    )
    logits[:, tokens:] = float("-inf")
    logits[:, :first_token] = float("-inf")
    logits = logits.view(num_queries, pages, PAGE_SIZE)
    return logits.amax(-1), logits.logsumexp(-1)


def fill_baseline(retriever: str, scores: PageScores, generator: torch.Generator) -> None:
    """Scores of a retriever that looks at no keys: ``random``, or ``recent`` (the newest pages
    win).
    """
    if retriever == "random":
        scores.page_max.uniform_(-1.0, 0.0, generator=generator)
    else:
        # The workspace is ragged, but within a row its index grows with the position, which is all
        # that the order needs.
        scores.page_max.copy_(
            torch.arange(scores.capacity, dtype=torch.float32, device=scores.page_max.device)
        )
    scores.page_lse.zero_()
