"""What heads choose on texts that none was trained on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.heads.lockstep import states_of
from benchmarks.marks.inputs import KINDS, make_prompts
from specontext_vllm.distillation.head_model import HeadModel
from specontext_vllm.distillation.losses import AttentionTarget
from specontext_vllm.distillation.recall import RECENT_TOKENS, Recall, Seen, recall_of
from specontext_vllm.distillation.teacher import Teacher


@dataclass(frozen=True)
class Prompts:
    """Prompts of one kind and length, the same as `marks` asks.

    Attributes:
        ids: ``[N, T]``; the last ``forced`` tokens follow the prompt.
    """

    kind: str
    context: int
    forced: int
    ids: Tensor

    @property
    def watched(self) -> Tensor:
        """Positions ``[S]``, counted without token 0: in `copy` those of the copied tokens, in
        `text` as many at equal distances in the second half.
        """
        last = self.context - 2
        if self.kind == "copy":
            return torch.arange(last - self.forced + 1, last + 1)
        return torch.linspace(self.context // 2, last, self.forced).long()


def draw(
    model: Path, texts: Sequence[Path], contexts: Sequence[int], forced: int, count: int, seed: int
) -> list[Prompts]:
    """``count`` prompts of each kind and context.

    Raises:
        OptionError, PromptError, TeacherError, TextError: there are none.
    """
    return [
        Prompts(kind, context, forced, ids)
        for context in contexts
        for kind, ids in make_prompts(model, texts, KINDS, context, forced, count, seed).items()
    ]


@dataclass(frozen=True)
class Point:
    """What one head's choice holds of one prompt's attention, within a budget (tokens)."""

    variant: str
    kind: str
    context: int
    budget: int
    number: int
    recall: Recall


class HeldOut:
    """Prompts that the teacher sees once; see ``distillation.recall.HeldOut``.

    Args:
        teacher: watched for all layers that a head reads.
    """

    def __init__(self, teacher: Teacher, prompts: Sequence[Prompts]) -> None:
        self.layers, self._device = teacher.aux_layers, teacher.device
        self._seen = [
            (part, number, _see(teacher, part, number).to(torch.device("cpu")))
            for part in prompts
            for number in range(len(part.ids))
        ]

    @torch.no_grad()
    def measure(self, heads: Mapping[str, HeadModel], budgets: Sequence[int]) -> list[Point]:
        """Of each head, prompt and budget."""
        found = []
        for part, number, kept in self._seen:
            seen = kept.to(self._device)
            for name, head in heads.items():
                own = replace(seen, aux=states_of(seen.aux, self.layers, head.aux_layers))
                found += [
                    Point(name, part.kind, part.context, budget, number, recall)
                    for budget, recall in recall_of(head, own, budgets).items()
                ]
        return found


def _see(teacher: Teacher, prompts: Prompts, number: int) -> Seen:
    ids = prompts.ids[number : number + 1].to(teacher.device)
    at = prompts.watched[None].to(teacher.device)
    return Seen.of(teacher(ids, at, AttentionTarget(RECENT_TOKENS)), at)
