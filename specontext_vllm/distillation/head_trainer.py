"""The training of a head for retrieval alone."""

from __future__ import annotations

import torch
from torch import Tensor

from specontext_vllm.config import PAGE_SIZE
from specontext_vllm.distillation.data import sample_positions
from specontext_vllm.distillation.head_model import HeadModel
from specontext_vllm.distillation.losses import ByGroup
from specontext_vllm.distillation.page_loss import PageTarget, page_loss
from specontext_vllm.distillation.recall import MIN_BUDGET, choose
from specontext_vllm.distillation.rows import rows_at
from specontext_vllm.distillation.teacher import Lesson
from specontext_vllm.distillation.trainer import Distiller
from specontext_vllm.retrieval.checkpoint import layer_groups


class HeadDistiller(Distiller[HeadModel]):
    """One head in training, which learns which pages the teacher reads.

    It learns at sampled positions, and at a stretch of tokens that the teacher has run twice: for
    the target with all pages, and once more with only those that the head chose. The second run
    gives the states that the head will have in serving, where what it has not chosen is missing
    from them.
    """

    def make_optimizers(self) -> list[torch.optim.Optimizer]:
        """Muon for matrices, which here needs about half of AdamW's steps
        (docs/results/distillation.md), AdamW for norms.
        """
        rate, parameters = self.settings.learning_rate, list(self.head.parameters())
        return [
            torch.optim.Muon(
                [p for p in parameters if p.dim() == 2],
                lr=rate,
                weight_decay=0.0,
                adjust_lr_fn="match_rms_adamw",
            ),
            torch.optim.AdamW(
                [p for p in parameters if p.dim() < 2], lr=rate, betas=(0.9, 0.95), weight_decay=0.0
            ),
        ]

    def step(self, ids: Tensor, weights: Tensor) -> dict[str, float]:
        """Train on one batch ``ids [B, T]``, ``weights [B, T]``, and return its losses."""
        settings, generator = self.settings, self.generator(ids.device)
        at, _ = sample_positions(weights[:, 1:], settings.positions, generator, answers_only=False)
        stretch = stretch_positions(ids, settings.stretch, generator)
        target = ByGroup(
            layer_groups(len(self.teacher.watched), self.head.groups),
            lambda: PageTarget(settings.recents),
        )
        if stretch is None:
            return self.learn(self.teacher(ids, at, target), at, weights, generator)
        at = torch.cat([at, stretch], 1)
        lesson = self.teacher(ids, at, target, keep_cache=True)
        chosen = self.stretch_pages(lesson, stretch, generator)
        states = self.teacher.decode(ids, lesson.cache, int(stretch[0, 0]) + 1, chosen)
        return self.learn(lesson, at, weights, generator, states=states)

    def losses(
        self,
        lesson: Lesson,
        at: Tensor,
        weights: Tensor,
        generator: torch.Generator,
        **rest: Tensor,
    ) -> dict[str, Tensor]:
        """The loss of a batch. With ``states [B, stretch, num_aux * Ht]``, of the second run, the
        last positions are the stretch.

        No tensor is ``T x T``: attention weights are computed for the sampled positions only.
        """
        settings = self.settings
        with self.accelerator.autocast():
            previous = self.previous_features(lesson, at, rest.get("states"))
            scores = self.head.page_scores(lesson.embeds, lesson.aux, at, previous)
        return {
            "page": page_loss(
                scores, lesson.target, lesson.mass, at, settings.recents, settings.sharp
            )
        }

    def previous_features(self, lesson: Lesson, at: Tensor, states: Tensor | None) -> Tensor | None:
        """Features ``[B, S, H]`` of the tokens before those at ``at``, in the stretch those of the
        second run's ``states``; None without these.
        """
        if states is None:
            return None
        # The token before the stretch is dense.
        dense = rows_at(lesson.aux, at[:, : 1 - states.shape[1]])
        return self.head.fuse(torch.cat([dense, states[:, :-1]], 1))

    @torch.no_grad()
    def stretch_pages(self, lesson: Lesson, stretch: Tensor, generator: torch.Generator) -> Tensor:
        """The pages that the head chooses at the positions ``stretch [B, Q]``, within a budget of
        ``stretch_halvings``: ``[B, G * nkv, Q, pages up to there]`` bool.
        """
        least, most = self.settings.stretch_halvings
        halvings = torch.randint(
            least, most + 1, (1,), generator=generator, device=generator.device
        )
        budget = max(MIN_BUDGET, lesson.embeds.shape[1] >> int(halvings))
        end = int(stretch[0, -1]) + 2
        with self.accelerator.autocast():
            scores = self.head.page_scores(lesson.embeds[:, :end], lesson.aux[:, :end], stretch)
        return choose(scores, stretch, budget // PAGE_SIZE)


def stretch_positions(ids: Tensor, count: int, generator: torch.Generator) -> Tensor | None:
    """Positions ``[B, count]`` side by side, the same in all sequences of ``ids [B, T]``; None
    where they are too short for a choice.
    """
    length = ids.shape[1]
    earliest = max(length // 4, MIN_BUDGET)
    if not count or earliest + count >= length:
        return None
    first = int(
        torch.randint(earliest, length - count, (1,), generator=generator, device=generator.device)
    )
    return (first - 1 + torch.arange(count, device=ids.device)).expand(ids.shape[0], -1)
