"""The retrieval head: the part of an EAGLE-3 draft model that decides what a token attends to.

    x = cat[norm(embedding), norm(fc(aux))],   q = rope(norm(W_q x)),   k = rope(norm(W_k x))

(SafeAILab EAGLE `cnets.py`; vLLM `llama_eagle3.py`; only Qwen3-type heads have norms on q and k.)
Values, output projection, FFN and LM head are pruned.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from specontext_vllm.retrieval.checkpoint import HeadCheckpoint, check_dtype, check_fits
from specontext_vllm.retrieval.rope import apply_rope, rope_frequencies, rope_table
from specontext_vllm.retrieval.shard import shard_spec


def check_head(
    checkpoint: HeadCheckpoint,
    *,
    target: Mapping[str, int],
    max_position: int,
    dtype: torch.dtype,
    workers: int = 1,
) -> None:
    """Everything that a readable checkpoint is refused for: `specontext inspect`, the engine's
    start and its workers ask this one function.

    Args:
        target: the widths of the target that ``check_fits`` takes.
        max_position, dtype: as ``RetrievalHead`` takes them.
        workers: tensor-parallel workers that share the head.

    Raises:
        HeadError: it cannot serve.
    """
    check_fits(checkpoint.spec, **target)
    check_dtype(checkpoint, dtype)
    shard_spec(checkpoint.spec, workers)
    rope_frequencies(checkpoint.spec, max_position)


class RetrievalHead(nn.Module):
    """q and k of the pruned draft model. No method synchronises with the host, so a CUDA graph can
    capture all of them.

    Args:
        checkpoint: weights and settings.
        max_position: number of positions, from 0 (the engine's max_model_len).
        dtype: of weights, q and k. Norms and RoPE are computed in float32.
        device: of the weights and the rotary table.

    Shapes: N tokens, H fused width, E embedding width, nh / nkv heads, D head dimension; see
    `HeadSpec`.
    """

    def __init__(
        self,
        checkpoint: HeadCheckpoint,
        *,
        max_position: int,
        dtype: torch.dtype,
        device: torch.device | str,
    ) -> None:
        super().__init__()
        self.spec = spec = checkpoint.spec
        tensors = checkpoint.tensors

        def keep(tensor: Tensor) -> nn.Parameter:
            return nn.Parameter(tensor.to(device, dtype), requires_grad=False)

        def keep_given(tensor: Tensor | None) -> nn.Parameter | None:
            return None if tensor is None else keep(tensor)

        self.fc_weight = keep(tensors["fc.weight"])
        self.fc_bias = keep_given(tensors.get("fc.bias"))
        self.input_norm = keep_given(tensors.get("input_norm.weight"))
        norms = (
            [tensors[f"fc_norm.{i}.weight"] for i in range(spec.num_aux)] if spec.fc_norm else None
        )
        self.fc_norm = keep_given(None if norms is None else torch.stack(norms))
        self.embed_norm = keep(tensors["embed_norm.weight"])
        self.feature_norm = keep(tensors["feature_norm.weight"])
        self.embed_tokens = keep_given(tensors.get("embed_tokens.weight"))

        # q and k in one matrix, q's rows first: a decode step is then one GEMM, and keys() reads a
        # view.
        self.qk_weight = keep(torch.cat((tensors["q_proj.weight"], tensors["k_proj.weight"])))
        self.qk_bias = keep_given(_stack_bias(checkpoint))
        self.qk_norm = keep_given(_stack_norm(checkpoint))
        self.cos_sin: Tensor
        self.register_buffer("cos_sin", rope_table(spec, max_position, device), persistent=False)

    @property
    def num_bytes(self) -> int:
        """Bytes of the weights on the device, without the rotary table: `cos_sin.nbytes`, 4*D a
        position.
        """
        return sum(parameter.nbytes for parameter in self.parameters())

    def fuse(self, aux: Sequence[Tensor]) -> Tensor:
        """The feature of each token from the target's auxiliary hidden states: fc, with the
        checkpoint's input norms.

        Args:
            aux: num_aux tensors [N, H_target], in ascending layer order.

        Returns:
            [N, H], before the feature norm: what a page keeps of its last token.

        Raises:
            ValueError: another number of hidden states than the checkpoint's.
        """
        if len(aux) != self.spec.num_aux:
            raise ValueError(
                f"The retrieval head reads {self.spec.num_aux} auxiliary hidden states and was "
                f"given {len(aux)}: set the "
                "target's auxiliary layers to the head's aux_layer_ids."
            )
        x = torch.cat(tuple(aux), dim=-1)
        if self.input_norm is not None:
            x = self._norm(x, self.input_norm)
        if self.fc_norm is not None:
            x = self._norm(x.unflatten(-1, self.fc_norm.shape), self.fc_norm).flatten(-2)
        return F.linear(x.to(self.fc_weight.dtype), self.fc_weight, self.fc_bias)

    def embed(self, token_ids: Tensor) -> Tensor:
        """Embeddings [N, E] of token ids [N] from the checkpoint's own table.

        Raises:
            RuntimeError: the checkpoint has none; the engine then passes the target's embeddings.
        """
        if self.embed_tokens is None:
            raise RuntimeError(
                "This head has no embed_tokens.weight: pass the target's embeddings to project()."
            )
        return F.embedding(token_ids, self.embed_tokens)

    def project(self, embeds: Tensor, fused: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Queries and keys after norms and RoPE.

        Args:
            embeds: [N, E] embedding of the token at each position.
            fused: [N, H] `fuse` of the token *before* it: EAGLE pairs token p+1 with the features
                of token p.
            positions: [N] int64, below max_position.

        Returns:
            q [N, nh, D] and k [N, nkv, D], views of one tensor.
        """
        qk = F.linear(self._inputs(embeds, fused), self.qk_weight, self.qk_bias)
        qk = self._rotate(qk, self.qk_norm, positions)
        return qk[:, : self.spec.num_heads], qk[:, self.spec.num_heads :]

    def keys(self, embeds: Tensor, fused: Tensor, positions: Tensor) -> Tensor:
        """k [N, nkv, D] of `project` alone, for prefill, where nothing is selected. The caller cuts
        N into chunks.
        """
        heads, rows = self.spec.num_heads, self.spec.num_heads * self.spec.head_dim
        bias = None if self.qk_bias is None else self.qk_bias[rows:]
        norm = None if self.qk_norm is None else self.qk_norm[heads:]
        return self._rotate(
            F.linear(self._inputs(embeds, fused), self.qk_weight[rows:], bias), norm, positions
        )

    def _inputs(self, embeds: Tensor, fused: Tensor) -> Tensor:
        return torch.cat(
            (self._norm(embeds, self.embed_norm), self._norm(fused, self.feature_norm)), dim=-1
        )

    def _rotate(self, flat: Tensor, norm: Tensor | None, positions: Tensor) -> Tensor:
        x = flat.unflatten(-1, (-1, self.spec.head_dim))
        if norm is not None:
            x = self._norm(x, norm)
        return apply_rope(x, self.cos_sin, positions)

    def _norm(self, x: Tensor, weight: Tensor) -> Tensor:
        """RMSNorm as vLLM computes it: float32, rounded to the weight's dtype before the weight.

        `F.rms_norm` rounds once, after the weight, on a GPU.
        """
        x = x.float()
        x = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.spec.rms_norm_eps)
        return weight * x.to(weight.dtype)


def _stack_bias(checkpoint: HeadCheckpoint) -> Tensor | None:
    """[(nh+nkv)*D], zero where only one of the two exists; None where none does."""
    spec, tensors = checkpoint.spec, checkpoint.tensors
    if "q_proj.bias" not in tensors and "k_proj.bias" not in tensors:
        return None
    parts = (("q_proj.bias", spec.num_heads), ("k_proj.bias", spec.num_kv_heads))
    return torch.cat(
        [tensors.get(name, torch.zeros(heads * spec.head_dim)).float() for name, heads in parts]
    )


def _stack_norm(checkpoint: HeadCheckpoint) -> Tensor | None:
    """[nh+nkv, D]: q's norm weight for each query head, then k's, so that one kernel normalises
    both.
    """
    spec, tensors = checkpoint.spec, checkpoint.tensors
    if not spec.qk_norm:
        return None
    q_norm = tensors["q_norm.weight"].expand(spec.num_heads, -1)
    k_norm = tensors["k_norm.weight"].expand(spec.num_kv_heads, -1)
    return torch.cat((q_norm, k_norm))
