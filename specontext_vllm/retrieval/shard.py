"""The part of a retrieval head that one tensor-parallel worker needs."""

from __future__ import annotations

from dataclasses import replace

from specontext_vllm.retrieval.checkpoint import HeadCheckpoint, HeadError, HeadSpec


def shard_spec(spec: HeadSpec, size: int) -> HeadSpec:
    """What the head of one of ``size`` tensor-parallel workers is like.

    Raises:
        HeadError: the head's heads do not divide among the workers.
    """
    replicas = max(1, size // spec.num_kv_heads)
    if (spec.num_kv_heads * replicas) % size or spec.num_heads % size:
        raise HeadError(
            f"--tensor-parallel-size: found {size}, which cannot divide the retrieval head's "
            f"{spec.num_kv_heads} KV heads and {spec.num_heads} query heads; use a divisor or a "
            "multiple of the KV heads that divides the query heads."
        )
    if spec.layer_groups > 1 and replicas > 1:
        raise HeadError(
            f"--tensor-parallel-size: found {size}, but a head with queries for groups of layers "
            f"cannot be cut further than into its {spec.num_kv_heads} KV heads; use a divisor of "
            "them."
        )
    return replace(
        spec,
        num_heads=spec.num_heads // size,
        num_kv_heads=spec.num_kv_heads * replicas // size,
    )


def shard_checkpoint(checkpoint: HeadCheckpoint, *, rank: int, size: int) -> HeadCheckpoint:
    """Query and KV heads of one worker, cut as vLLM cuts the target's
    (vllm/model_executor/layers/linear.py, QKVParallelLinear).

    With more workers than KV heads several workers have the same KV head, each with its own share
    of the query heads, and may choose different pages for it. Everything before the projections is
    kept whole, and so are the inner parts of their MLPs. A worker scores pages for its own heads
    only, without communication.

    Raises:
        HeadError: the head's heads do not divide among the workers.
    """
    spec = shard_spec(checkpoint.spec, size)
    replicas = max(1, size // checkpoint.spec.num_kv_heads)
    tensors = dict(checkpoint.tensors)
    for kind, count, place in (
        ("q", spec.num_heads, rank),
        ("k", spec.num_kv_heads, rank // replicas),
    ):
        rows = count * spec.head_dim
        for part in ("proj.weight", "proj.bias", "mlp.down_proj.weight"):
            key = f"{kind}_{part}"
            if key in tensors:
                tensors[key] = tensors[key][place * rows : (place + 1) * rows]
    return replace(checkpoint, spec=spec, tensors=tensors)
