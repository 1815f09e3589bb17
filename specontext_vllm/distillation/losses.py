"""The losses of a whole EAGLE-3 draft model: the draft loss and the alignment loss.

The draft loss alone does not teach a head to retrieve. The alignment loss does: for each token the
head must attend to what the teacher's layers attend to (docs/results/distillation.md).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Protocol

import torch
from torch import Tensor

from specontext_vllm.retrieval.reference import grouped_logits, token_scores

WINDOW = 32
"""Newest tokens that alignment ignores (docs/results/distillation.md, losses)."""
SHARPNESS = 2.0
"""Power that the teacher's weights are raised to (the same page)."""


def draft_loss(draft_logits: Tensor, teacher_logits: Tensor, weights: Tensor) -> Tensor:
    """Weighted mean of KL(teacher || draft) on the next token.

    Args:
        draft_logits, teacher_logits: ``[B, T, V]`` for the same tokens.
        weights: ``[B, T]``.
    """
    teacher = teacher_logits.float().log_softmax(-1)
    kl = (teacher.exp() * (teacher - draft_logits.float().log_softmax(-1))).sum(-1)
    return (kl * weights).sum() / weights.sum().clamp(min=1e-6)


class AttentionCollector(Protocol):
    """Collects what the teacher attends to, layer by layer."""

    def observe(self, query: Tensor, key: Tensor, at: Tensor, scale: float | None = None) -> None:
        """One layer's ``query [B, nh, T, D]`` and ``key [B, nkv, T, D]``, rotated, of all tokens.

        Args:
            at: ``[B, S]`` the positions that matter, counted without token 0.
            scale: factor of ``q . k``; None for ``D ** -0.5``.
        """

    def result(self) -> tuple[Tensor, Tensor]:
        """What was collected, and its sum at each position: ``[B, nkv, S, ...]``,
        ``[B, nkv, S]``.
        """


class ByGroup:
    """A collector for each group of layers, which watches the layers of its group.

    Args:
        groups: the group of each layer (``layer_groups``).
        make: a new collector.
    """

    def __init__(self, groups: Sequence[int], make: Callable[[], AttentionCollector]) -> None:
        self._groups = iter(groups)
        self._each = [make() for _ in range(max(groups) + 1)]

    def observe(self, query: Tensor, key: Tensor, at: Tensor, scale: float | None = None) -> None:
        """The next layer's; see ``AttentionCollector``."""
        self._each[next(self._groups)].observe(query, key, at, scale)

    def result(self) -> tuple[Tensor, Tensor]:
        """Of one group after the other, ``[B, G * nkv, S, ...]``, ``[B, G * nkv, S]``."""
        found = [collector.result() for collector in self._each]
        return found[0] if len(found) == 1 else _joined(found)


def _joined(found: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    targets, masses = zip(*found, strict=True)
    return torch.cat(targets, 1), torch.cat(masses, 1)


def scores_of_sampled(
    query: Tensor, key: Tensor, at: Tensor, hidden: Tensor, scale: float | None, chunk: int
) -> Iterator[tuple[slice, Tensor]]:
    """Token scores of one layer at positions ``at [B, S]``, some of them at a time.

    Args:
        query, key: ``[B, nh, T, D]``, ``[B, nkv, T, D]``, rotated.
        hidden: of ``tokens_after``.
        chunk: attention weights computed at a time.
    Yields:
        Places among S, and ``token_scores`` there: ``[B, nkv, places, T]``.
    """
    count = max(1, chunk // (query.shape[0] * query.shape[1] * query.shape[2]))
    for first in range(0, at.shape[1], count):
        part = slice(first, first + count)
        logits = grouped_logits(query, key, at[:, part], scale)
        yield part, token_scores(logits.masked_fill_(hidden[:, :, part], float("-inf")))


def tokens_after(at: Tensor, length: int) -> Tensor:
    """Which of ``length`` tokens come after ``at [B, S]``: ``[B, 1, S, 1, T]`` bool."""
    return torch.arange(length, device=at.device) > at[:, None, :, None, None]


class AttentionTarget:
    """What the teacher attends to, collected layer by layer.

    Attention weights are computed for sampled queries only, in chunks, and no layer's are kept, so
    memory is ``nkv * S * T`` for a sequence. Token 0 has no key in the head and is a sink in the
    teacher: the weights are those of a softmax without it.

    Args:
        window: newest tokens that do not count, since every selection has them.
        over_layers: "max" or "mean" of the layers' weights.
    """

    CHUNK = 1 << 27
    """Attention weights computed at a time."""

    def __init__(self, window: int, over_layers: str = "max") -> None:
        self.window, self.over_layers = window, over_layers
        self._target: Tensor | None = None
        self._far: Tensor | None = None
        self._hidden: Tensor | None = None
        self._layers = 0

    def observe(self, query: Tensor, key: Tensor, at: Tensor, scale: float | None = None) -> None:
        """See ``AttentionCollector``."""
        self.watch(query[:, :, 1:], key[:, :, 1:], at, scale)

    def watch(self, query: Tensor, key: Tensor, at: Tensor, scale: float | None = None) -> None:
        """One layer's ``query [B, nh, T, D]`` and ``key [B, nkv, T, D]``, rotated, at positions
        ``at [B, S]``.

        Args:
            scale: factor of ``q . k``; None for ``D ** -0.5``.
        """
        (batch, _, length, _), kv_heads = query.shape, key.shape[1]
        if self._target is None or self._hidden is None:
            self._target = torch.zeros(batch, kv_heads, at.shape[1], length, device=query.device)
            self._far = torch.arange(length, device=at.device) < at[:, None, :, None] - self.window
            self._hidden = tokens_after(at, length)
        self._layers += 1
        for part, scores in scores_of_sampled(query, key, at, self._hidden, scale, self.CHUNK):
            weight, known = scores.exp(), self._target[:, :, part]
            if self.over_layers == "max":
                torch.maximum(known, weight, out=known)
            else:
                known += weight

    def result(self) -> tuple[Tensor, Tensor]:
        """``(target [B, nkv, S, T], mass [B, nkv, S])``: a distribution over tokens, and the sum of
        its weights before they were normalised.
        """
        if self._target is None or self._far is None:
            raise ValueError("AttentionTarget: no layer was watched.")
        target = self._target * self._far
        if self.over_layers == "mean":
            target /= self._layers
        mass = target.sum(-1)
        return target / mass.clamp(min=1e-6)[..., None], mass


def attention_target(
    queries: list[Tensor], keys: list[Tensor], at: Tensor, window: int
) -> tuple[Tensor, Tensor]:
    """The result of an ``AttentionTarget`` that watches these layers."""
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

    A page's score is the largest weight that a query head of the group gives one of its tokens. So
    each token counts with the query head that gives it the largest weight, and heavy tokens count
    more than their weight (sharpness). Without that, a dozen layers that attend a little to
    hundreds of tokens outweigh the one that attends to the token it copies
    (docs/results/distillation.md).

    Args:
        q, k: ``[B, nh, T, D]``, ``[B, nkv, T, D]`` of the head.
        at, target, mass: of ``AttentionTarget``.
        sharpness: power of the target's weights.
        each_token: take each token's best query head of the group; else the query head that is best
            for all of a position's tokens together.
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
