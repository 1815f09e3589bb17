"""The attention of a teacher's layers, which can be watched, and told which pages to read."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from specontext_vllm.config import PAGE_SIZE
from specontext_vllm.distillation.llama import causal_attention

ATTENTION = "specontext_teacher"
"""Name in transformers of the attention function that can be watched."""


def register_attention() -> None:
    """Register ``ATTENTION`` with transformers: causal attention that passes queries and keys to
    the module's ``observer``, if it has one. If it has a ``chosen [B, nkv, Q, pages]`` (bool), the
    newest Q tokens read these pages only. Windows and learned sinks are the model's.
    """
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    def attend(
        module: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        scaling: float | None = None,
        s_aux: Tensor | None = None,
        **rest: Any,
    ) -> tuple[Tensor, None]:
        observer = getattr(module, "observer", None)
        if observer is not None:
            observer(query, key, scaling)
        chosen = getattr(module, "chosen", None)
        if chosen is None:
            attended = _attention(query, key, value, attention_mask, scaling, s_aux)
            return attended.transpose(1, 2), None
        first = query.shape[2] - chosen.shape[2]
        newest = query[:, :, first:]
        read = _tokens_of_pages(chosen, newest, key)
        attended = _attention(newest, key, value, read, scaling, s_aux)
        if first:  # a run from the first token on
            query, key, value = (part[:, :, :first] for part in (query, key, value))
            before = _attention(query, key, value, None, scaling, s_aux)
            attended = torch.cat([before, attended], 2)
        return attended.transpose(1, 2), None

    def mask(*given: Any, local_size: int | None = None, **named: Any) -> Tensor | None:
        # Rows are packed without padding: outside of windows none is needed but the causal one.
        if local_size is None:
            return None
        named["allow_is_causal_skip"] = False
        return sdpa_mask(*given, local_size=local_size, **named)

    AttentionInterface.register(ATTENTION, attend)
    AttentionMaskInterface.register(ATTENTION, mask)


def _attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    read: Tensor | None,
    scale: float | None,
    sinks: Tensor | None,
) -> Tensor:
    """Attention ``[B, nh, Q, D]`` of ``query [B, nh, Q, D]`` to ``key, value [B, nkv, T, D]``.

    Args:
        read: ``[B, 1 or nh, Q, T]`` bool, which tokens; None: causal, Q being T.
        sinks: ``[nh]`` logits that join each softmax; None: no such.
    """
    width = value.shape[-1]
    if sinks is not None:
        # A key in front of all others, whose logit is the sink by a dimension more, without a
        # value. Kernels want widths that are multiples of 8.
        scale = query.shape[-1] ** -0.5 if scale is None else scale
        logit = (sinks / scale).to(query)[:, None, None].expand(*query.shape[:3], 1)
        query, key, value = (
            F.pad(query, (0, 8)),
            F.pad(key, (0, 8, 1, 0)),
            F.pad(value, (0, 8, 1, 0)),
        )
        query[..., width : width + 1] = logit
        key[:, :, 0, width] = 1
        if read is None:  # then a row more, so that the causal mask is square
            return causal_attention(F.pad(query, (0, 0, 1, 0)), key, value, scale)[:, :, 1:, :width]
        read = F.pad(read, (1, 0), value=True)
    if read is None:
        return causal_attention(query, key, value, scale)
    return F.scaled_dot_product_attention(
        query, key, value, attn_mask=read, scale=scale, enable_gqa=True
    )[..., :width]


def _tokens_of_pages(chosen: Tensor, query: Tensor, key: Tensor) -> Tensor:
    """``[B, nh, Q, T]`` bool: what the newest Q tokens read of the chosen pages, themselves and
    what came before: ``query [B, nh, Q, D]``, ``key [B, nkv, T, D]``.
    """
    length, newest = key.shape[2], query.shape[2]
    read = chosen.repeat_interleave(PAGE_SIZE, -1)[..., :length]
    token = torch.arange(length, device=key.device)
    read = read & (token <= token[length - newest :, None])
    return read.repeat_interleave(query.shape[1] // key.shape[1], 1)
