"""Shape of a draft model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from specontext_vllm.retrieval.checkpoint import HeadError, HeadSpec, default_aux_layers


def aux_layers_for(num_layers: int) -> tuple[int, ...]:
    """EAGLE-3's auxiliary layers, or (1, L // 2, L - 2) for a target too shallow for its rule.

    Raises:
        HeadError: fewer than five layers.
    """
    if num_layers < 5:
        raise HeadError(
            f"--model: it has {num_layers} layers, and a head reads the states of three in the "
            "middle; give a model with five or more."
        )
    return (
        default_aux_layers(num_layers) if num_layers > 6 else (1, num_layers // 2, num_layers - 2)
    )


def norm_eps(config: Any) -> float:
    """Epsilon of a target's RMSNorms; 0: it has none."""
    name = (
        "layer_norm_epsilon"
        if getattr(config, "model_type", None) == "nemotron_h"
        else "rms_norm_eps"
    )
    return getattr(config, name, 0.0)


def ffn_size(config: Any) -> int:
    """Inner width of a target's MLPs, or of as many experts as a token has; 0: it names none."""
    if (width := getattr(config, "intermediate_size", None)) is not None:
        return width
    width = getattr(config, "moe_intermediate_size", None)
    return 0 if width is None else width * config.num_experts_per_tok


@dataclass(frozen=True)
class DraftShape:
    """Shape and settings of a draft model: everything in its ``config.json``.

    Attributes:
        hidden: H, width of the target's hidden states and of the draft layer.
        heads, kv_heads, head_dim: of the layer's attention; KV heads are the target's.
        ffn: inner width of the MLP.
        vocabulary, draft_vocabulary: the target's tokens, and those that the LM head can draft.
        rope_theta, rope_scaling: RoPE base and scaling in transformers' terms (None: none).
        eps: of the RMSNorms.
        max_position: positions the head is trained for; an engine extends it beyond with YaRN.
        aux_layers: target layers whose input states it reads.
    """

    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    ffn: int
    vocabulary: int
    draft_vocabulary: int
    rope_theta: float
    rope_scaling: dict[str, Any] | None
    eps: float
    max_position: int
    aux_layers: tuple[int, ...]

    @classmethod
    def for_target(
        cls, config: Any, *, max_position: int, draft_vocabulary: int | None = None
    ) -> DraftShape:
        """A head with the target's own attention shape.

        Args:
            config: the target's transformers config.
            max_position: longest sequence it will be trained on.
            draft_vocabulary: None for the whole vocabulary.
        """
        rope = getattr(config, "rope_parameters", None) or {}
        return cls(
            hidden=config.hidden_size,
            heads=config.num_attention_heads,
            kv_heads=getattr(config, "num_key_value_heads", None) or config.num_attention_heads,
            head_dim=getattr(config, "head_dim", None)
            or config.hidden_size // config.num_attention_heads,
            ffn=ffn_size(config),
            vocabulary=config.vocab_size,
            draft_vocabulary=min(draft_vocabulary or config.vocab_size, config.vocab_size),
            rope_theta=float(
                rope.get("rope_theta") or getattr(config, "rope_theta", None) or 10000.0
            ),
            rope_scaling=None,
            eps=norm_eps(config),
            max_position=max_position,
            aux_layers=aux_layers_for(config.num_hidden_layers),
        )

    def head_spec(self) -> HeadSpec:
        """The retrieval head in it, as read from its checkpoint."""
        return HeadSpec(
            format="safeailab",
            hidden_size=self.hidden,
            target_hidden_size=self.hidden,
            embed_size=self.hidden,
            num_heads=self.heads,
            num_kv_heads=self.kv_heads,
            head_dim=self.head_dim,
            rms_norm_eps=self.eps,
            rope_theta=self.rope_theta,
            rope_scaling=self.rope_scaling,
            trained_length=self.max_position,
            aux_layer_ids=self.aux_layers,
            num_aux=len(self.aux_layers),
            norm_before_fc=False,
            fc_norm=False,
            qk_norm=False,
            dtype=torch.bfloat16,
        )

    def config(self) -> dict[str, Any]:
        """Contents of ``config.json``."""
        config = {
            "architectures": ["LlamaForCausalLMEagle3"],
            "model_type": "llama",
            "hidden_size": self.hidden,
            "intermediate_size": self.ffn,
            "num_hidden_layers": 1,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.kv_heads,
            "head_dim": self.head_dim,
            "rms_norm_eps": self.eps,
            "vocab_size": self.vocabulary,
            "draft_vocab_size": self.draft_vocabulary,
            "max_position_embeddings": self.max_position,
            "rope_theta": self.rope_theta,
            "hidden_act": "silu",
            "torch_dtype": "bfloat16",
            "target_hidden_size": self.hidden,
            # vLLM's V1 runner reads them in eagle_config, its V2 runner on the top level.
            "eagle_aux_hidden_state_layer_ids": list(self.aux_layers),
            "eagle_config": {
                "eagle_aux_hidden_state_layer_ids": list(self.aux_layers),
                "use_aux_hidden_state": True,
            },
        }
        return (
            config if self.rope_scaling is None else {**config, "rope_scaling": self.rope_scaling}
        )
