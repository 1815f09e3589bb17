"""What a retrieval head learns from: the draft loss and the alignment loss.

The draft loss alone does not teach a small head to retrieve (shared/spike/README.md); the alignment loss does: where the teacher's
layers look when they process a token is where the head's attention for that token must lie.
"""

from __future__ import annotations

import torch
from torch import Tensor


def draft_loss(draft_logits: Tensor, teacher_logits: Tensor, weights: Tensor) -> Tensor:
    """KL(teacher || draft) on the next token, weighted.

    Args:
        draft_logits, teacher_logits: ``[B, T, V]`` for the same tokens. weights: ``[B, T]``.
    """
    teacher = teacher_logits.float().log_softmax(-1)
    kl = (teacher.exp() * (teacher - draft_logits.float().log_softmax(-1))).sum(-1)
    return (kl * weights).sum() / weights.sum().clamp(min=1e-6)


def attention_target(queries: list[Tensor], keys: list[Tensor], at: Tensor, window: int) -> tuple[Tensor, Tensor]:
    """Where the teacher looks from positions ``at``, beyond the newest ``window`` tokens.

    The attention of sampled queries only is formed, so memory is ``nkv * S * T`` a sequence and layer. Token 0 has no pair in the
    head and is a sink in the teacher: give sequences without it.

    Args:
        queries: per layer ``[B, nh, T, D]``. keys: per layer ``[B, nkv, T, D]``. at: ``[B, S]`` positions.
    Returns:
        ``(target [B, nkv, S, T], mass [B, nkv, S])``: the maximum over layers and over a group's query heads of the attention
        weights, normalised; and the sum it had.
    """
    nkv, length, d = keys[0].shape[1:]
    step = torch.arange(length, device=at.device)
    causal = step <= at[:, None, :, None]
    far = step < at[:, None, :, None] - window
    target = None
    for q, k in zip(queries, keys):
        chosen = q.gather(2, at[:, None, :, None].expand(-1, q.shape[1], -1, d)).unflatten(1, (nkv, -1))
        logits = torch.einsum("bkgsd,bktd->bkgst", chosen.float(), k.float()) * d**-0.5
        weight = logits.masked_fill(~causal[:, :, None], float("-inf")).softmax(-1).amax(2)
        target = weight if target is None else torch.maximum(target, weight)
    target = target * far
    mass = target.sum(-1)
    return target / mass.clamp(min=1e-6)[..., None], mass


def alignment_loss(q: Tensor, k: Tensor, at: Tensor, target: Tensor, mass: Tensor, window: int) -> Tensor:
    """Cross-entropy of the head's attention against the teacher's, weighted by the teacher's mass beyond the window.

    The best query head of a group counts, since a page needs one head that points at it (selection takes the group's maximum).

    Args:
        q: ``[B, nh, T, D]``, k: ``[B, nkv, T, D]`` of the head. at, target, mass: from ``attention_target``.
    """
    nkv, length, d = k.shape[1:]
    step = torch.arange(length, device=at.device)
    far = step < at[:, None, :, None] - window
    chosen = q.gather(2, at[:, None, :, None].expand(-1, q.shape[1], -1, d)).unflatten(1, (nkv, -1))
    logits = torch.einsum("bkgsd,bktd->bkgst", chosen.float(), k.float()) * d**-0.5
    log_weight = logits.masked_fill(~far[:, :, None], -1e9).log_softmax(-1).clamp(min=-30.0)
    entropy = -(target[:, :, None] * log_weight).sum(-1).amin(2)
    return (entropy * mass.clamp(max=1.0)).mean()
