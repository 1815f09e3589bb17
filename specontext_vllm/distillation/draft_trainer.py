"""The training of a whole EAGLE-3 draft model."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from specontext_vllm.distillation.data import sample_positions
from specontext_vllm.distillation.draft import RETRIEVAL, DraftModel
from specontext_vllm.distillation.losses import AttentionTarget, alignment_loss
from specontext_vllm.distillation.steps_ahead import Pairs, draft_losses
from specontext_vllm.distillation.teacher import Lesson
from specontext_vllm.distillation.trainer import Distiller


class DraftDistiller(Distiller[DraftModel]):
    """One draft model in training."""

    def make_optimizers(self) -> list[torch.optim.Optimizer]:
        """See ``Distiller``; a frozen part gets neither gradients nor moments."""
        for name, parameter in self.head.named_parameters():
            parameter.requires_grad_(not self.settings.freeze_retrieval or name not in RETRIEVAL)
        return super().make_optimizers()

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
        computed for ``align_positions`` only, the draft layer's attention, MLP and logits for
        ``draft_positions``, in fused kernels. docs/results/distillation.md adds up the memory.
        """
        settings, draft = self.settings, self.head
        with self.accelerator.autocast():
            pairs = Pairs.of(draft, lesson.embeds, lesson.aux)
            found: dict[str, Tensor] = {}
            if settings.loss != "align":
                drafted, _ = sample_positions(weights[:, 1:], settings.draft_positions, generator)
                how = (settings.steps_ahead, settings.chain_positions)
                logits_of = partial(self.teacher.logits, ids=draft.draft_ids)
                found = draft_losses(draft, pairs, drafted, weights, lesson.hidden, logits_of, *how)
        if settings.loss != "draft":
            # Outside autocast, which would round its logits.
            aligned = (settings.window, settings.align_sharpness, settings.align_each_token)
            found["align"] = alignment_loss(
                pairs.q, pairs.k, at, lesson.target, lesson.mass, *aligned
            )
        return found
