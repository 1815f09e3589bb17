"""A head that is trained for retrieval alone, in the format of our own."""

from __future__ import annotations

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from specontext_vllm.config import PAGE_SIZE
from specontext_vllm.distillation.head_shape import HeadShape
from specontext_vllm.distillation.llama import gated_mlp, linear, rms_norm, split_heads
from specontext_vllm.distillation.rows import rows_at
from specontext_vllm.retrieval.checkpoint import HeadError, read_checkpoint, save_head
from specontext_vllm.retrieval.reference import grouped_logits, page_scores, reduce_to_pages
from specontext_vllm.retrieval.rope import rope_table, rotate_halves

OUT_OF_SIGHT = -1e30
"""Logit of a token that takes no part; finite, so that gradients are."""


class Norm(nn.Module):
    """RMSNorm.

    Args:
        width: of what is normalised.
    """

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(width)), eps

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.weight.to(x.dtype), self.eps)


class Projection(nn.Module):
    """A linear projection, and a gated MLP beside it.

    Args:
        width: values that it reads. inner: of the MLP; 0 for none.
    """

    def __init__(self, width: int, rows: int, inner: int) -> None:
        super().__init__()
        self.proj = linear(width, rows)
        self.mlp = GatedMLP(width, rows, inner) if inner else None

    def forward(self, x: Tensor) -> Tensor:
        y = self.proj(x)
        return y if self.mlp is None else y + self.mlp(x)


class GatedMLP(nn.Module):
    """Llama's MLP, which adds nothing at first; arguments as of ``Projection``."""

    def __init__(self, width: int, rows: int, inner: int) -> None:
        super().__init__()
        self.gate_proj, self.up_proj = linear(width, inner), linear(width, inner)
        self.down_proj = linear(inner, rows)
        nn.init.zeros_(self.down_proj.weight)

    def forward(self, x: Tensor) -> Tensor:
        return gated_mlp(x, self.gate_proj, self.up_proj, self.down_proj)


