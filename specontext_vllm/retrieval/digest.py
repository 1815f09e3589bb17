"""A name for a head by what it keeps of tokens."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import torch

from specontext_vllm.retrieval.checkpoint import HeadCheckpoint
from specontext_vllm.retrieval.rope import rope_frequencies


def digest_of(checkpoint: HeadCheckpoint, aux_layers: Sequence[int], max_position: int) -> str:
    """16 hexadecimal digits that heads share which make the same keys and fused aux: those with the
    same shapes, settings, weights and RoPE that read the same layers of the target.

    Args:
        max_position: as ``RetrievalHead`` takes it; keys are kept rotated.
    """
    frequencies, factor = rope_frequencies(checkpoint.spec, max_position)
    settings = repr((checkpoint.spec, list(aux_layers), factor))
    found = hashlib.blake2b(settings.encode(), digest_size=8)
    for name, tensor in [*sorted(checkpoint.tensors.items()), ("rope", frequencies)]:
        found.update(name.encode())
        found.update(tensor.contiguous().view(torch.uint8).numpy().data)
    return found.hexdigest()
