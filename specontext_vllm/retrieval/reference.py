"""The definition, in plain torch, of a page's score and of the pages that are chosen (paper C1).

Selection on a CPU, recall, the distillation losses and the demo's trainer call these functions; the
kernels are tested against them.

NQ query heads share H KV heads in groups of G = NQ / H; S queries look at T tokens.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from specontext_vllm.config import SpeContextConfig


@dataclass(frozen=True)
class Budget:
    """Pages per (request, KV head): ``total`` in all, ``sinks`` from the start and ``recents`` at
    the end among them.
    """

    total: int
    sinks: int
    recents: int

    @classmethod
    def of(cls, config: SpeContextConfig) -> Budget:
        """What the settings allow."""
        return cls(config.budget_pages, config.sink_pages, config.recent_pages)

    @classmethod
    def everything(cls, max_pages: int) -> Budget:
        """Enough for contexts of up to ``max_pages`` pages."""
        return cls(max_pages, 1, 1)


def grouped_logits(
    queries: Tensor, keys: Tensor, at: Tensor | None = None, scale: float | None = None
) -> Tensor:
    """``q . k * scale`` of every query with every key of its KV head, not masked.

    Args:
        queries: ``[B, NQ, S, D]``. keys: ``[B, H, T, D]``.
        at: ``[B, S']`` int64: only the queries at these places; None: all.
        scale: None for ``D ** -0.5``.
    Returns:
        ``[B, H, S, G, T]`` float32.
    """
    heads, d = keys.shape[1], keys.shape[-1]
    if at is not None:
        queries = queries.gather(2, at[:, None, :, None].expand(-1, queries.shape[1], -1, d))
    grouped = queries.unflatten(1, (heads, -1)).float()
    return torch.einsum("bhgsd,bhtd->bhsgt", grouped, keys.float()) * (scale or d**-0.5)


def token_scores(logits: Tensor) -> Tensor:
    """Score of a token: the logarithm of the largest softmax weight that a query head of the group
    gives it. ``[..., G, T]`` -> ``[..., T]``; ``logits`` are -inf for tokens out of sight.
    """
    return logits.log_softmax(-1).amax(-2)


def reduce_to_pages(logits: Tensor, page_size: int) -> tuple[Tensor, Tensor]:
    """Maximum and log-sum-exp of the logits of each page's tokens: ``[..., T]`` ->
    two of ``[..., pages]``.

    This is all that scores and masses of pages need: a page's largest weight in a softmax over all
    tokens is ``exp(max - total)`` and its mass ``exp(lse - total)``, with ``total`` the log-sum-exp
    over the pages' ``lse``.
    """
    logits = F.pad(logits, (0, -logits.shape[-1] % page_size), value=float("-inf"))
    paged = logits.unflatten(-1, (-1, page_size))
    return paged.amax(-1), paged.logsumexp(-1)


def page_scores(page_max: Tensor, page_lse: Tensor) -> tuple[Tensor, Tensor]:
    """Score of a page: the logarithm of the largest softmax weight that a query head of the group
    gives one of its tokens. Also the page's attention mass, the mean over the group.

    A page for which one of the two inputs is not finite, as of a request whose hidden states
    overflow, has the worst score and no mass; a query head without a finite page has no say.

    Args:
        page_max, page_lse: ``[..., G, pages]`` of ``reduce_to_pages``.
    Returns:
        ``(scores [..., pages], mass [..., pages])``.
    """
    finite = page_max.isfinite() & page_lse.isfinite()
    page_max, page_lse = (part.where(finite, float("-inf")) for part in (page_max, page_lse))
    total = page_lse.logsumexp(-1, keepdim=True)
    total = total.where(total.isfinite(), float("inf"))
    return (page_max - total).amax(-2), (page_lse - total).exp().mean(-2)


def chosen_pages(scores: Tensor, counts: Tensor | int, budget: Budget) -> Tensor:
    """The chosen pages: sinks, recents, and the best of the rest; the older one of two that are
    equal. All pages of a context that has no more than the budget.

    Args:
        scores: ``[..., pages]``.
        counts: pages of the context, an integer or broadcastable to ``scores``; what comes after
            them is never chosen.
    Returns:
        ``[..., pages]`` bool.
    """
    page = torch.arange(scores.shape[-1], device=scores.device)
    exists = (page < counts).expand(scores.shape)
    forced = (page < budget.sinks) | (page >= counts - budget.recents)
    scores = scores.masked_fill(forced, float("inf")).masked_fill(~exists, float("-inf"))
    best = scores.sort(dim=-1, descending=True, stable=True).indices[..., : budget.total]
    chosen = torch.zeros_like(scores, dtype=torch.bool).scatter_(-1, best, True)
    return chosen & exists
