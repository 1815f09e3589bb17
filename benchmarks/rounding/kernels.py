"""One layer's attention as our providers and as stock vLLM compute it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from benchmarks.rounding.layers import Layer
from specontext_vllm.config import PAGE_SIZE

STOCK_BLOCK = 32
"""Tokens of a block that vLLM's CPU attention reads."""


def ours(layer: Layer, provider: Callable[..., Any] | None = None) -> Tensor:
    """What the provider chosen for this device makes of it, or the given one (the arguments of
    ``AttentionProvider``).
    """
    from specontext_vllm.attention.provider import PrefillRows
    from specontext_vllm.attention.registry import choose_provider
    from specontext_vllm.step_data import PageTable

    heads, kv_heads, d = layer.query.shape[1], layer.key.shape[1], layer.query.shape[2]
    shape = (heads, kv_heads, d, layer.scale, layer.query.dtype)
    attention = (
        provider(*shape) if provider else choose_provider("auto", *shape, layer.query.device.type)
    )
    blocks, block_table = layer.blocks(PAGE_SIZE)
    cache = blocks.transpose(1, 2).contiguous()
    lengths, output = layer.lengths(), torch.full_like(layer.query, float("nan"))
    if layer.decode:
        rows = len(lengths)
        table = PageTable.allocate(rows, kv_heads, block_table.shape[1], layer.query.device)
        by_head = (
            block_table[:, None] * kv_heads
            + torch.arange(kv_heads, dtype=torch.int32, device=lengths.device)[:, None]
        )
        table.pages.copy_(by_head.flatten(0, 1))
        table.lengths.copy_(lengths.repeat_interleave(kv_heads))
        attention.plan(table, rows)
        attention.decode(layer.query, cache, table, rows, output)
    else:
        starts = layer.starts()
        prefill = PrefillRows(
            starts, lengths, block_table, len(layer.query), len(layer.key), starts.tolist()
        )
        attention.prefill(layer.query, cache, prefill, output)
    return output


def stock(layer: Layer) -> Tensor:
    """What stock vLLM's default backend makes of it: FlashAttention on a GPU, its C++ kernels on a
    CPU.

    Raises:
        RuntimeError: a GPU for which vLLM has no FlashAttention.
    """
    return flash_attention(layer) if layer.query.device.type == "cuda" else cpu_attention(layer)


def flash_attention(layer: Layer) -> Tensor:
    from vllm.v1.attention.backends.fa_utils import flash_attn_varlen_func

    from specontext_vllm.attention.flash import flash_attention_version

    version = flash_attention_version(layer.query.shape[-1], layer.query.dtype)
    if version is None:
        raise RuntimeError(
            f"vLLM's FlashAttention does not run {layer.query.dtype} with heads of "
            f"{layer.query.shape[-1]} on this GPU"
        )
    blocks, block_table = layer.blocks(PAGE_SIZE)
    keys, values = (part.contiguous() for part in blocks.chunk(2, -1))
    output = torch.full_like(layer.query, float("nan"))
    flash_attn_varlen_func(
        layer.query,
        keys,
        values,
        out=output,
        max_seqlen_q=1 if layer.decode else len(layer.query),
        cu_seqlens_q=layer.starts(),
        max_seqlen_k=len(layer.key),
        seqused_k=layer.lengths(),
        block_table=block_table,
        causal=True,
        softmax_scale=layer.scale,
        fa_version=version,
    )
    return output


def cpu_attention(layer: Layer) -> Tensor:
    from vllm import _custom_ops as ops
    from vllm.platforms import current_platform
    from vllm.v1.attention.backends.cpu_attn import _get_attn_isa

    current_platform.import_kernels()
    (tokens, kv_heads, d), dtype = layer.key.shape, layer.query.dtype
    isa = _get_attn_isa(dtype, STOCK_BLOCK, d)
    if isa == "amx":
        torch.cpu._init_amx()
    count = -(-tokens // STOCK_BLOCK)
    cache = torch.zeros(count, kv_heads, 2 * STOCK_BLOCK, d, dtype=dtype)
    keys, values = cache.chunk(2, dim=2)
    # The kernels keep an order of their own within a block.
    ops.cpu_attn_reshape_and_cache(
        layer.key,
        layer.value,
        keys,
        values,
        torch.arange(tokens),
        isa,
        k_scale=1.0,
        v_scale=1.0,
        kv_cache_dtype="auto",
    )
    starts, lengths = layer.starts(), layer.lengths()
    schedule = ops.cpu_attn_get_scheduler_metadata(
        num_reqs=len(lengths),
        num_heads=layer.query.shape[1],
        num_kv_heads=kv_heads,
        head_dim=d,
        seq_lens=lengths,
        dtype=dtype,
        query_start_loc=starts,
        causal=True,
        sliding_window_size=-1,
        isa=isa,
        enable_kv_split=True,
        dynamic_causal=None,
        kv_cache_dtype="auto",
    )
    output = torch.full_like(layer.query, float("nan"))
    ops.cpu_attention_with_kv_cache(
        query=layer.query,
        key_cache=keys,
        value_cache=values,
        output=output,
        query_start_loc=starts,
        seq_lens=lengths,
        scale=layer.scale,
        causal=True,
        alibi_slopes=None,
        sliding_window=-1,
        block_table=torch.arange(count, dtype=torch.int32).repeat(len(lengths), 1),
        softcap=0,
        scheduler_metadata=schedule,
        s_aux=None,
        dynamic_causal=None,
        k_scale=1.0,
        v_scale=1.0,
        kv_cache_dtype="auto",
    )
    return output
