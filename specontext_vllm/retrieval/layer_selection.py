"""Selection in each layer, with the layer's own queries, for the rules that ask for it."""

from __future__ import annotations

import torch
from torch import Tensor

from specontext_vllm.config import SpeContextConfig
from specontext_vllm.float8 import KVScales
from specontext_vllm.retrieval.rules import Rule, make_rule
from specontext_vllm.retrieval.scoring import WORKSPACE_BYTES, ScoreInputs
from specontext_vllm.retrieval.selection import select_rows
from specontext_vllm.step_data import PageScores, Selection


class LayerSelector:
    """Rewrites the page table in each layer's attention call. Nothing waits for the GPU, so that
    captured graphs may hold every method.

    Args:
        config: validated settings; see ``configure``.
        num_heads, num_kv_heads, head_dim: of the target on this worker.
        max_pages: pages of the longest context.
        totals: ``[rows]`` int32 pages that each decode row of a step reads, padding included; it
            persists.
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
        totals: Tensor,
        device: torch.device,
    ) -> None:
        self.num_kv_heads, self.head_dim, self.max_pages = num_kv_heads, head_dim, max_pages
        self.device, self.totals = device, totals
        # Each row has a fixed place, since its number of pages is not known at capture.
        self.rows_at_once = max(1, WORKSPACE_BYTES // (8 * num_heads * max_pages))
        self.scores = PageScores.allocate(
            num_heads, num_kv_heads, self.rows_at_once * max_pages, device
        )
        self.starts = torch.arange(self.rows_at_once, dtype=torch.int32, device=device) * max_pages
        self.page_vectors: list[Tensor] = []
        """Of each layer ``[num_blocks, H, Rule.page_vectors, D]``, if the rule that the engine was
        started with keeps some."""
        self._kept_mass = torch.ones(len(totals), num_kv_heads, dtype=torch.float32, device=device)
        self.configure(config)
        self._learning_rule = type(self.rule)

    def configure(self, config: SpeContextConfig) -> None:
        """Change the settings between steps, where no graph holds them."""
        self.rule = make_rule(config.retriever, config.rule_settings, self.device)
        self.config = config

    @staticmethod
    def bytes_per_block(
        config: SpeContextConfig,
        num_layers: int,
        num_kv_heads: int,
        head_dim: int,
        dtype: torch.dtype,
    ) -> int:
        """Bytes that the rule keeps of one page in all layers."""
        return num_layers * num_kv_heads * config.rule.page_vectors * head_dim * dtype.itemsize

    def allocate(self, num_layers: int, num_blocks: int, dtype: torch.dtype) -> None:
        """Make room for what the rule keeps of ``num_blocks`` pages in each layer."""
        if vectors := self.rule.page_vectors:
            shape = (num_blocks, self.num_kv_heads, vectors, self.head_dim)
            # Zeros, since captures read block 0, which vLLM never hands out.
            self.page_vectors = [
                torch.zeros(shape, dtype=dtype, device=self.device) for _ in range(num_layers)
            ]

    def clear(self) -> None:
        """What is kept is as at first: what it held is lost."""
        for vectors in self.page_vectors:
            vectors.zero_()

    def knows_pages_for(self, rule: type[Rule]) -> bool:
        """Whether the page vectors are those of ``rule``."""
        return bool(self.page_vectors) and rule is self._learning_rule

    @property
    def active(self) -> bool:
        """Whether the settings ask for a selection in each layer."""
        return self.rule.per_layer

    def learn(self, layer: int, kv_cache: Tensor, slots: Tensor) -> None:
        """Update what is kept of a layer's pages after the step's keys were written; see
        ``Rule.learn``.
        """
        if self.page_vectors:
            self._learning_rule.learn(kv_cache, slots, self.page_vectors[layer])

    def select(
        self,
        layer: int,
        query: Tensor,
        kv_cache: Tensor,
        block_table: Tensor,
        seq_lens: Tensor,
        pages: Tensor,
        lengths: Tensor,
        scales: KVScales | None = None,
    ) -> None:
        """Fill the page table for a layer's decode rows.

        Args:
            query: ``[B, NQ, D]`` the decode rows' rotated queries.
            kv_cache: ``[num_blocks, H, P, 2 * D]``, the step's tokens included.
            block_table, seq_lens: ``[>= B, W]`` int32, ``[>= B]`` int32, 0 for padding rows.
            pages, lengths: ``[>= B * H, K]`` int32, ``[>= B * H]`` int32, written; see
                ``Selection``.
            scales: of a cache in 8-bit floats.
        """
        if scales is not None:
            # Rules see keys, and what they have learned of them, as these are stored.
            query = (query * scales.key).to(query.dtype)
        selection = Selection(pages, lengths, self._kept_mass)
        count = query.shape[0]
        for first in range(0, count, self.rows_at_once):
            rows = range(first, min(first + self.rows_at_once, count))
            inputs = ScoreInputs(
                block_table,
                seq_lens,
                self.starts,
                rows,
                max_pages=self.max_pages,
                min_pages=self.totals,
                queries=query,
                keys=kv_cache[..., : self.head_dim],
                first_token=0,
                page_vectors=self.page_vectors[layer] if self.page_vectors else None,
            )
            scores = self.rule.score(inputs, self.scores)
            select_rows(
                scores,
                seq_lens,
                self.starts,
                block_table,
                selection,
                self.totals,
                sinks=self.config.sink_pages,
                recents=self.config.recent_pages,
                rows=rows,
            )
