"""What heads choose on texts that none was trained on."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.collectors import Collectors
from benchmarks.heads.lockstep import states_of
from benchmarks.marks.inputs import KINDS, make_prompts
from specontext_vllm.distillation.head_model import HeadModel
from specontext_vllm.distillation.recall import Recall, Seen, recall_of, recall_target
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
        groups: of layers, the numbers of them that heads have.
    """

    def __init__(
        self, teacher: Teacher, prompts: Sequence[Prompts], groups: Iterable[int] = (1,)
    ) -> None:
        self.layers, self._device = teacher.aux_layers, teacher.device
        counts = sorted(set(groups))
        self._seen = [
            (part, number, _see(teacher, part, number, counts))
            for part in prompts
            for number in range(len(part.ids))
        ]

    @torch.no_grad()
    def measure(self, heads: Mapping[str, HeadModel], budgets: Sequence[int]) -> list[Point]:
        """Of each head, prompt and budget."""
        found = []
        for part, number, kept in self._seen:
            first = next(iter(kept.values())).to(self._device)
            seen = {
                groups: replace(own.to(self._device), embeds=first.embeds, aux=first.aux)
                for groups, own in kept.items()
            }
            for name, head in heads.items():
                own = replace(
                    seen[head.groups], aux=states_of(first.aux, self.layers, head.aux_layers)
                )
                found += [
                    Point(name, part.kind, part.context, budget, number, recall)
                    for budget, recall in recall_of(head, own, budgets).items()
                ]
        return found


def _see(teacher: Teacher, prompts: Prompts, number: int, counts: Sequence[int]) -> dict[int, Seen]:
    """What was seen, on the CPU, by the number of groups of layers; the states are the first one's
    alone.
    """
    ids = prompts.ids[number : number + 1].to(teacher.device)
    at = prompts.watched[None].to(teacher.device)
    layers = len(teacher.layers)
    collectors = Collectors({groups: recall_target(layers, groups) for groups in counts})
    lesson = teacher(ids, at, collectors)
    found: dict[int, Seen] = {}
    for groups, (target, mass) in collectors.results().items():
        seen = Seen.of(replace(lesson, target=target, mass=mass), at)
        if found:
            seen = replace(seen, embeds=lesson.embeds[:, :0], aux=lesson.aux[:, :0])
        found[groups] = seen.to(torch.device("cpu"))
    return found
