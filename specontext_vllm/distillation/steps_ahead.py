"""Several drafts in a row, as an engine makes them: the draft model on its own outputs."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from specontext_vllm.distillation.draft import DraftModel
from specontext_vllm.distillation.losses import draft_loss
from specontext_vllm.distillation.rows import rows_at
from specontext_vllm.distillation.teacher import Teacher

MEASURED = 5
"""Drafts in a row that a measurement looks at."""
DECAY = 0.8
"""Weight of a step ahead over that of the step before (EAGLE-3)."""


@dataclass(frozen=True)
class Pairs:
    """The draft model's first step at every token but the first.

    Attributes:
        embeds: ``[B, T, H]`` of the tokens.
        fused: ``[B, T, H]``. q: ``[B, nh, T, D]``. k: ``[B, nkv, T, D]``. inputs: ``[B, T, 2H]``:
            from ``DraftModel.queries_keys``.
    """

    embeds: Tensor
    fused: Tensor
    q: Tensor
    k: Tensor
    inputs: Tensor

    @classmethod
    def of(cls, draft: DraftModel, embeds: Tensor, aux: Tensor) -> Pairs:
        """Of all tokens' ``embeds [B, T + 1, H]``, ``aux [B, T + 1, num_aux * H]``."""
        # The pair (token p+1, states p) stands at p+1; token 0 has none.
        positions = torch.arange(1, embeds.shape[1], device=embeds.device)
        own = embeds[:, 1:]
        return cls(own, *draft.queries_keys(own, aux[:, :-1], positions))


def states_ahead(
    draft: DraftModel, pairs: Pairs, at: Tensor, steps: int, chains: int | None = None
) -> Iterator[Tensor]:
    """What the LM head reads for the 1st, 2nd, ... token after each position, if the tokens in
    between are those of the text.

    As vLLM's EAGLE-3 drafter runs (v1/spec_decode/llm_base_proposer.py, propose;
    model_executor/models/llama_eagle3.py): a later step reads the layer's output of the step
    before, not normed and without fc, in place of the fused states. It attends to the first step's
    keys up to its start and to the keys of its own chain. EAGLE-3 calls it training-time test
    (arXiv 2503.01840).

    Attention is computed for the chains only, ``[B, nh, S, T + steps * S]`` within one operation.

    Args:
        at: ``[B, S]`` where chains start, counted without token 0. Steps beyond the last token
            repeat it.
        steps: in all, the first one included.
        chains: how many of S go on after the first step, the first ones of ``at``; None: all.
    Yields:
        ``[B, S, H]``, then ``[B, chains, H]`` of each later step.
    """
    length = pairs.k.shape[2]
    features, keys, values = rows_at(pairs.fused, at), [pairs.k], [draft.values(pairs.inputs)]
    q = pairs.q.gather(2, at[:, None, :, None].expand(-1, pairs.q.shape[1], -1, pairs.q.shape[3]))
    readable = [torch.arange(length, device=at.device) <= at[..., None]]
    for step in range(steps):
        if step == 1:
            at, features, readable = at[:, :chains], features[:, :chains], [readable[0][:, :chains]]
        if step:
            where = (at + step).clamp(max=length - 1)
            q, k, inputs = draft.project(rows_at(pairs.embeds, where), features, where + 1)
            keys.append(k)
            values.append(draft.values(inputs))
            own = torch.eye(at.shape[1], dtype=torch.bool, device=at.device)
            readable.append(own.expand(len(at), -1, -1))
        attended = _attention(q, torch.cat(keys, 2), torch.cat(values, 2), torch.cat(readable, 2))
        features = draft.outputs(features, attended)
        yield draft.final_norm(features)


def _attention(q: Tensor, k: Tensor, v: Tensor, readable: Tensor) -> Tensor:
    """``[B, nh, S, D]`` of ``q [B, nh, S, D]``, ``k, v [B, nkv, T, D]``, ``readable [B, S, T]``."""
    group = q.shape[1] // k.shape[1]
    # Query heads of a group as rows of its KV head: with a mask, PyTorch's fused kernels take no
    # grouped heads.
    rows = q.unflatten(1, (-1, group)).flatten(2, 3)
    attended = F.scaled_dot_product_attention(
        rows, k, v, attn_mask=readable[:, None].repeat(1, 1, group, 1)
    )
    return attended.unflatten(2, (group, -1)).flatten(1, 2)


