"""The retrieval head with its caches: what a step's tokens leave in them, and the queries it asks
them with.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from specontext_vllm.config import PAGE_SIZE, HeadKeyDtype
from specontext_vllm.retrieval.cache import HeadCache, head_key_dtype
from specontext_vllm.retrieval.head import RetrievalHead
from specontext_vllm.step_data import StepBatch

PREFILL_CHUNK = 2048
"""Prompt tokens whose keys are made at a time, which bounds the head's activations."""


class CachedHead:
    """A retrieval head and the caches that it fills page by page.

    Args:
        head: the retrieval head.
        embed: token ids ``[N]`` -> the target's embeddings ``[N, E]``, for a head that brings none.
        key_dtype: the setting head_key_dtype.
        device: where everything lives.

    Attributes:
        key_dtype: what the keys are kept in.
    """

    def __init__(
        self,
        head: RetrievalHead,
        embed: Callable[[Tensor], Tensor],
        key_dtype: HeadKeyDtype,
        device: torch.device,
    ) -> None:
        self.head, self.device = head, device
        self.embed = embed if head.embed_tokens is None else head.embed
        self.key_dtype = head_key_dtype(key_dtype, head.dtype, device)
        self._cache: HeadCache | None = None

    @property
    def cache(self) -> HeadCache:
        """The caches, once ``allocate`` has made them."""
        assert self._cache is not None
        return self._cache

    def allocate(self, num_blocks: int) -> None:
        """Allocate the caches of ``num_blocks`` pages of KV."""
        spec = self.head.spec
        self._cache = HeadCache.allocate(
            num_blocks,
            spec.num_kv_heads,
            spec.head_dim,
            spec.hidden_size,
            self.head.dtype,
            self.key_dtype,
            self.device,
        )

    @property
    def bytes_per_block(self) -> int:
        """Bytes that the caches take for one page."""
        spec = self.head.spec
        return HeadCache.bytes_per_block(
            spec.num_kv_heads,
            spec.head_dim,
            spec.hidden_size,
            self.head.dtype,
            self.key_dtype,
        )

    # -- before the forward pass

    def project(
        self, batch: StepBatch, rows: int, embeds: Tensor, *, with_queries: bool
    ) -> Tensor | None:
        """Write the keys of the first ``rows`` rows, of tokens with ``embeds [rows, E]``; return
        their queries ``[rows, NQ, D]`` if asked for.
        """
        head = self.head
        positions, slots = batch.positions[:rows], batch.slots[:rows]
        embeds = embeds.to(head.dtype)
        if self.device.type == "cpu":
            fused = self.cache.previous(batch.block_table[:rows], positions)
            if not with_queries:
                self.cache.write_keys(head.keys(embeds, fused, positions), slots)
                return None
            queries, keys = head.project(embeds, fused, positions)
            self.cache.write_keys(keys, slots)
            return queries
        from specontext_vllm.triton_kernels.head_input import head_input
        from specontext_vllm.triton_kernels.head_rope import rope_and_cache

        inputs = head_input(
            embeds,
            self.cache.fused,
            batch.block_table,
            positions,
            head.embed_norm,
            head.feature_norm,
            head.spec.rms_norm_eps,
            PAGE_SIZE,
        )
        projection = head.queries_and_keys if with_queries else head.keys_alone
        assert projection is not None
        queries = rope_and_cache(
            projection(inputs),
            head.cos_sin,
            positions,
            slots,
            self.cache.keys,
            head.spec.num_heads if with_queries else 0,
            projection.norm,
            head.spec.rms_norm_eps,
        )
        return queries if with_queries else None

    # -- after the forward pass

    def learn_decodes(self, batch: StepBatch, rows: int, aux: Sequence[Tensor]) -> None:
        """Remember the fused aux of the first ``rows`` rows, one token each: the newest of its
        page, whether or not the page is full.
        """
        # The slot -1 of a padding row means the row of the cache that nobody reads.
        self.cache.fused[batch.slots[:rows] // PAGE_SIZE] = self.head.fuse(
            [state[:rows] for state in aux]
        )

    def learn_prompts(self, batch: StepBatch, aux: Sequence[Tensor]) -> None:
        """Write the keys of the prompt rows' tokens and remember the fused aux of their pages.

        Their keys are made after the forward pass, since the pair of token p+1 needs the aux of
        token p from this very pass.
        """
        decodes = batch.num_decodes
        rows = slice(decodes, batch.num_rows)
        starts = batch.query_starts[rows].long()
        last = batch.query_starts[decodes + 1 : batch.num_rows + 1].long() - 1
        before_first = self.cache.previous(batch.block_table[rows], batch.positions[starts])
        newest = None
        for begin in range(decodes, batch.num_tokens, PREFILL_CHUNK):
            end = min(begin + PREFILL_CHUNK, batch.num_tokens)
            fused = self.head.fuse([state[begin:end] for state in aux])
            previous = torch.cat([fused[:1] if newest is None else newest, fused[:-1]])
            previous = _scatter_inside(previous, starts - begin, before_first)
            span = slice(begin, end)
            embeds = self.embed(batch.token_ids[span]).to(fused.dtype)
            keys = self.head.keys(embeds, previous, batch.positions[span])
            self.cache.write_keys(keys, batch.slots[span])
            is_last = (
                _scatter_inside(
                    torch.zeros_like(batch.slots[span]), last - begin, torch.ones_like(last)
                )
                > 0
            )
            page_end = (batch.positions[span] + 1) % PAGE_SIZE == 0
            self.cache.remember(fused, batch.slots[span], page_end | is_last)
            newest = fused[-1:]

    def profile(self, num_tokens: int) -> None:
        """Run the head's largest step on made-up data, so that vLLM's memory profile sees its
        activations.
        """
        spec, dtype = self.head.spec, self.head.dtype
        count = min(num_tokens, PREFILL_CHUNK)
        aux = [
            torch.zeros(num_tokens, spec.target_hidden_size, dtype=dtype, device=self.device)
            for _ in range(spec.num_aux)
        ]
        fused = self.head.fuse([state[:count] for state in aux])
        token_ids = torch.zeros(count, dtype=torch.int64, device=self.device)
        self.head.project(self.embed(token_ids).to(dtype), fused, token_ids)


def _scatter_inside(values: Tensor, index: Tensor, source: Tensor) -> Tensor:
    """``values [N, ...]`` with ``source[i]`` at ``index[i]`` where that lies in 0..N-1; without a
    host look at ``index``.
    """
    count = values.shape[0]
    inside = torch.where((index >= 0) & (index < count), index, count)
    return torch.cat([values, values[:1]]).index_copy(0, inside, source.to(values.dtype))[:count]
