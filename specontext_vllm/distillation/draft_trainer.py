"""The training of a whole EAGLE-3 draft model."""

from __future__ import annotations

import torch
from torch import Tensor

from specontext_vllm.distillation.data import sample_positions
from specontext_vllm.distillation.draft import DraftModel
from specontext_vllm.distillation.losses import AttentionTarget, alignment_loss, draft_loss
from specontext_vllm.distillation.rows import rows_at
from specontext_vllm.distillation.teacher import Lesson
from specontext_vllm.distillation.trainer import Distiller


class DraftDistiller(Distiller[DraftModel]):
    """One draft model in training."""

    def step(self, ids: Tensor, weights: Tensor) -> dict[str, float]:
        """Train on one batch ``ids [B, T]``, ``weights [B, T]``, and return its losses."""
        settings, generator = self.settings, self.generator(ids.device)
        at, _ = sample_positions(weights[:, 1:], settings.align_positions, generator)
        return self.learn(
            self.teacher(ids, at, AttentionTarget(settings.window, settings.over_layers)),
            at,
            weights,
            generator,
        )

    def losses(
        self,
        lesson: Lesson,
        at: Tensor,
        weights: Tensor,
        generator: torch.Generator,
        **rest: Tensor,
    ) -> dict[str, Tensor]:
        """The losses of a batch.

        No tensor here or in the teacher is ``T x T`` or ``T x vocabulary``: attention weights are
        computed for ``align_positions`` only, logits and the draft layer's MLP for
        ``draft_positions``; the rest is flash attention. docs/results/distillation.md adds up the
        memory.
        """
        settings, draft = self.settings, self.head
        with self.accelerator.autocast():
            # The pair (token p+1, states p) stands at p+1; token 0 has none.
            positions = torch.arange(1, weights.shape[1], device=weights.device)
            fused, q, k, inputs = draft.queries_keys(
                lesson.embeds[:, 1:], lesson.aux[:, :-1], positions
            )
            found: dict[str, Tensor] = {}
            if settings.loss != "align":
                drafted, weight = sample_positions(
                    weights[:, 1:], settings.draft_positions, generator
                )
                logits = draft.lm_head(draft.states(fused, q, k, inputs, drafted))
                found["draft"] = draft_loss(
                    logits,
                    self.teacher.logits(rows_at(lesson.hidden[:, 1:], drafted), draft.draft_ids),
                    weight,
                )
        if settings.loss != "draft":
            # Outside autocast, which would round its logits.
            how = (settings.window, settings.align_sharpness, settings.align_each_token)
            found["align"] = alignment_loss(q, k, at, lesson.target, lesson.mass, *how)
        return found
