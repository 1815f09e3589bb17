"""The retrieval head: the part of a draft model that decides what a token attends to.

With f_j = fc(aux states of token j), u_j = norm(embedding of token j) and n_j = norm(f_j)

    q_t = rope(norm(W_q x + mlp_q(x))),   x = cat[u_t, n_(t-1)]
    k_j = rope(norm(W_k y + mlp_k(y))),   y = cat[u_j, n_(j-1)] or cat[u_j, n_(j-1), n_j]
    mlp(x) = W_down (silu(W_gate x) * (W_up x))

Queries are made before the model runs, and so are the first kind of keys; the second kind, from
the token's own states, after it.

An EAGLE-3 head (SafeAILab EAGLE `cnets.py`; vLLM `llama_eagle3.py`) has the first kind of keys and
no MLPs, and only Qwen3-type heads have norms on q and k. What else a draft model has is pruned:
values, output projection, FFN and LM head.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from specontext_vllm.retrieval.checkpoint import HeadCheckpoint, check_dtype, check_fits
from specontext_vllm.retrieval.projection import Projection
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
    """Queries and keys of the head. No method synchronises with the host, so a CUDA graph can
    capture all of them.

    Args:
        checkpoint: weights and settings.
        max_position: number of positions, from 0 (the engine's max_model_len).
        dtype: of weights, q and k. Norms and RoPE are computed in float32.
        device: of the weights and the rotary table.
        others: matrices of another model on ``device``, a drafter of the same checkpoint; a matrix
            of the head that is the first rows of one of them is a view of it.

    Attributes:
        shared_bytes: bytes of the weights that are such views.
        queries_and_keys: the projection of both from one input; None where they have two, because
            keys are made from own states.
        queries_alone, keys_alone: the projection of each.

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
        others: Sequence[Tensor] = (),
    ) -> None:
        super().__init__()
        self.spec = spec = checkpoint.spec
        tensors = checkpoint.tensors

        self.shared_bytes = 0

        def keep(tensor: Tensor) -> nn.Parameter:
            own = tensor.to(device, dtype)
            if (shared := _first_rows(others, own)) is not None:
                self.shared_bytes += own.nbytes
                own = shared
            return nn.Parameter(own, requires_grad=False)

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

        # q and k in one matrix, q's rows first: a decode step is then one GEMM, and keys alone
        # read a view of it.
        both = Projection.of(checkpoint, "qk", keep) if spec.key_states == "previous" else None
        self.queries_and_keys = both
        if both is None:
            self.queries_alone = Projection.of(checkpoint, "q", keep)
            self.keys_alone = Projection.of(checkpoint, "k", keep)
        else:
            self.queries_alone = both.part(0, spec.num_heads)
            self.keys_alone = both.part(spec.num_heads, spec.num_heads + spec.num_kv_heads)
        self.cos_sin: Tensor
        self.register_buffer("cos_sin", rope_table(spec, max_position, device), persistent=False)

    @property
    def num_bytes(self) -> int:
        """Bytes of the weights on the device, without the rotary table: `cos_sin.nbytes`, 4*D a
        position.
        """
        both = self.queries_and_keys
        projections = (self.queries_alone, self.keys_alone) if both is None else (both,)
        return sum(parameter.nbytes for parameter in self.parameters()) + sum(
            projection.num_bytes for projection in projections
        )

    @property
    def dtype(self) -> torch.dtype:
        """Of the weights, the fused features, q and k."""
        return self.fc_weight.dtype

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

    def project(self, embeds: Tensor, previous: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Queries and keys after norms and RoPE, of a head whose keys are made like its queries.

        Args:
            embeds: [N, E] embedding of the token at each position.
            previous: [N, H] `fuse` of the token *before* it: EAGLE pairs token p+1 with the
                features of token p. Zeros before token 0.
            positions: [N] int64, below max_position.

        Returns:
            q [N, nh, D] and k [N, nkv, D], views of one tensor.

        Raises:
            ValueError: its keys are made from own states.
        """
        if self.queries_and_keys is None:
            raise ValueError("The head makes keys from own states: use queries() and keys().")
        qk = self.finish(self.queries_and_keys, self.inputs(embeds, previous), positions)
        return qk[:, : self.spec.num_heads], qk[:, self.spec.num_heads :]

    def queries(self, embeds: Tensor, previous: Tensor, positions: Tensor) -> Tensor:
        """q [N, nh, D]; arguments as for `project`."""
        return self.finish(self.queries_alone, self.inputs(embeds, previous), positions)

    def keys(
        self, embeds: Tensor, previous: Tensor, positions: Tensor, own: Tensor | None = None
    ) -> Tensor:
        """k [N, nkv, D]; arguments as for `project`. The caller cuts N into chunks.

        Args:
            own: [N, H] `fuse` of the token itself, for a head whose keys are made from it.
        """
        inputs = self.inputs(embeds, previous)
        if self.spec.key_states == "own":
            assert own is not None
            inputs = torch.cat((inputs, self.feature(own)), dim=-1)
        return self.finish(self.keys_alone, inputs, positions)

    def inputs(self, embeds: Tensor, previous: Tensor) -> Tensor:
        """[N, E+H]: what queries are made from, and what the inputs of keys at least begin with."""
        return torch.cat((self._norm(embeds, self.embed_norm), self.feature(previous)), dim=-1)

    def feature(self, fused: Tensor) -> Tensor:
        """[N, H]: fused aux as the projections take it."""
        return self._norm(fused, self.feature_norm)

    def finish(self, projection: Projection, inputs: Tensor, positions: Tensor) -> Tensor:
        """[N, heads, D]: what a projection makes of its inputs, after norms and RoPE."""
        x = projection(inputs).unflatten(-1, (-1, self.spec.head_dim))
        if projection.norm is not None:
            x = self._norm(x, projection.norm)
        return apply_rope(x, self.cos_sin, positions)

    def _norm(self, x: Tensor, weight: Tensor) -> Tensor:
        """RMSNorm as vLLM computes it: float32, rounded to the weight's dtype before the weight.

        `F.rms_norm` rounds once, after the weight, on a GPU.
        """
        x = x.float()
        x = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.spec.rms_norm_eps)
        return weight * x.to(weight.dtype)


def _first_rows(others: Sequence[Tensor], matrix: Tensor) -> Tensor | None:
    """``matrix`` as a view of the one among ``others`` that begins with it; None if none does."""
    for other in others:
        if (
            matrix.dim() == other.dim() == 2
            and matrix.dtype == other.dtype
            and matrix.device == other.device
            and matrix.shape[1] == other.shape[1]
            and torch.equal(matrix, (rows := other[: len(matrix)]))
        ):
            return rows.detach()
    return None
