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
from specontext_vllm.retrieval.projection import Projection
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
        max_rows: the largest number of decode rows of a step, padding included.

    Attributes:
        key_dtype: what the keys are kept in.
    """

    def __init__(
        self,
        head: RetrievalHead,
        embed: Callable[[Tensor], Tensor],
        key_dtype: HeadKeyDtype,
        device: torch.device,
        max_rows: int,
    ) -> None:
        self.head, self.device = head, device
        self.embed = embed if head.embed_tokens is None else head.embed
        self.key_dtype = head_key_dtype(key_dtype, head.dtype, device)
        self._cache: HeadCache | None = None
        # What ``project`` leaves for ``learn_decodes``: the inputs of the decode rows' keys, with
        # room for the states that are still to come. It persists, since graphs point at it.
        self._key_inputs = (
            torch.zeros(max_rows, head.spec.key_width, dtype=head.dtype, device=device)
            if self.keys_follow
            else None
        )

    @property
    def keys_follow(self) -> bool:
        """Whether a decode row's token has no key before its forward pass has ended."""
        return self.head.spec.key_states == "own"

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
        """Write the keys of the first ``rows`` rows, of tokens with ``embeds [rows, E]``, or keep
        what they are made from where they follow; return their queries ``[rows, NQ, D]`` if asked
        for.
        """
        head, heads = self.head, self.head.spec.num_heads
        inputs = self._decode_inputs(batch, rows, embeds.to(head.dtype))
        if head.queries_and_keys is None:
            if not with_queries:
                return None
            return self._finish(head.queries_alone, inputs, batch, num_queries=heads, keys=False)
        if not with_queries:
            self._finish(head.keys_alone, inputs, batch, num_queries=0)
            return None
        return self._finish(head.queries_and_keys, inputs, batch, num_queries=heads)

    # -- after the forward pass

    def learn_decodes(self, batch: StepBatch, rows: int, aux: Sequence[Tensor]) -> None:
        """Remember the fused aux of the first ``rows`` rows, one token each: the newest of its
        page, whether or not the page is full. Where keys follow, write them: of the rows that
        ``project`` has seen last.
        """
        head, slots = self.head, batch.slots[:rows]
        fused = head.fuse([state[:rows] for state in aux])
        on_cpu = self.device.type == "cpu"
        if on_cpu or self._key_inputs is None:
            # The slot -1 of a padding row means the row of the cache that nobody reads.
            self.cache.fused[slots // PAGE_SIZE] = fused
        if self._key_inputs is None:
            return
        inputs = self._key_inputs[:rows]
        own_states = inputs[:, head.spec.query_width :]
        if on_cpu:
            own_states.copy_(head.feature(fused))
        else:
            from specontext_vllm.triton_kernels.head_input import add_own_states

            add_own_states(
                fused,
                slots,
                head.feature_norm,
                self.cache.fused,
                own_states,
                head.spec.rms_norm_eps,
                PAGE_SIZE,
            )
        self._finish(head.keys_alone, inputs, batch, num_queries=0)

    def learn_rows(
        self, batch: StepBatch, first_row: int, last_row: int, aux: Sequence[Tensor]
    ) -> None:
        """Write the keys of the tokens of rows ``first_row`` to ``last_row - 1``, which are the
        step's last, and remember the fused aux of their pages: prompt rows, and rows with drafts.

        Whatever the head, their keys are made after the forward pass: that of token p+1 needs the
        aux of token p from this very pass. Tokens that were not kept get keys as well, which nobody
        reads before their slots are written anew; of a page only kept tokens are remembered.

        Rows beyond the batch's are padding, of a graph.
        """
        rows = slice(first_row, last_row)
        # Rows of one token each come before the others.
        first, tokens = first_row, batch.num_tokens
        slots = batch.slots
        if last_row > batch.num_rows or batch.replayable:
            tokens = last_row * batch.max_queries
            # Block 0 is never handed out.
            slots = slots[:tokens].clamp(min=0)
        starts = batch.query_starts[rows].long()
        ends = batch.query_starts[first_row + 1 : last_row + 1].long()
        last = ends - 1
        if batch.kept is not None:
            last = torch.where(ends > starts, starts + batch.kept[rows] - 1, -1)
        before_first = self.cache.previous(batch.block_table[rows], batch.positions[starts])
        newest = None
        for begin in range(first, tokens, PREFILL_CHUNK):
            end = min(begin + PREFILL_CHUNK, tokens)
            fused = self.head.fuse([state[begin:end] for state in aux])
            previous = torch.cat([fused[:1] if newest is None else newest, fused[:-1]])
            previous = _scatter_inside(previous, starts - begin, before_first)
            span = slice(begin, end)
            embeds = self.embed(batch.token_ids[span]).to(fused.dtype)
            own = fused if self.keys_follow else None
            keys = self.head.keys(embeds, previous, batch.positions[span], own)
            self.cache.write_keys(keys, slots[span])
            is_last = (
                _scatter_inside(torch.zeros_like(slots[span]), last - begin, torch.ones_like(last))
                > 0
            )
            page_end = (batch.positions[span] + 1) % PAGE_SIZE == 0
            if batch.kept is not None:
                places = torch.arange(begin, end, device=self.device)
                row = torch.bucketize(places, ends, right=True).clamp(max=len(last) - 1)
                page_end &= places <= last[row]
            self.cache.remember(fused, slots[span], page_end | is_last)
            newest = fused[-1:]

    def _decode_inputs(self, batch: StepBatch, rows: int, embeds: Tensor) -> Tensor:
        """``RetrievalHead.inputs`` of the first rows' tokens; kept where keys follow."""
        head, positions = self.head, batch.positions[:rows]
        out = None if self._key_inputs is None else self._key_inputs[:rows]
        if self.device.type == "cpu":
            inputs = head.inputs(embeds, self.cache.previous(batch.block_table[:rows], positions))
            if out is not None:
                out[:, : head.spec.query_width] = inputs
            return inputs
        from specontext_vllm.triton_kernels.head_input import head_input

        return head_input(
            embeds,
            self.cache.fused,
            batch.block_table,
            positions,
            head.embed_norm,
            head.feature_norm,
            head.spec.rms_norm_eps,
            PAGE_SIZE,
            out,
        )

    def _finish(
        self,
        projection: Projection,
        inputs: Tensor,
        batch: StepBatch,
        *,
        num_queries: int,
        keys: bool = True,
    ) -> Tensor:
        """Queries ``[rows, num_queries, D]`` of the first rows; what else the projection makes of
        ``inputs [rows, W]`` are keys, which are written.
        """
        head, rows = self.head, len(inputs)
        positions, slots = batch.positions[:rows], batch.slots[:rows]
        if self.device.type == "cpu":
            values = head.finish(projection, inputs, positions)
            if keys:
                self.cache.write_keys(values[:, num_queries:], slots)
            return values[:, :num_queries]
        from specontext_vllm.triton_kernels.head_rope import rope_and_cache

        return rope_and_cache(
            projection(inputs),
            head.cos_sin,
            positions,
            slots,
            self.cache.keys if keys else None,
            num_queries,
            projection.norm,
            head.spec.rms_norm_eps,
        )

    def profile(self, num_tokens: int) -> None:
        """Run the head's largest step on made-up data, so that vLLM's memory profile sees its
        activations.
        """
        count = min(num_tokens, PREFILL_CHUNK)
        fused = self.head.fuse([state[:count] for state in self.blank_aux(num_tokens)])
        token_ids = torch.zeros(count, dtype=torch.int64, device=self.device)
        embeds = self.embed(token_ids).to(self.head.dtype)
        if self.keys_follow:
            self.head.queries(embeds, fused, token_ids)
            self.head.keys(embeds, fused, token_ids, fused)
        else:
            self.head.project(embeds, fused, token_ids)

    def blank_aux(self, num_tokens: int) -> list[Tensor]:
        """Auxiliary hidden states of made-up tokens."""
        spec = self.head.spec
        shape = num_tokens, spec.target_hidden_size
        return [
            torch.zeros(shape, dtype=self.head.dtype, device=self.device)
            for _ in range(spec.num_aux)
        ]


def _scatter_inside(values: Tensor, index: Tensor, source: Tensor) -> Tensor:
    """``values [N, ...]`` with ``source[i]`` at ``index[i]`` where that lies in 0..N-1; without a
    host look at ``index``.
    """
    count = values.shape[0]
    inside = torch.where((index >= 0) & (index < count), index, count)
    return torch.cat([values, values[:1]]).index_copy(0, inside, source.to(values.dtype))[:count]
