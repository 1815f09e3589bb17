"""How much of what the teacher looks at a head's choice of pages holds."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from specontext_vllm.config import PAGE_SIZE, SpeContextConfig


def recall_at_budget(q: Tensor, k: Tensor, at: Tensor, target: Tensor, pages: int) -> Tensor:
    """Share of the target's weight in the pages that the head would choose, as the engine chooses them.

    A page's score is the largest softmax weight of a token in it, over the group's query heads; the first page and the newest ones are
    always in (``sink_tokens``, ``recent_tokens`` of the config's defaults).

    Args:
        q: ``[B, nh, T, D]``, k: ``[B, nkv, T, D]`` of the head, for tokens 1 to T.
        at: ``[B, S]`` positions among them. target: ``[B, nkv, S, T]``. pages: the budget.
    Returns:
        ``[B, nkv, S]``.
    """
    defaults = SpeContextConfig.model_construct()
    kv_heads, length, d = k.shape[1:]
    step = torch.arange(length, device=at.device)
    chosen = q.gather(2, at[:, None, :, None].expand(-1, q.shape[1], -1, d)).unflatten(1, (kv_heads, -1))
    logits = torch.einsum("bkgsd,bktd->bkgst", chosen.float(), k.float()) * d**-0.5
    weight = logits.masked_fill(step > at[:, None, None, :, None], float("-inf")).softmax(-1).amax(2)
    # Index 0 here is token 1: one more in front makes pages the engine's pages.
    held = F.pad(weight, (1, -(length + 1) % PAGE_SIZE)).unflatten(-1, (-1, PAGE_SIZE)).amax(-1)
    newest = (at + 1) // PAGE_SIZE
    page = torch.arange(held.shape[-1], device=at.device)
    distance = newest[:, None, :, None] - page
    held = held.masked_fill((page < defaults.sink_pages) | ((distance >= 0) & (distance < defaults.recent_pages)), 2.0)
    held = held.masked_fill(distance < 0, -1.0)
    best = torch.zeros_like(held, dtype=torch.bool).scatter_(-1, held.topk(min(pages, held.shape[-1]), -1).indices, True)
    inside = best.repeat_interleave(PAGE_SIZE, -1)[..., 1 : length + 1]
    return (target * inside).sum(-1)
