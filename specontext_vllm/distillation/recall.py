"""How much of what the teacher looks at a head's choice of pages holds."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from specontext_vllm.config import PAGE_SIZE, SpeContextConfig
from specontext_vllm.distillation.data import sample_positions
from specontext_vllm.distillation.draft import DraftModel
from specontext_vllm.distillation.losses import AttentionTarget
from specontext_vllm.distillation.teacher import Teacher

_SERVED = SpeContextConfig.model_construct()
LEAST_BUDGET = PAGE_SIZE * (_SERVED.sink_pages + _SERVED.recent_pages + 1)
"""Tokens of sinks, recents and one page to choose."""


@dataclass(frozen=True)
class Recall:
    """Share of the teacher's far attention on the pages a budget holds; ``best``: on those of the choice that holds most of it."""

    found: float
    best: float


def page_scores(q: Tensor, k: Tensor, at: Tensor) -> Tensor:
    """The engine's score of a page: the largest softmax weight of a token in it, over the group's query heads.

    Args:
        q: ``[B, nh, T, D]``, k: ``[B, nkv, T, D]`` of the head, for tokens 1 to T. at: ``[B, S]`` positions among them.
    Returns:
        ``[B, nkv, S, pages]``.
    """
    kv_heads, length, d = k.shape[1:]
    step = torch.arange(length, device=at.device)
    chosen = q.gather(2, at[:, None, :, None].expand(-1, q.shape[1], -1, d)).unflatten(1, (kv_heads, -1))
    logits = torch.einsum("bkgsd,bktd->bkgst", chosen.float(), k.float()) * d**-0.5
    return _pages(logits.masked_fill_(step > at[:, None, None, :, None], float("-inf")).softmax(-1).amax(2)).amax(-1)


def page_sums(target: Tensor) -> Tensor:
    """The teacher's weight on each page, ``[B, nkv, S, pages]`` of ``target [B, nkv, S, T]``."""
    return _pages(target).sum(-1)


def _pages(weight: Tensor) -> Tensor:
    # Index 0 here is token 1: one more in front makes pages the engine's pages.
    return F.pad(weight, (1, -(weight.shape[-1] + 1) % PAGE_SIZE)).unflatten(-1, (-1, PAGE_SIZE))


def choose(scores: Tensor, at: Tensor, pages: int) -> Tensor:
    """Chosen pages as booleans like ``scores [B, nkv, S, pages]``: sinks, recents, then the best; none that is newer than the token."""
    page = torch.arange(scores.shape[-1], device=at.device)
    distance = ((at + 1) // PAGE_SIZE)[:, None, :, None] - page
    held = scores.masked_fill((page < _SERVED.sink_pages) | ((distance >= 0) & (distance < _SERVED.recent_pages)), float("inf"))
    held = held.masked_fill(distance < 0, -1.0)
    return torch.zeros_like(held, dtype=torch.bool).scatter_(-1, held.topk(min(pages, held.shape[-1]), -1).indices, True)


@torch.no_grad()
def held_out_recall(
    teacher: Teacher, draft: DraftModel, batches: Iterable[tuple[Tensor, Tensor]], budgets: Sequence[int], *, positions: int,
    over_layers: str = "max",
) -> list[dict[int, Recall]]:  # fmt: skip
    """Recall at each budget (tokens), for each of the batches.

    Tokens that follow the largest budget are asked, those before answers first; the newest ``recent_tokens`` of the context do not
    count, since every budget holds them.

    Args:
        batches: ``(ids [B, T], weights [B, T])``, T above the largest budget. positions: tokens of a sequence that are asked.
        over_layers: the teacher's layers together, as in ``AttentionTarget``.
    """
    rows = []
    for number, (ids, weights) in enumerate(batches):
        ids, weights = ids.to(teacher.device), weights.to(teacher.device)
        generator = torch.Generator(device=ids.device).manual_seed(number)
        at, _ = sample_positions(weights[:, 1:], positions, generator, first=max(budgets))
        lesson = teacher(ids, at, AttentionTarget(_SERVED.recent_tokens, over_layers))
        place = torch.arange(1, ids.shape[1], device=ids.device)
        with torch.autocast(ids.device.type, torch.bfloat16, enabled=lesson.aux.dtype == torch.bfloat16):
            _, q, k, _ = draft.queries_keys(lesson.embeds[:, 1:], lesson.aux[:, :-1], place)
        scores, sums = page_scores(q, k, at), page_sums(lesson.target)
        weight = lesson.mass / lesson.mass.sum().clamp(min=1e-9)

        def share(by: Tensor, budget: int) -> float:
            return float(((sums * choose(by, at, budget // PAGE_SIZE)).sum(-1) * weight).sum())

        rows.append({budget: Recall(share(scores, budget), share(sums, budget)) for budget in budgets})
    return rows
