"""What a retrieval head learns from: the draft loss and the alignment loss.

The draft loss alone does not teach a head to retrieve; the alignment loss does: where the teacher's
layers look when they process a token is where the head's attention for that token must lie
(docs/results/distillation.md).
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from specontext_vllm.retrieval.reference import grouped_logits, token_scores

WINDOW = 32
"""Newest tokens that alignment leaves out (docs/results/distillation.md, losses)."""
SHARPNESS = 2.0
"""Power that the teacher's weights are raised to before a head is aligned to them (the same page).
"""


def draft_loss(draft_logits: Tensor, teacher_logits: Tensor, weights: Tensor) -> Tensor:
    """KL(teacher || draft) on the next token, weighted.

    Args:
        draft_logits, teacher_logits: ``[B, T, V]`` for the same tokens. weights: ``[B, T]``.
    """
    teacher = teacher_logits.float().log_softmax(-1)
    kl = (teacher.exp() * (teacher - draft_logits.float().log_softmax(-1))).sum(-1)
    return (kl * weights).sum() / weights.sum().clamp(min=1e-6)


class AttentionCollector(Protocol):
    """Gathers where the teacher looks, a layer at a time."""

    def watch(self, query: Tensor, key: Tensor, at: Tensor, scale: float | None = None) -> None:
        """See ``AttentionTarget.watch``."""

    def result(self) -> tuple[Tensor, Tensor]:
        """See ``AttentionTarget.result``."""


class AttentionTarget:
    """Where the teacher looks, gathered layer by layer.

    The attention of sampled queries only is formed, in chunks of them, so memory is ``nkv * S * T``
    a sequence and no layer's is kept.
    Token 0 has no pair in the head and is a sink in the teacher: give sequences without it.

    Args:
        window: newest tokens that do not count, since the budget holds them anyway.
        over_layers: "max" or "mean" of the layers' weights.
    """

    CHUNK = 1 << 27
    """Attention weights formed at once."""

    def __init__(self, window: int, over_layers: str = "max") -> None:
        self.window, self.over_layers = window, over_layers
        self._target: Tensor | None = None
        self._far: Tensor | None = None
        self._layers = 0

    def watch(self, query: Tensor, key: Tensor, at: Tensor, scale: float | None = None) -> None:
        """One layer's ``query [B, nh, T, D]`` and ``key [B, nkv, T, D]``, rotated, at positions
        ``at [B, S]``.

        Args:
            scale: factor of ``q . k``; None for ``D ** -0.5``.
        """
        (batch, heads, length, _), kv_heads = query.shape, key.shape[1]
        step = torch.arange(length, device=at.device)
        if self._target is None:
            self._target = torch.zeros(batch, kv_heads, at.shape[1], length, device=query.device)
            self._far = step < at[:, None, :, None] - self.window
        self._layers += 1
        chunk = max(1, self.CHUNK // (batch * heads * length))
        for first in range(0, at.shape[1], chunk):
            here = at[:, first : first + chunk]
            logits = grouped_logits(query, key, here, scale)
            logits.masked_fill_(step > here[:, None, :, None, None], float("-inf"))
            weight = token_scores(logits).exp()
            known = self._target[:, :, first : first + chunk]
            if self.over_layers == "max":
                torch.maximum(known, weight, out=known)
            else:
                known += weight

    def result(self) -> tuple[Tensor, Tensor]:
        """``(target [B, nkv, S, T], mass [B, nkv, S])``: a distribution over tokens, and the weight
        it had before it was made one.
        """
        target = self._target * self._far
        if self.over_layers == "mean":
            target /= self._layers
        mass = target.sum(-1)
        return target / mass.clamp(min=1e-6)[..., None], mass


def attention_target(
    queries: list[Tensor], keys: list[Tensor], at: Tensor, window: int
) -> tuple[Tensor, Tensor]:
    """``AttentionTarget`` over layers that are all at hand."""
    collector = AttentionTarget(window)
    for query, key in zip(queries, keys, strict=True):
        collector.watch(query, key, at)
    return collector.result()


def alignment_loss(
    q: Tensor,
    k: Tensor,
    at: Tensor,
    target: Tensor,
    mass: Tensor,
    window: int,
    sharpness: float = SHARPNESS,
    each_token: bool = True,
) -> Tensor:
    """Cross-entropy of the head's attention against the teacher's, weighted by the teacher's mass
    beyond the window.

    A page is chosen by its heaviest token, over the query heads of a group: so a token counts with
        the query head that gives it most, and heavy
    tokens more than their weight. A dozen layers that each look a little at hundreds of tokens
    outweigh, in sum, the one that looks at the token it must copy; a head that is aligned to the
    sum learns the crowd (docs/results/distillation.md).

    Args:
        q: ``[B, nh, T, D]``, k: ``[B, nkv, T, D]`` of the head. at, target, mass: from
            ``attention_target``.
        sharpness: power of the target's weights.
        each_token: the query heads of a group share the tokens; else one of them, the best at this
            position, counts for all tokens.
    """
    step = torch.arange(k.shape[2], device=at.device)
    far = step < at[:, None, :, None] - window
    logits = grouped_logits(q, k, at).masked_fill(~far[:, :, :, None], -1e9)
    sharp = target**sharpness
    sharp = sharp / sharp.sum(-1, keepdim=True).clamp(min=1e-12)
    if each_token:
        entropy = -(sharp * token_scores(logits).clamp(min=-30.0)).sum(-1)
    else:
        log_weight = logits.log_softmax(-1).clamp(min=-30.0)
        entropy = -(sharp[:, :, :, None] * log_weight).sum(-1).amin(-1)
    return (entropy * mass.clamp(max=1.0)).mean()
