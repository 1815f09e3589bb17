"""``quest``: each layer scores a page by the largest logit that its keys' element-wise minimum and
maximum allow (Quest, arXiv 2406.10774).
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from specontext_vllm.retrieval.rules import Rule

if TYPE_CHECKING:
    from torch import Tensor

    from specontext_vllm.retrieval.scoring import ScoreInputs
    from specontext_vllm.step_data import PageScores


class Quest(Rule):
    """What the minima and maxima of the page's keys allow its heaviest token to be, in each layer;
    needs no head and no training. Works without a host pool only.
    """

    per_layer = True
    page_vectors = 2

    def score(self, inputs: ScoreInputs, scores: PageScores) -> PageScores:
        queries, bounds, page_size = inputs.queries, inputs.page_vectors, inputs.page_size
        assert queries is not None and bounds is not None
        if queries.is_cuda:
            from specontext_vllm.triton_kernels.page_bounds import score_bounds

            score_bounds(
                queries,
                bounds,
                inputs.block_table,
                inputs.seq_lens,
                inputs.starts,
                scores.page_max,
                page_size=page_size,
                first_row=inputs.rows.start,
                num_rows=len(inputs.rows),
                max_pages=inputs.max_pages,
                min_pages=inputs.min_pages,
            )
        else:
            for row, span in inputs.scored_rows():
                blocks = inputs.block_table[row, : span.stop - span.start].long()
                scores.page_max[:, span] = score_bounds_row(queries[row], bounds[blocks])
        # A bound is all that is known of a page: it stands for the page's maximum and for its sum.
        return replace(scores, page_lse=scores.page_max)

    @classmethod
    def learn(cls, kv_cache: Tensor, slots: Tensor, vectors: Tensor) -> None:
        if kv_cache.is_cuda:
            from specontext_vllm.triton_kernels.page_bounds import update_bounds

            update_bounds(kv_cache, slots, vectors)
        else:
            update_bounds_reference(kv_cache, slots, vectors)


def update_bounds_reference(kv_cache: Tensor, slots: Tensor, bounds: Tensor) -> None:
    """``triton_kernels.page_bounds.update_bounds`` in torch; synchronises with the device."""
    import torch

    from specontext_vllm.float8 import as_bytes

    page_size = kv_cache.shape[2]
    block = slots // page_size
    last = torch.ones_like(slots, dtype=torch.bool)
    last[:-1] = block[1:] != block[:-1]
    written = slots[last & (slots >= 0)]
    keys = as_bytes(kv_cache)[written // page_size].view(kv_cache.dtype)
    keys = keys[..., : bounds.shape[-1]].float()
    unwritten = (torch.arange(page_size, device=slots.device) > (written % page_size)[:, None])[
        :, None, :, None
    ]
    low = keys.masked_fill(unwritten, float("inf")).amin(2)
    high = keys.masked_fill(unwritten, float("-inf")).amax(2)
    bounds[written // page_size] = torch.stack([low, high], 2).to(bounds.dtype)


def score_bounds_row(query: Tensor, bounds: Tensor) -> Tensor:
    """Upper bounds ``[NQ, pages]`` of ``q . k / sqrt(D)`` of one row: ``query [NQ, D]``,
    ``bounds [pages, H, 2, D]``.
    """
    heads, d = bounds.shape[1], bounds.shape[3]
    grouped = query.view(heads, -1, d).float()
    low, high = bounds.float().permute(2, 1, 3, 0)
    # max(q * low, q * high) is q * high where q is positive, else q * low.
    reach = grouped.clamp(min=0) @ high + grouped.clamp(max=0) @ low
    return reach.flatten(0, 1) * d**-0.5