def draft_losses(
    draft: DraftModel,
    pairs: Pairs,
    at: Tensor,
    weights: Tensor,
    hidden: Tensor,
    logits_of: Callable[[Tensor], Tensor],
    steps: int,
    chains: int,
) -> dict[str, Tensor]:
    """The draft loss of the first step, ``draft``, and the mean of the later ones', ``ahead``, each
    ``DECAY`` times as heavy as the one before.

    Args:
        at: ``[B, S]`` of ``states_ahead``.
        weights: ``[B, T + 1]`` of the tokens themselves; a step counts as the token it predicts.
        hidden: ``[B, T + 1, H]``, states that the teacher's LM head reads.
        logits_of: that LM head, of the tokens that are drafted.
        steps, chains: of ``states_ahead``.
    """
    length = pairs.k.shape[2]
    # The token after the last one is not known.
    following = F.pad(weights[:, 2:], (0, 1))
    found: dict[str, Tensor] = {}
    total = 0.0
    for step, states in enumerate(states_ahead(draft, pairs, at, steps, chains)):
        place = at[:, : states.shape[1]] + step
        within = place.clamp(max=length - 1)
        weight = following.gather(1, within).clamp(min=0.02) * (place < length)
        taught = logits_of(rows_at(hidden[:, 1:], within))
        loss = draft_loss(draft.lm_head(states), taught, weight)
        if step == 0:
            found["draft"] = loss
        else:
            found["ahead"] = found.get("ahead", 0.0) + DECAY ** (step - 1) * loss
            total += DECAY ** (step - 1)
    if total:
        found["ahead"] = found["ahead"] / total
    return found


@dataclass(frozen=True)
class Choices:
    """What the teacher says at some positions and after them, to measure drafts by.

    Attributes:
        at: ``[B, S]``, counted without token 0.
        chosen: ``[B, S, MEASURED]`` int64, its greedy next token at each position and at those
            right after it; -1 beyond the text.
        text: the same shape, the token that does come next; -1 beyond the text.
    """

    at: Tensor
    chosen: Tensor
    text: Tensor

    @classmethod
    def of(cls, teacher: Teacher, ids: Tensor, hidden: Tensor, at: Tensor) -> Choices:
        """Of a sequence's ``ids [B, T + 1]`` and ``hidden [B, T + 1, H]``."""
        place = at[..., None] + torch.arange(MEASURED, device=at.device)
        last = hidden.shape[1] - 2
        within = place.clamp(max=last).flatten(1)
        chosen = teacher.logits(rows_at(hidden[:, 1:], within)).argmax(-1).view(place.shape)
        text = F.pad(ids[:, 2:], (0, 1), value=-1).gather(1, within).view(place.shape)
        beyond = place > last
        return cls(at, chosen.masked_fill(beyond, -1), text.masked_fill(beyond, -1))

    def to(self, device: torch.device) -> Choices:
        return Choices(self.at.to(device), self.chosen.to(device), self.text.to(device))


def agreement(draft: DraftModel, pairs: Pairs, choices: Choices) -> tuple[Tensor, Tensor]:
    """``(agreed, asked)``, each ``[MEASURED]``: how many chains of drafts came to their n-th, and
    how many of those are the teacher's choice.

    A chain comes to its next draft if this one is the teacher's choice and the text's next token,
    so what it reads is what it drafted, as in an engine.
    """
    agreed, asked = [], []
    going = torch.ones_like(choices.at, dtype=torch.bool)
    for step, states in enumerate(states_ahead(draft, pairs, choices.at, MEASURED)):
        drafted = draft.lm_head(states).argmax(-1)
        if draft.draft_ids is not None:
            drafted = draft.draft_ids[drafted]
        chosen, text = choices.chosen[..., step], choices.text[..., step]
        going = going & (chosen >= 0)
        right = going & (drafted == chosen)
        asked.append(going.sum())
        agreed.append(right.sum())
        going = right & (text == chosen)
    return torch.stack(agreed), torch.stack(asked)


def accepted_drafts(agreed: Tensor, asked: Tensor) -> list[float]:
    """Tokens that greedy verification accepts on average of 1, 2, ... drafts, from ``agreement``'s
    counts: a draft is accepted if all up to it are (the product-limit estimate, since a text may
    leave the teacher's choices). vLLM's mean acceptance length is one more.
    """
    share = agreed.double() / asked.clamp(min=1)
    return share.cumprod(0).cumsum(0).tolist()
