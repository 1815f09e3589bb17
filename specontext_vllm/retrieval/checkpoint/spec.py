"""What a retrieval head is: shapes, settings and tensors."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from specontext_vllm.retrieval.checkpoint.tensor_files import TensorInfo

KeyStates = Literal["previous", "own"]
"""Whose fused feature a token's key is made from besides its embedding: that of the token before
alone, as in EAGLE-3, or the token's own as well.
"""


@dataclass(frozen=True)
class HeadSpec:
    """Shapes and settings of a retrieval head.

    Attributes:
        format: layout of the checkpoint: "safeailab", "specforge", "speculators", "specontext" (our
            own) or "dummy".
        hidden_size: H, width of the fused feature.
        target_hidden_size: width of one auxiliary hidden state of the target.
        embed_size: E, width of the token embedding.
        num_heads, num_kv_heads, head_dim: nh, nkv, D of the head's attention; the query heads of
            all groups of layers together.
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
        dtype: dtype of fc, as it is read: float32 if it is stored as int8.
        embed_vocab_size: rows of the head's own token embedding; None if it uses the target's.
        target_vocab_size: tokens of the target it was made for: the length of its `t2d` map, at
            full vocabulary the rows of its LM head, in our own format its config's `vocab_size`;
            None if it has none of these.
        key_states: what a key is made from; see ``KeyStates``.
        q_mlp, k_mlp: inner width of the gated MLP beside q_proj and k_proj; 0 for none.
        partial_rotary_factor: share of D that RoPE turns; the rest matches whatever the distance.
            The turned pairs are i and i + D / 2 for the first values of i.
        layer_groups: G, groups of the target's layers (``layer_groups``) that each have a selection
            and query heads of their own. A KV head's query heads are those of the first group,
            then those of the second, and so on.
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
    key_states: KeyStates = "previous"
    q_mlp: int = 0
    k_mlp: int = 0
    partial_rotary_factor: float = 1.0
    layer_groups: int = 1

    @property
    def rotary_dim(self) -> int:
        """Values of D that RoPE turns."""
        return int(self.head_dim * self.partial_rotary_factor)

    @property
    def query_width(self) -> int:
        """Values that a query is made from: embedding, and feature of the token before."""
        return self.embed_size + self.hidden_size

    @property
    def key_width(self) -> int:
        """Values that a key is made from: a query's, and for own states the token's feature."""
        return self.query_width + (self.hidden_size if self.key_states == "own" else 0)


@dataclass(frozen=True)
class HeadCheckpoint:
    """A head's spec, its kept tensors under canonical names (on the CPU), and descriptions of what
    was kept and pruned.

    Canonical names:
        fc.weight [H, num_aux*H_target], fc.bias [H],
        input_norm.weight [num_aux*H_target], fc_norm.{i}.weight [H_target],
        embed_norm.weight [E], feature_norm.weight [H],
        q_proj.weight [nh*D, Wq], q_proj.bias [nh*D], q_norm.weight [D],
        k_proj.weight [nkv*D, Wk], k_proj.bias [nkv*D], k_norm.weight [D],
        q_mlp.gate_proj.weight, q_mlp.up_proj.weight [Mq, Wq], q_mlp.down_proj.weight [nh*D, Mq],
        k_mlp.gate_proj.weight, k_mlp.up_proj.weight [Mk, Wk], k_mlp.down_proj.weight [nkv*D, Mk],
        embed_tokens.weight [V, E];
    Wq, Wk are the spec's query_width and key_width. Biases, the input norms, q_norm, k_norm, the
    MLPs and embed_tokens are optional. Matrices that are stored as int8 are float32 here.
    """

    spec: HeadSpec
    tensors: dict[str, Tensor]
    kept: list[TensorInfo]
    pruned: list[TensorInfo]

    @property
    def is_int8(self) -> bool:
        """Whether matrices are stored as int8."""
        return any(info.dtype == torch.int8 for info in self.kept)

    @property
    def kept_bytes(self) -> int:
        """Bytes of the kept tensors, as they are stored."""
        return sum(info.num_bytes for info in self.kept)

    @property
    def whole_bytes(self) -> int:
        """Bytes of all tensors, as they are stored."""
        return self.kept_bytes + sum(info.num_bytes for info in self.pruned)
