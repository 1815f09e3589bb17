"""Attention in plain torch: the definition, and what a CPU runs without our C++ kernels."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from specontext_vllm.attention.provider import AttentionProvider, PrefillRows, head_pages
from specontext_vllm.config import PAGE_SIZE, pages_for
from specontext_vllm.float8 import KVScales, as_bytes, to_float8
from specontext_vllm.step_data import PageTable, RowQueries


class TorchProvider(AttentionProvider):
    """Gather the pages, then ``scaled_dot_product_attention``, row by row.

    Computed in float32 whatever the model's dtype: in 16 bits torch would round the softmax weights
    before they are multiplied by the values. vLLM's CPU attention rounds them only on CPUs with
    matrix units for bfloat16.
    """

    def decode(
        self,
        query: Tensor,
        kv_cache: Tensor,
        table: PageTable,
        rows: int,
        output: Tensor,
        queries: RowQueries | None = None,
        sinks: Tensor | None = None,
        scales: KVScales | None = None,
    ) -> None:
        heads, d = self.num_kv_heads, self.head_dim
        flat = head_pages(kv_cache)
        lengths = table.lengths[: rows * heads].view(rows, heads).tolist()
        starts = list(range(rows + 1)) if queries is None else queries.starts.tolist()
        for row in range(rows):
            span = slice(starts[row], starts[row + 1])
            new = span.stop - span.start
            # Each KV head has pages of its own, and maybe another number of them.
            for head, tokens in enumerate(lengths[row]):
                group = slice(head * self.group, (head + 1) * self.group)
                if tokens == 0 or new == 0:
                    output[span, group] = 0
                    continue
                page_ids = table.pages[row * heads + head, : pages_for(tokens)].long()
                kv = read_pages(flat, page_ids, scales).view(-1, 2 * d)[:tokens]
                mask = None
                if new > 1:
                    mask = torch.ones(new, tokens, dtype=torch.bool, device=kv.device)
                    mask = mask.tril(tokens - new)
                output[span, group] = self._attend(
                    query[span, group].float().transpose(0, 1),
                    kv[None],
                    mask,
                    None if sinks is None else sinks[group],
                ).transpose(0, 1)

    def _attend(
        self, query: Tensor, kv: Tensor, mask: Tensor | None, sinks: Tensor | None
    ) -> Tensor:
        """``query [num_heads, S, D]`` over ``kv [H, T, 2 * D]``, whose tokens each head reads as
        ``mask [S, T]`` allows.
        """
        keys, values = kv.chunk(2, dim=-1)
        if not self.soft_cap and sinks is None:
            return F.scaled_dot_product_attention(
                query[None],
                keys[None],
                values[None],
                attn_mask=mask,
                scale=self.scale,
                enable_gqa=True,
            )[0]
        group = query.shape[0] // kv.shape[0]
        logits = query @ keys.repeat_interleave(group, 0).transpose(1, 2) * self.scale
        if self.soft_cap:
            logits = self.soft_cap * torch.tanh(logits / self.soft_cap)
        if mask is not None:
            logits = logits.masked_fill(~mask, float("-inf"))
        if sinks is not None:
            own = sinks.float()[:, None, None].expand(-1, logits.shape[1], 1)
            logits = torch.cat((logits, own), dim=-1)
        weights = logits.softmax(-1)[..., : keys.shape[1]]
        return weights @ values.repeat_interleave(group, 0)

    def prefill(
        self,
        query: Tensor,
        kv_cache: Tensor,
        rows: PrefillRows,
        output: Tensor,
        sinks: Tensor | None = None,
        scales: KVScales | None = None,
    ) -> None:
        starts, seq_lens = rows.starts.tolist(), rows.seq_lens.tolist()
        for row, context in enumerate(seq_lens):
            span = slice(starts[row], starts[row + 1])
            new = span.stop - span.start
            if new == 0:
                continue
            page_ids = rows.block_table[row, : pages_for(context)].long()
            # [H, context, 2 * D]
            kv = (
                read_pages(kv_cache, page_ids, scales)
                .transpose(0, 1)
                .reshape(self.num_kv_heads, -1, 2 * self.head_dim)[:, :context]
            )
            mask = torch.ones(new, context, dtype=torch.bool, device=query.device)
            output[span] = self._attend(
                query[span].float().transpose(0, 1), kv, mask.tril(context - new), sinks
            ).transpose(0, 1)

    def write(
        self,
        key: Tensor,
        value: Tensor,
        kv_cache: Tensor,
        slots: Tensor,
        scales: KVScales | None = None,
    ) -> None:
        real = slots >= 0
        kept = slots[real]
        block, offset = kept // PAGE_SIZE, kept % PAGE_SIZE
        new = key[: slots.shape[0]][real], value[: slots.shape[0]][real]
        if scales is not None:
            new = to_float8(new[0], scales.key), to_float8(new[1], scales.value)
        kv = torch.cat(new, dim=-1).to(kv_cache.dtype)
        as_bytes(kv_cache)[block, :, offset] = as_bytes(kv)


def read_pages(pages: Tensor, ids: Tensor, scales: KVScales | None) -> Tensor:
    """``pages [..., 2 * D]`` with these ids in float32, as they were before they were scaled."""
    kv = as_bytes(pages)[ids].view(pages.dtype).float()
    if scales is not None:
        keys, values = kv.chunk(2, dim=-1)
        keys *= scales.key
        values *= scales.value
    return kv
