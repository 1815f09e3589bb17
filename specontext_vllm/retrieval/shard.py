"""The part of a retrieval head that one tensor-parallel worker needs."""

from __future__ import annotations

from dataclasses import replace

from specontext_vllm.retrieval.checkpoint import HeadCheckpoint, HeadError


def shard_checkpoint(checkpoint: HeadCheckpoint, *, rank: int, size: int) -> HeadCheckpoint:
    """Query and KV heads of one worker; everything before the projections is kept whole.

    A worker scores pages for its own KV heads only, so the workers need not talk to one another.

    Raises:
        HeadError: the head's KV heads do not divide among the workers.
    """
    spec = checkpoint.spec
    if spec.num_kv_heads % size:
        raise HeadError(
            f"--tensor-parallel-size: found {size}, which does not divide the retrieval head's {spec.num_kv_heads} KV heads; "
            f"use a divisor of it."
        )
    tensors = dict(checkpoint.tensors)
    for name, heads in (("q_proj", spec.num_heads), ("k_proj", spec.num_kv_heads)):
        rows = heads // size * spec.head_dim
        for part in ("weight", "bias"):
            key = f"{name}.{part}"
            if key in tensors:
                tensors[key] = tensors[key][rank * rows : (rank + 1) * rows]
    spec = replace(spec, num_heads=spec.num_heads // size, num_kv_heads=spec.num_kv_heads // size)
    return replace(checkpoint, spec=spec, tensors=tensors)
