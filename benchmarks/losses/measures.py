"""What a trained head is measured on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from benchmarks.intervals import bootstrap
from benchmarks.losses.variants import BUDGETS, Target, collectors_of, lessons_of
from benchmarks.questions import answer, questions
from specontext_vllm.demo.decoder import Decoder
from specontext_vllm.distillation.data import sample_positions
from specontext_vllm.distillation.draft import DraftModel
from specontext_vllm.distillation.recall import RECENT_TOKENS, Recall
from specontext_vllm.distillation.rows import rows_at
from specontext_vllm.distillation.steps_ahead import Pairs, states_ahead
from specontext_vllm.distillation.teacher import (
    Lesson,
    Teacher,
)

NEEDLES = 80
ASKED = 64


@dataclass(frozen=True)
class SeenSequence:
    """A held-out sequence that the teacher has seen: where it was watched, and the lesson by how
    the layers are put together.
    """

    at: Tensor
    lessons: dict[str, Lesson]

    @classmethod
    def seen(cls, teacher: Teacher, ids: Tensor, weights: Tensor, seed: int) -> SeenSequence:
        ids, weights = ids.to(teacher.device), weights.to(teacher.device)
        at, _ = sample_positions(
            weights[:, 1:],
            ASKED,
            torch.Generator(device=ids.device).manual_seed(seed),
            first=max(BUDGETS),
        )
        collectors = collectors_of(
            [Target.of(RECENT_TOKENS, over, "all", len(teacher.layers)) for over in ("max", "mean")]
        )
        return cls(
            at,
            {
                target.over_layers: lesson
                for target, lesson in lessons_of(teacher(ids, at, collectors), collectors).items()
            },
        )


@torch.no_grad()
def agreement(teacher: Teacher, draft: DraftModel, held_out: Sequence[SeenSequence]) -> float:
    """Share of the held-out positions at which the draft's first choice is the teacher's."""
    right = []
    for sequence in held_out:
        lesson, at = sequence.lessons["max"], sequence.at
        pairs = Pairs.of(draft, lesson.embeds, lesson.aux)
        drafted = draft.lm_head(next(states_ahead(draft, pairs, at, 1))).argmax(-1)
        first = drafted if draft.draft_ids is None else draft.draft_ids[drafted]
        right.append(
            (first == teacher.logits(rows_at(lesson.hidden[:, 1:], at)).argmax(-1)).float().mean()
        )
    return float(torch.stack(right).mean())


def needle_scores(model: Any, draft: DraftModel, tokenizer: Any, tokens: int) -> list[float]:
    """Scores of held-out needle questions, decoded in plain torch with the head's pages."""
    decoder = Decoder(model, draft)
    return [
        answer(decoder, tokenizer, problem, decoder.prefill(prompt), "dlm", BUDGETS[0])
        for problem, prompt in questions(tokenizer, tokens, NEEDLES)
    ]


def make_row(
    name: str, recalls: dict[str, list[dict[int, Recall]]], base: dict[str, list[dict[int, Recall]]]
) -> dict[str, Any]:
    """Recalls under each measure (`max`, `mean` over layers), and their paired differences from the
    first variant's.
    """
    row: dict[str, Any] = {"name": name}
    measures = {f"max_{budget}": ("max", budget, "found") for budget in BUDGETS}
    measures |= {
        f"mean_{BUDGETS[0]}": ("mean", BUDGETS[0], "found"),
        "heaviest": ("max", BUDGETS[0], "heaviest"),
    }
    for key, (measure, budget, figure) in measures.items():
        mine, theirs = (
            [getattr(sequence[budget], figure) for sequence in found[measure]]
            for found in (recalls, base)
        )
        row[key] = sum(mine) / len(mine)
        if recalls is not base:
            low, high = bootstrap([a - b for a, b in zip(mine, theirs, strict=True)])
            row[f"{key}_difference"] = f"{low:+.3f} to {high:+.3f}"
    return row
