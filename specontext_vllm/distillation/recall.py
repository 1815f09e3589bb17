"""What is measured of a head while it trains: recall, how much of the teacher's attention is on the
pages that it chooses, and how many of a draft model's drafts the teacher takes.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields, replace
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from specontext_vllm.config import PAGE_SIZE, SpeContextConfig
from specontext_vllm.distillation.data import sample_positions
from specontext_vllm.distillation.draft import DraftModel
from specontext_vllm.distillation.losses import AttentionTarget, ByGroup
from specontext_vllm.distillation.steps_ahead import (
    Choices,
    Pairs,
    accepted_drafts,
    agreement,
)
from specontext_vllm.distillation.teacher import Lesson, Teacher
from specontext_vllm.retrieval.checkpoint import layer_groups
from specontext_vllm.retrieval.reference import (
    Budget,
    chosen_pages,
)

_SERVED = SpeContextConfig.model_construct()
RECENT_TOKENS = _SERVED.recent_tokens
DRAFTED = 128
"""Positions of a held-out sequence that drafts start from."""
MIN_BUDGET = PAGE_SIZE * (_SERVED.sink_pages + _SERVED.recent_pages + 1)
"""Tokens of sinks, recents and one page to choose."""


class Scores(Protocol):
    """A head that is measured."""

    def page_scores(self, embeds: Tensor, aux: Tensor, at: Tensor) -> Tensor:
        """See ``HeadModel.page_scores``."""


@dataclass(frozen=True)
class Recall:
    """Means over positions, KV heads and groups of layers, weighted by the teacher's mass there.

    Attributes:
        found: share of the teacher's attention beyond recent tokens that is on the chosen pages.
        best: the same for the best choice of as many pages.
        heaviest: how often the page with the teacher's largest weight is chosen. What is copied or
            looked up depends mostly on that page; shares also count what many layers attend to a
            little.
    """

    found: float
    best: float
    heaviest: float


def page_sums(target: Tensor) -> Tensor:
    """The teacher's weight on each page, ``[B, nkv, S, pages]`` of ``target [B, nkv, S, T]``."""
    return _pages(target).sum(-1)


def heaviest_pages(target: Tensor) -> Tensor:
    """Number of the page with the teacher's largest weight, ``[B, nkv, S]`` int64 of
    ``target [B, nkv, S, T]``.
    """
    return _pages(target).amax(-1).argmax(-1)


def _pages(weight: Tensor) -> Tensor:
    # Index 0 is token 1: with one more in front, pages are the engine's.
    return F.pad(weight, (1, -(weight.shape[-1] + 1) % PAGE_SIZE)).unflatten(-1, (-1, PAGE_SIZE))


def choose(scores: Tensor, at: Tensor, pages: int) -> Tensor:
    """The pages that the engine reads with a budget of ``pages`` and else its default settings, as
    booleans like ``scores [B, nkv, S, pages]``; ``at [B, S]`` as in ``head_scores``.
    """
    counts = (at + 1) // PAGE_SIZE + 1
    return chosen_pages(scores, counts[:, None, :, None], replace(Budget.of(_SERVED), total=pages))


@dataclass(frozen=True)
class Seen:
    """What recall needs of a batch that the teacher has seen.

    Attributes:
        embeds: ``[B, T, H]`` of the tokens.
        aux: ``[B, T, num_aux * H]``, the head's input.
        at: ``[B, S]`` positions that were watched, among tokens 1 to T.
        sums: ``[B, G * nkv, S, pages]``, the teacher's weight on each page, of one group of layers
            after the other.
        heaviest: ``[B, G * nkv, S]``, of ``heaviest_pages``.
        mass: ``[B, G * nkv, S]``, of its attention beyond the recent tokens.
    """

    embeds: Tensor
    aux: Tensor
    at: Tensor
    sums: Tensor
    heaviest: Tensor
    mass: Tensor

    @classmethod
    def of(cls, lesson: Lesson, at: Tensor) -> Seen:
        return cls(
            lesson.embeds,
            lesson.aux,
            at,
            page_sums(lesson.target),
            heaviest_pages(lesson.target),
            lesson.mass,
        )

    def to(self, device: torch.device) -> Seen:
        return Seen(*(getattr(self, field.name).to(device) for field in fields(self)))


def recall_target(num_layers: int, groups: int) -> ByGroup:
    """What recall watches the teacher with, of a head with so many groups of layers."""
    return ByGroup(layer_groups(num_layers, groups), lambda: AttentionTarget(RECENT_TOKENS))


