"""Other ways of training a head than `specontext distill`'s."""

from __future__ import annotations

import torch
from torch import Tensor

from specontext_vllm.distillation.head_trainer import HeadDistiller
from specontext_vllm.distillation.losses import alignment_loss
from specontext_vllm.distillation.rows import rows_at
from specontext_vllm.distillation.teacher import Lesson


class AdamWHead(HeadDistiller):
    """AdamW for all parameters."""

    def make_optimizers(self) -> list[torch.optim.Optimizer]:
        """See ``Distiller``."""
        return [
            torch.optim.AdamW(
                self.head.parameters(),
                lr=self.settings.learning_rate,
                betas=(0.9, 0.95),
                weight_decay=0.0,
            )
        ]


class AlignedHead(HeadDistiller):
    """The alignment loss of EAGLE-3 draft models: tokens, not pages; a lesson's target is an
    ``AttentionTarget``'s.
    """

    def losses(
        self,
        lesson: Lesson,
        at: Tensor,
        weights: Tensor,
        generator: torch.Generator,
        **rest: Tensor,
    ) -> dict[str, Tensor]:
        """See ``HeadDistiller``."""
        settings, head = self.settings, self.head
        with self.accelerator.autocast():
            features = head.fuse(lesson.aux)
            states = rest.get("states")
            previous = self.previous_features(lesson, at, states)
            previous = rows_at(features, at) if previous is None else previous
            place = at + 1
            queries = head.queries(rows_at(lesson.embeds, place), previous, place)
            keys = head.keys(lesson.embeds, features)[:, :, 1:]
        total = at.new_zeros((), dtype=torch.float32)
        # A position may be among the sampled ones and in the stretch, with another query.
        stretch = 0 if states is None else states.shape[1]
        for part in (slice(0, at.shape[1] - stretch), slice(at.shape[1] - stretch, at.shape[1])):
            here = at[:, part]
            if not here.shape[1]:
                continue
            whole = queries.new_zeros(*queries.shape[:2], keys.shape[2], queries.shape[3])
            index = here[:, None, :, None].expand(-1, queries.shape[1], -1, queries.shape[3])
            whole = whole.scatter(2, index, queries[:, :, part])
            loss = alignment_loss(
                whole,
                keys,
                here,
                lesson.target[:, :, part],
                lesson.mass[:, :, part],
                settings.window,
                settings.align_sharpness,
                settings.align_each_token,
            )
            total = total + loss * here.shape[1] / at.shape[1]
        return {"align": total}