class HeadModel(nn.Module):
    """The head of ``retrieval/head.py`` in a form that can be trained.

    B sequences of T tokens, whose first one has no key; S positions among the others, counted
    without it, as everywhere in distillation.
    """

    def __init__(self, shape: HeadShape) -> None:
        super().__init__()
        self.shape = shape
        spec = shape.head_spec()
        self.fc = linear(len(shape.aux_layers) * shape.target_hidden, shape.hidden)
        self.fc_norm = nn.ModuleList(Norm(shape.target_hidden, shape.eps) for _ in shape.aux_layers)
        self.embed_norm = Norm(shape.target_hidden, shape.eps)
        self.feature_norm = Norm(shape.hidden, shape.eps)
        self.q = Projection(spec.query_width, spec.num_heads * shape.head_dim, shape.mlp)
        self.k = Projection(spec.key_width, shape.kv_heads * shape.head_dim, shape.mlp)
        self.rope: Tensor
        self.register_buffer("rope", rope_table(spec, shape.max_position, "cpu"), persistent=False)

    @property
    def aux_layers(self) -> tuple[int, ...]:
        """Target layers whose input states it reads."""
        return self.shape.aux_layers

    @property
    def groups(self) -> int:
        """Groups of layers that each have a selection of their own."""
        return self.shape.groups

    def fuse(self, aux: Tensor) -> Tensor:
        """Features ``[B, T, H]`` of auxiliary states ``[B, T, num_aux * Ht]``."""
        parts = aux.chunk(len(self.shape.aux_layers), -1)
        normed = [norm(part) for norm, part in zip(self.fc_norm, parts, strict=True)]
        return self.fc(torch.cat(normed, -1))

    def queries(self, embeds: Tensor, previous: Tensor, positions: Tensor) -> Tensor:
        """``[B, nh * G, S, D]``, rotated; the heads in the order of ``HeadSpec``.

        Args:
            embeds: ``[B, S, Ht]`` of the tokens.
            previous: ``[B, S, H]`` features of the tokens before them.
            positions: ``[B, S]`` of the tokens in their sequences.
        """
        x = torch.cat([self.embed_norm(embeds), self.feature_norm(previous)], -1)
        return self._rotate(self.q(x), positions)

    def keys(self, embeds: Tensor, features: Tensor) -> Tensor:
        """``[B, nkv, T, D]``, rotated, of whole sequences.

        Args:
            embeds: ``[B, T, Ht]``. features: ``[B, T, H]`` of the same tokens.
        """
        normed = self.feature_norm(features)
        parts = [self.embed_norm(embeds), before(normed)]
        if self.shape.own_states:
            parts.append(normed)
        positions = torch.arange(embeds.shape[1], device=embeds.device)
        return self._rotate(self.k(torch.cat(parts, -1)), positions[None])

    def page_scores(
        self, embeds: Tensor, aux: Tensor, at: Tensor, previous: Tensor | None = None
    ) -> Tensor:
        """Scores of the engine's pages, logarithms ``[B, G * nkv, S, pages]``, one group of layers
        after the other; pages that are newer than the token are among them.

        Args:
            embeds: ``[B, T, Ht]`` of all tokens. aux: ``[B, T, num_aux * Ht]``.
            at: ``[B, S]``.
            previous: ``[B, S, H]`` features of the tokens before those at ``at``, if they are
                others than those of ``aux``.
        """
        place = at + 1
        features = self.fuse(aux)
        if previous is None:
            previous = rows_at(features, at)
        q = self.queries(rows_at(embeds, place), previous, place)
        k = self.keys(embeds, features)
        with torch.autocast(at.device.type, enabled=False):
            logits = grouped_logits(q, k)
            step = torch.arange(k.shape[2], device=at.device)
            # A key of own states is made after the step that first needs it.
            newest = place - 1 if self.shape.own_states else place
            hidden = (step > newest[:, None, :, None, None]) | (step == 0)
            logits = logits.masked_fill(hidden, OUT_OF_SIGHT)
            missing = -logits.shape[-1] % PAGE_SIZE
            logits = F.pad(logits, (0, missing), value=OUT_OF_SIGHT)
            by_group = logits.unflatten(-2, (self.groups, -1))
            scores = page_scores(*reduce_to_pages(by_group, PAGE_SIZE))[0]
            return scores.movedim(-2, 1).flatten(1, 2)

    def tensors(self) -> dict[str, Tensor]:
        """Weights under the canonical names of ``HeadCheckpoint``."""
        return {_canonical(name): tensor for name, tensor in self.state_dict().items()}

    def save(self, folder: Path) -> None:
        """Write the head that an engine reads, weights in bfloat16."""
        save_head(folder, self.shape.head_spec(), self.tensors())

    @classmethod
    def load(cls, folder: Path, shape: HeadShape) -> HeadModel:
        """A saved head to train further.

        Raises:
            HeadError: it cannot be read, or has another shape.
        """
        checkpoint = read_checkpoint(folder)
        model = cls(shape)
        names = {_canonical(name): name for name in model.state_dict()}
        found = {name: tuple(t.shape) for name, t in checkpoint.tensors.items()}
        wanted = {name: tuple(t.shape) for name, t in model.tensors().items()}
        spec = checkpoint.spec
        if (found, spec.aux_layer_ids, spec.layer_groups) != (
            wanted,
            shape.aux_layers,
            shape.groups,
        ):
            differing = sorted(
                name for name in found | wanted if found.get(name) != wanted.get(name)
            )
            raise HeadError(
                f"--init {folder}: it has another shape than a new head for this model "
                f"({differing[0] if differing else 'aux_layer_ids'} for one); start without --init."
            )
        model.load_state_dict({names[n]: t.float() for n, t in checkpoint.tensors.items()})
        return model

    def _rotate(self, x: Tensor, positions: Tensor) -> Tensor:
        x = split_heads(x, self.shape.head_dim)
        cos, sin = self.rope[positions][:, None].chunk(2, -1)
        return rotate_halves(x.float(), cos, sin)


def before(x: Tensor) -> Tensor:
    """``x [B, T, H]`` of the token before each; zeros before the first."""
    return F.pad(x, (0, 0, 1, 0))[:, :-1]


def _canonical(name: str) -> str:
    """``q.proj.weight`` -> ``q_proj.weight``, ``q.mlp.up_proj.weight`` -> ``q_mlp.up_proj.weight``;
    the other names are alike.
    """
    side, dot, rest = name.partition(".")
    return f"{side}_{rest}" if side in ("q", "k") else f"{side}{dot}{rest}"
