"""One layer's attention, and what it is in float64."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

DTYPES = ("bfloat16", "float16")
KV_HEADS = 2
DECODED = 32
"""Newest tokens of a context that are decoded, each as a request of its own."""
SHARPNESS = 2.0
"""Standard deviation of the random scores: some tokens count, as in a model."""


@dataclass(frozen=True)
class Layer:
    """One layer's attention: the last N of T tokens look back over all before them and themselves.

    Attributes:
        query: ``[N, KV heads * group, D]``. key, value: ``[T, KV heads, D]``.
        decode: whether each of the N tokens is a request of its own, with one token to decode; else
            they are one prefill.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    decode: bool

    @property
    def scale(self) -> float:
        return self.query.shape[-1] ** -0.5

    @property
    def group(self) -> int:
        return self.query.shape[1] // self.key.shape[1]

    def starts(self) -> Tensor:
        """``[requests + 1]`` int32 offsets of the requests' query tokens."""
        count = len(self.query)
        return torch.arange(
            0, count + 1, 1 if self.decode else count, dtype=torch.int32, device=self.query.device
        )

    def lengths(self) -> Tensor:
        """``[requests]`` int32 context lengths."""
        tokens, count = len(self.key), len(self.query)
        first = tokens - count + 1 if self.decode else tokens
        return torch.arange(first, tokens + 1, dtype=torch.int32, device=self.query.device)

    def blocks(self, size: int) -> tuple[Tensor, Tensor]:
        """Shuffled blocks of ``size`` tokens, ``[blocks, size, KV heads, 2 * D]``, and each
        request's, ``[requests, blocks]`` int32.
        """
        kv = torch.cat([self.key, self.value], -1)
        count = -(-len(kv) // size)
        padded = kv.new_zeros(count * size, *kv.shape[1:])
        padded[: len(kv)] = kv
        places = torch.randperm(count, generator=torch.Generator().manual_seed(0)).to(kv.device)
        blocks = torch.empty_like(padded).view(count, size, *kv.shape[1:])
        blocks[places] = padded.view_as(blocks)
        return blocks, places.int().repeat(len(self.lengths()), 1)


def random_layer(
    dtype: torch.dtype, tokens: int, group: int, head_dim: int, decode: bool, device: torch.device
) -> Layer:
    """Random queries, keys and values, the same on every device."""
    generator = torch.Generator().manual_seed(tokens + group + head_dim)
    query = (
        torch.randn(DECODED if decode else tokens, KV_HEADS * group, head_dim, generator=generator)
        * SHARPNESS
    )
    key, value = torch.randn(2, tokens, KV_HEADS, head_dim, generator=generator)
    query, key, value = (part.to(device, dtype) for part in (query, key, value))
    return Layer(query, key, value, decode)


def exact(layer: Layer, weights: torch.dtype | None = None) -> Tensor:
    """``[N, heads, D]`` in float64.

    Args:
        weights: what the softmax's weights (the largest is 1) are rounded to before they are
            multiplied by the values, which attention in 16-bit matrix units does; None: not at all.
    """
    count, tokens = len(layer.query), len(layer.key)
    seen = torch.ones(count, tokens, dtype=torch.bool, device=layer.query.device).tril(
        tokens - count
    )
    out = torch.empty(layer.query.shape, dtype=torch.float64, device=layer.query.device)
    for head in range(layer.key.shape[1]):
        for at in range(head * layer.group, (head + 1) * layer.group):
            scores = layer.query[:, at].double() @ layer.key[:, head].double().T * layer.scale
            scores.masked_fill_(~seen, float("-inf"))
            weight = (scores - scores.amax(-1, keepdim=True)).exp_()
            total = weight.sum(-1, keepdim=True)
            if weights is not None:
                weight = weight.to(weights).double()
            out[:, at] = weight @ layer.value[:, head].double() / total
    return out


def relative(outputs: Sequence[Tensor], references: Sequence[Tensor]) -> tuple[float, float]:
    """Root mean square and maximum of the error over all layers, each divided by its reference's
    root mean square; NaN stays NaN.
    """
    errors = [
        (out.double() - ref) / ref.square().mean().sqrt()
        for out, ref in zip(outputs, references, strict=True)
    ]
    together = torch.cat([error.flatten() for error in errors])
    return float(together.square().mean().sqrt()), float(together.abs().max())