def recall_of(head: Scores, seen: Seen, budgets: Sequence[int]) -> dict[int, Recall]:
    """Recall at each budget (tokens), weighted by the teacher's mass."""
    at, sums = seen.at, seen.sums
    with _autocast(seen.aux):
        scores = head.page_scores(seen.embeds, seen.aux, at)
    weight = seen.mass / seen.mass.sum().clamp(min=1e-9)

    def recall(budget: int) -> Recall:
        chosen, best = (choose(by, at, budget // PAGE_SIZE) for by in (scores, sums))
        heaviest = chosen.gather(-1, seen.heaviest[..., None]).squeeze(-1)
        return Recall(
            *(
                float((part * weight).sum())
                for part in ((sums * chosen).sum(-1), (sums * best).sum(-1), heaviest)
            )
        )

    return {budget: recall(budget) for budget in budgets}


def _autocast(states: Tensor) -> torch.autocast:
    """In the teacher's own precision."""
    return torch.autocast(
        states.device.type, torch.bfloat16, enabled=states.dtype == torch.bfloat16
    )


class HeldOut:
    """Held-out batches that recall is measured on repeatedly; the teacher sees each of them once.

    The embeddings and auxiliary states of every token stay in host memory, ``B * T * (1 + num_aux)
    * H`` values in the teacher's dtype: 1 GiB for 32,768 tokens of an 8B model in bfloat16, 4 GiB
    for the four sequences of a run. One batch at a time is on the device.

    Args:
        batches: ``(ids [B, T], weights [B, T])``, read by ``prepare``.
        budget: tokens, fewer than T; recall is measured at positions after it.
        positions: how many of a sequence, those before answers first. The newest ``recent_tokens``
            of the context do not count, since every selection has them.
        groups: of the head that is measured.
        drafts: keep the teacher's choices, for ``accepted``.
    """

    def __init__(
        self,
        teacher: Teacher,
        batches: Iterable[tuple[Tensor, Tensor]],
        budget: int,
        positions: int,
        groups: int = 1,
        drafts: bool = False,
    ) -> None:
        self.teacher, self.batches = teacher, batches
        self.budget, self.positions, self.groups = budget, positions, groups
        self.drafts = drafts
        self._seen: list[Seen] | None = None
        self._choices: list[Choices] = []

    @torch.no_grad()
    def prepare(self) -> None:
        """Let the teacher see the batches, if it has not."""
        if self._seen is None:
            self._seen = [
                self._see(number, *batch).to(torch.device("cpu"))
                for number, batch in enumerate(self.batches)
            ]

    @torch.no_grad()
    def recall(self, head: Scores) -> Recall:
        """Mean recall over the batches."""
        self.prepare()
        assert self._seen is not None
        rows = [
            recall_of(head, seen.to(self.teacher.device), [self.budget])[self.budget]
            for seen in self._seen
        ]
        return Recall(
            *(sum(getattr(row, field.name) for row in rows) / len(rows) for field in fields(Recall))
        )

    @torch.no_grad()
    def accepted(self, draft: DraftModel) -> list[float]:
        """``accepted_drafts`` over the batches."""
        self.prepare()
        assert self._seen is not None
        counts = []
        for seen, choices in zip(self._seen, self._choices, strict=True):
            embeds, aux = (t.to(self.teacher.device) for t in (seen.embeds, seen.aux))
            with _autocast(aux):
                pairs = Pairs.of(draft, embeds, aux)
                counts.append(agreement(draft, pairs, choices.to(self.teacher.device)))
        agreed, asked = (torch.stack(column).sum(0) for column in zip(*counts, strict=True))
        return accepted_drafts(agreed, asked)

    def _see(self, number: int, ids: Tensor, weights: Tensor) -> Seen:
        ids, weights = ids.to(self.teacher.device), weights.to(self.teacher.device)
        generator = torch.Generator(device=ids.device).manual_seed(number)
        at, _ = sample_positions(weights[:, 1:], self.positions, generator, first=self.budget)
        target = recall_target(len(self.teacher.watched), self.groups)
        lesson = self.teacher(ids, at, target)
        if self.drafts:
            starts, _ = sample_positions(weights[:, 1:], DRAFTED, generator, first=self.budget)
            choices = Choices.of(self.teacher, ids, lesson.hidden, starts)
            self._choices.append(choices.to(torch.device("cpu")))
        return Seen.of(lesson, at)
