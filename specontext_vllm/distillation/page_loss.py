"""The loss of a head that is trained for retrieval alone: which pages the teacher reads."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from specontext_vllm.config import PAGE_SIZE
from specontext_vllm.distillation.losses import (
    AttentionTarget,
    scores_of_sampled,
    tokens_after,
)


class PageTarget:
    """What the teacher reads each page for: the largest weight that a layer and a query head of the
    group give one of the page's tokens, in a softmax over all tokens, the first one included.

    Args:
        recents: newest pages that do not count, since every selection has them.
    """

    CHUNK = AttentionTarget.CHUNK

    def __init__(self, recents: int) -> None:
        self.recents = recents
        self._scores: Tensor | None = None
        self._hidden: Tensor | None = None
        self._at: Tensor | None = None

    def observe(self, query: Tensor, key: Tensor, at: Tensor, scale: float | None = None) -> None:
        """See ``AttentionCollector``."""
        (batch, _, length, _), kv_heads = query.shape, key.shape[1]
        place = at + 1
        if self._scores is None:
            pages = -(-length // PAGE_SIZE)
            self._at = at
            self._scores = torch.full(
                (batch, kv_heads, at.shape[1], pages), float("-inf"), device=query.device
            )
        if query.is_cuda:
            from specontext_vllm.triton_kernels.page_weights import page_weights

            sampled = query.gather(
                2, place[:, None, :, None].expand(-1, query.shape[1], -1, query.shape[3])
            )
            scale = query.shape[3] ** -0.5 if scale is None else scale
            score = page_weights(sampled, key, place, scale, PAGE_SIZE)
            torch.maximum(self._scores, score, out=self._scores)
            return
        if self._hidden is None:
            self._hidden = tokens_after(place, length)
        for part, scores in scores_of_sampled(query, key, place, self._hidden, scale, self.CHUNK):
            score = F.pad(scores, (0, -length % PAGE_SIZE), value=float("-inf"))
            known = self._scores[:, :, part]
            torch.maximum(known, score.unflatten(-1, (-1, PAGE_SIZE)).amax(-1), out=known)

    def result(self) -> tuple[Tensor, Tensor]:
        """``(weights [B, nkv, S, pages], mass [B, nkv, S])``: weights of pages that can be chosen,
        0 for the others; and their sum.
        """
        if self._scores is None or self._at is None:
            raise ValueError("PageTarget: no layer was watched.")
        choosable = choosable_pages(self._at, self._scores.shape[-1], self.recents)
        weights = self._scores.exp() * choosable
        return weights, weights.sum(-1)


def choosable_pages(at: Tensor, pages: int, recents: int) -> Tensor:
    """Whether a page can be chosen: it is neither the first one nor among the newest, ``recents``
    of them. ``at [B, S]``, counted without token 0 -> ``[B, 1, S, pages]`` bool.
    """
    page = torch.arange(pages, device=at.device)
    newest = ((at + 1) // PAGE_SIZE)[:, None, :, None]
    return (page >= 1) & (page <= newest - recents)


def page_loss(
    scores: Tensor, weights: Tensor, mass: Tensor, at: Tensor, recents: int, sharp: float
) -> Tensor:
    """Cross-entropy of the head's scores against the teacher's weights, over the pages that can be
    chosen, weighted by the teacher's mass on them.

    The scores are the engine's own, so what is trained is what is ranked. The target is a mixture
    of the weights and of their squares: with squares alone ordinary text suffers, without them what
    is copied does (docs/results/distillation.md).

    Args:
        scores: ``[B, nkv, S, pages]``, logarithms, of ``HeadModel.page_scores``.
        weights, mass: of ``PageTarget`` with as many ``recents``.
        at: ``[B, S]``.
        sharp: the squares' share of the mixture.
    """
    choosable = choosable_pages(at, scores.shape[-1], recents)
    log_share = scores.masked_fill(~choosable, -1e30).log_softmax(-1).clamp(min=-30.0)
    squares = weights.square()
    target = (1 - sharp) * weights / mass.clamp(min=1e-6)[..., None]
    target = target + sharp * squares / squares.sum(-1, keepdim=True).clamp(min=1e-12)
    importance = mass.clamp(max=1.0)
    entropy = -(target * log_share).sum(-1)
    return (entropy * importance).sum() / importance.sum().clamp(min=1e-6)
