"""Shape of a head that is trained for retrieval alone."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from specontext_vllm.distillation.shape import DraftShape, aux_layers_for
from specontext_vllm.retrieval.checkpoint import HeadSpec

MIN_HEAD_DIM = 128
"""Half of D matches by content and half by distance as well; with 64 in all, one of the two suffers
(docs/results/distillation.md).
"""
MAX_WIDTH = 2048
AUX_LAYERS = 5


def spread_layers(num_layers: int) -> tuple[int, ...]:
    """Five layers from the third to the third last; fewer where there are not as many.

    Raises:
        HeadError: a model of fewer than five layers.
    """
    first, last = 2, num_layers - 3
    if last - first < AUX_LAYERS:
        return aux_layers_for(num_layers)
    return tuple(round(first + i * (last - first) / (AUX_LAYERS - 1)) for i in range(AUX_LAYERS))


@dataclass(frozen=True)
class HeadShape:
    """Widths of a head in the format of our own; KV heads, query heads and RoPE base are the
    target's.

    Attributes:
        target_hidden: width of the target's hidden states and of its embedding.
        hidden: H, width of the fused feature.
        heads, kv_heads, head_dim: nh, nkv, D; query heads of each group of layers.
        mlp: inner width of the gated MLPs beside the projections of queries and keys; 0: none.
        rotary_share: share of D that RoPE turns.
        own_states: keys are made from the token's own hidden states, besides those of the token
            before.
        vocabulary: tokens of the target.
        max_position: positions it is trained for.
        aux_layers: target layers whose input states it reads.
        groups: G, groups of layers that each have a selection of their own.
    """

    target_hidden: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    mlp: int
    rotary_share: float
    own_states: bool
    vocabulary: int
    rope_theta: float
    eps: float
    max_position: int
    aux_layers: tuple[int, ...]
    groups: int = 1

    @classmethod
    def for_target(cls, config: Any, *, max_position: int, groups: int = 1) -> HeadShape:
        """The shape of a new head.

        Args:
            config: the target's transformers config.
            max_position: longest sequence it will be trained on.
            groups: of layers, each with a selection of its own.
        """
        target = DraftShape.for_target(config, max_position=max_position)
        # The largest power of two that is no wider than the target.
        hidden = min(MAX_WIDTH, 1 << (target.hidden.bit_length() - 1))
        return cls(
            target_hidden=target.hidden,
            hidden=hidden,
            heads=target.heads,
            kv_heads=target.kv_heads,
            head_dim=max(MIN_HEAD_DIM, target.head_dim),
            mlp=hidden * 3 // 8,
            rotary_share=0.5,
            own_states=True,
            vocabulary=target.vocabulary,
            rope_theta=target.rope_theta,
            eps=target.eps,
            max_position=max_position,
            aux_layers=spread_layers(config.num_hidden_layers),
            groups=groups,
        )

    def head_spec(self) -> HeadSpec:
        """The retrieval head of this shape, as read from its checkpoint."""
        return HeadSpec(
            format="specontext",
            hidden_size=self.hidden,
            target_hidden_size=self.target_hidden,
            embed_size=self.target_hidden,
            num_heads=self.heads * self.groups,
            num_kv_heads=self.kv_heads,
            head_dim=self.head_dim,
            rms_norm_eps=self.eps,
            rope_theta=self.rope_theta,
            rope_scaling=None,
            trained_length=self.max_position,
            aux_layer_ids=self.aux_layers,
            num_aux=len(self.aux_layers),
            norm_before_fc=False,
            fc_norm=True,
            qk_norm=False,
            dtype=torch.bfloat16,
            target_vocab_size=self.vocabulary,
            key_states="own" if self.own_states else "previous",
            q_mlp=self.mlp,
            k_mlp=self.mlp,
            partial_rotary_factor=self.rotary_share,
            layer_groups=self.groups,
        )
