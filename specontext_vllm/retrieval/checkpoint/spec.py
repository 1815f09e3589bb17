"""What a retrieval head is: shapes, settings and tensors."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from specontext_vllm.retrieval.checkpoint.tensor_files import TensorInfo


@dataclass(frozen=True)
class HeadSpec:
    """Shapes and settings of a retrieval head.

    Attributes:
        format: layout of the checkpoint: "safeailab", "specforge", "speculators", "pruned" or
            "dummy".
        hidden_size: H, width of the fused feature.
        target_hidden_size: width of one auxiliary hidden state of the target.
        embed_size: E, width of the token embedding; q_proj and k_proj read E + H values.
        num_heads, num_kv_heads, head_dim: nh, nkv, D of the head's attention.
        rope_theta: RoPE base.
        rope_scaling: the checkpoint's own RoPE scaling in transformers' terms, or None.
        trained_length: positions that it was trained for (`max_position_embeddings`).
        aux_layer_ids: target layers to read, or None for `default_aux_layers`. Id i is the hidden
            state that enters layer i (0: the embedding, num_layers: the last layer's output), as
            vLLM counts. Some heads made for SGLang count layer outputs instead, which their config
            does not say; their ids are taken as they are, as in vLLM.
        aux_layers_from: the setting of config.json that names them; None if none does.
        num_aux: auxiliary hidden states that fc concatenates.
        norm_before_fc: one RMSNorm over the concatenation. fc_norm: one RMSNorm for each state.
        qk_norm: RMSNorm over D on q and on k.
        dtype: dtype of fc in the checkpoint.
        embed_vocab_size: rows of the head's own token embedding; None if it uses the target's.
        target_vocab_size: tokens of the target it was made for: the length of its `t2d` map, at
            full vocabulary the rows of its LM head, for a pruned head its config's `vocab_size`;
            None if it has none of these.
    """

    format: str
    hidden_size: int
    target_hidden_size: int
    embed_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rms_norm_eps: float
    rope_theta: float
    rope_scaling: dict[str, Any] | None
    trained_length: int
    aux_layer_ids: tuple[int, ...] | None
    num_aux: int
    norm_before_fc: bool
    fc_norm: bool
    qk_norm: bool
    dtype: torch.dtype
    embed_vocab_size: int | None = None
    target_vocab_size: int | None = None
    aux_layers_from: str | None = None


@dataclass(frozen=True)
class HeadCheckpoint:
    """A head's spec, its kept tensors under canonical names (on the CPU), and descriptions of what
    was kept and pruned.

    Canonical names:
        fc.weight [H, num_aux*H_target], fc.bias [H],
        input_norm.weight [num_aux*H_target], fc_norm.{i}.weight [H_target],
        embed_norm.weight [E], feature_norm.weight [H],
        q_proj.weight [nh*D, E+H], q_proj.bias [nh*D], q_norm.weight [D],
        k_proj.weight [nkv*D, E+H], k_proj.bias [nkv*D], k_norm.weight [D],
        embed_tokens.weight [V, E].
    Biases, the input norms, q_norm, k_norm and embed_tokens are optional.
    """

    spec: HeadSpec
    tensors: dict[str, Tensor]
    kept: list[TensorInfo]
    pruned: list[TensorInfo]
