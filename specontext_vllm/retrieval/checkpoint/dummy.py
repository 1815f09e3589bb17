"""Heads of random weights."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from specontext_vllm.retrieval.checkpoint.aux_layers import default_aux_layers
from specontext_vllm.retrieval.checkpoint.config import DEFAULT_RMS_NORM_EPS
from specontext_vllm.retrieval.checkpoint.errors import HeadError
from specontext_vllm.retrieval.checkpoint.shapes import required_shapes
from specontext_vllm.retrieval.checkpoint.spec import HeadCheckpoint, HeadSpec
from specontext_vllm.retrieval.checkpoint.tensor_files import TensorInfo


def dummy_checkpoint(
    *,
    hidden_size: int,
    num_layers: int,
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    rope_theta: float,
    max_position: int,
    dtype: torch.dtype,
    seed: int,
) -> HeadCheckpoint:
    """A head of a target's shape with random weights, for benchmarks: it costs what a trained head
    costs, but its selection means nothing.
    """
    try:
        ids = default_aux_layers(num_layers)
    except HeadError:
        ids = (
            tuple(range(num_layers + 1))[-3:]
            if num_layers < 4
            else (1, num_layers // 2, num_layers - 1)
        )
    spec = HeadSpec(
        format="dummy",
        hidden_size=hidden_size,
        target_hidden_size=hidden_size,
        embed_size=hidden_size,
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        rms_norm_eps=DEFAULT_RMS_NORM_EPS,
        rope_theta=rope_theta,
        rope_scaling=None,
        trained_length=max_position,
        aux_layer_ids=ids,
        num_aux=len(ids),
        norm_before_fc=False,
        fc_norm=False,
        qk_norm=False,
        dtype=dtype,
        aux_layers_from="dummy",
    )
    return random_checkpoint(spec, seed)


def random_checkpoint(spec: HeadSpec, seed: int) -> HeadCheckpoint:
    """A head of ``spec`` with random weights and no biases.

    Projections have standard deviation 1/sqrt(fan_in) and norms are 1, so q and k are of order 1
    for any input.
    """
    generator = torch.Generator().manual_seed(seed)
    tensors: dict[str, Tensor] = {}
    for name, shape in required_shapes(spec).items():
        values = (
            torch.ones(shape)
            if "norm" in name
            else torch.randn(shape, generator=generator) / math.sqrt(shape[-1])
        )
        tensors[name] = values.to(spec.dtype)
    kept = [TensorInfo(name, tuple(t.shape), t.dtype) for name, t in tensors.items()]
    return HeadCheckpoint(spec=spec, tensors=tensors, kept=kept, pruned=[])
