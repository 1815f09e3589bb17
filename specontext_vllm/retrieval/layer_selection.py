"""Retrievers that select anew in each layer, with the layer's own queries: baselines that the
retrieval head is compared with.
"""

from __future__ import annotations

import torch
from torch import Tensor

from specontext_vllm.config import PAGE_SIZE, PER_LAYER, SpeContextConfig, pages_for
from specontext_vllm.retrieval.scoring import WORKSPACE_BYTES, score_rows
from specontext_vllm.retrieval.selection import Budget, select_rows
from specontext_vllm.step_data import PageScores


class LayerSelector:
    """Rewrites the page table in each layer's attention call. Nothing waits for the GPU, so
    captured graphs may hold every method.

    ``quest`` (Quest, arXiv 2406.10774) scores a page by the largest logit that its keys'
    element-wise minimum and maximum allow; ``oracle`` by the layer's attention itself, reading all
    keys. As with the retrieval head, a KV head's pages are those that one of its group's query
    heads gives the largest share of its softmax.

    Args:
        config: validated settings; others may take their place between steps, where no graph holds
            them.
        num_heads, num_kv_heads, head_dim: of the target on this worker.
        max_pages: pages of the longest context.
        max_rows: most decode rows of a step, padding included.
        device: where everything lives.
    """

    def __init__(
        self,
        config: SpeContextConfig,
        *,
        num_heads: int,
        num_kv_heads: int,
        head_dim: int,
        max_pages: int,
        max_rows: int,
        device: torch.device,
    ) -> None:
        self.config, self.num_kv_heads, self.head_dim, self.max_pages, self.device = (
            config,
            num_kv_heads,
            head_dim,
            max_pages,
            device,
        )
        # A fixed place for each row, since how many pages it has is not known when a graph is
        # captured.
        self.rows_at_once = max(1, WORKSPACE_BYTES // (8 * num_heads * max_pages))
        self.scores = PageScores.allocate(
            num_heads, num_kv_heads, self.rows_at_once * max_pages, device
        )
        self.starts = torch.arange(self.rows_at_once, dtype=torch.int32, device=device) * max_pages
        self.bounds: list[Tensor] | None = None
        self._kept_mass = torch.ones(max_rows, num_kv_heads, dtype=torch.float32, device=device)

    @staticmethod
    def bytes_per_block(
        config: SpeContextConfig,
        num_layers: int,
        num_kv_heads: int,
        head_dim: int,
        dtype: torch.dtype,
    ) -> int:
        """Bytes that one page of all layers adds to what the retriever keeps."""
        return (
            num_layers * num_kv_heads * 2 * head_dim * dtype.itemsize
            if config.retriever == "quest"
            else 0
        )

    def allocate(self, num_layers: int, num_blocks: int, dtype: torch.dtype) -> None:
        """Make room for what the retriever keeps of ``num_blocks`` pages in each layer."""
        if self.config.retriever == "quest":
            # Zeros, since captures read block 0, which vLLM never hands out.
            self.bounds = [
                torch.zeros(
                    num_blocks, self.num_kv_heads, 2, self.head_dim, dtype=dtype, device=self.device
                )
                for _ in range(num_layers)
            ]

    @property
    def active(self) -> bool:
        """Whether the settings ask for a selection in each layer."""
        return self.config.retriever in PER_LAYER

    def learn(self, layer: int, kv_cache: Tensor, slots: Tensor) -> None:
        """Follow a layer's write of the step's keys.

        Args:
            kv_cache: ``[num_blocks, H, P, 2 * D]`` contiguous, keys then values in the last axis.
            slots: ``[N]`` int64, negative for padding; a request's tokens side by side, in
                ascending order of position.
        """
        if self.bounds is None:
            return
        if kv_cache.is_cuda:
            from specontext_vllm.triton_kernels.page_bounds import update_bounds

            update_bounds(kv_cache, slots, self.bounds[layer])
        else:
            update_bounds_reference(kv_cache, slots, self.bounds[layer])

    def select(
        self,
        layer: int,
        query: Tensor,
        kv_cache: Tensor,
        block_table: Tensor,
        seq_lens: Tensor,
        pages: Tensor,
        lengths: Tensor,
    ) -> None:
        """Fill the page table for a layer's decode rows.

        Args:
            query: ``[B, NQ, D]`` the decode rows' rotated queries.
            kv_cache: ``[num_blocks, H, P, 2 * D]``, the step's tokens included.
            block_table, seq_lens: ``[>= B, W]`` int32, ``[>= B]`` int32, 0 for padding rows.
            pages, lengths: ``[>= B * H, K]`` int32, ``[>= B * H]`` int32, written; see
                ``select_rows``.
        """
        config, count = self.config, query.shape[0]
        budget = Budget(config.budget_pages, config.sink_pages, config.recent_pages)
        for first in range(0, count, self.rows_at_once):
            rows = range(first, min(first + self.rows_at_once, count))
            starts = self.starts[: len(rows)]
            limits = {"rows": rows, "max_pages": self.max_pages, "least_pages": budget.total}
            if config.retriever == "oracle":
                score_rows(
                    query,
                    kv_cache[..., : self.head_dim],
                    block_table,
                    seq_lens,
                    starts,
                    self.scores,
                    first_token=0,
                    **limits,
                )
                scores = self.scores
            else:
                self._score_bounds(
                    query, self.bounds[layer], block_table, seq_lens, starts, **limits
                )
                # A bound is all that is known of a page: it stands for the page's maximum and for
                # its sum.
                scores = PageScores(self.scores.page_max, self.scores.page_max, self.scores.order)
            select_rows(
                scores,
                seq_lens,
                starts,
                block_table,
                pages,
                lengths,
                self._kept_mass,
                budget,
                rows=rows,
            )

    def _score_bounds(
        self,
        query: Tensor,
        bounds: Tensor,
        block_table: Tensor,
        seq_lens: Tensor,
        starts: Tensor,
        *,
        rows: range,
        max_pages: int,
        least_pages: int,
    ) -> None:
        if query.is_cuda:
            from specontext_vllm.triton_kernels.page_bounds import score_bounds

            score_bounds(
                query,
                bounds,
                block_table,
                seq_lens,
                starts,
                self.scores.page_max,
                page_size=PAGE_SIZE,
                first_row=rows.start,
                num_rows=len(rows),
                max_pages=max_pages,
                least_pages=least_pages,
            )
            return
        for row, start in zip(rows, starts.tolist(), strict=True):
            count = pages_for(int(seq_lens[row]))
            if count > least_pages:
                self.scores.page_max[:, start : start + count] = score_bounds_row(
                    query[row], bounds[block_table[row, :count].long()]
                )


def update_bounds_reference(kv_cache: Tensor, slots: Tensor, bounds: Tensor) -> None:
    """``triton_kernels.page_bounds.update_bounds`` in torch; synchronises with the device."""
    block = slots // PAGE_SIZE
    last = torch.ones_like(slots, dtype=torch.bool)
    last[:-1] = block[1:] != block[:-1]
    written = slots[last & (slots >= 0)]
    keys = kv_cache[written // PAGE_SIZE, :, :, : bounds.shape[-1]]
    unwritten = (torch.arange(PAGE_SIZE, device=slots.device) > (written % PAGE_SIZE)[:, None])[
        :, None, :, None
    ]
    low = keys.masked_fill(unwritten, float("inf")).amin(2)
    high = keys.masked_fill(unwritten, float("-inf")).amax(2)
    bounds[written // PAGE_SIZE] = torch.stack([low, high], 2)


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
