"""Errors of single layers: random ones and those of a model."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.rounding.kernels import ours, stock
from benchmarks.rounding.layers import DECODED, DTYPES, Layer, exact, random_layer, relative


def compare(layers: Sequence[Layer]) -> dict[str, float]:
    """Errors of ours and stock's over layers of one shape, and the least that the dtype allows."""
    references, dtype = [exact(layer) for layer in layers], layers[0].query.dtype
    mine, theirs = (
        relative([ours(layer) for layer in layers], references),
        relative([stock(layer) for layer in layers], references),
    )
    rounded = relative([ref.to(dtype) for ref in references], references)
    weights = relative([exact(layer, dtype).to(dtype) for layer in layers], references)
    return {
        "ours_rms": mine[0],
        "stock_rms": theirs[0],
        "ratio": mine[0] / theirs[0],
        "ours_max": mine[1],
        "stock_max": theirs[1],
        "least_rms": rounded[0],
        "weights_rms": weights[0],
    }


def model_layers(
    model: str, prompt: list[int], dtype: torch.dtype, device: torch.device
) -> list[tuple[Tensor, Tensor, Tensor]]:
    """Queries ``[T, heads, D]``, keys and values ``[T, KV heads, D]`` of every layer of a model
    that reads the prompt, as transformers computes them.
    """
    from transformers import AttentionInterface, AttentionMaskInterface, AutoModelForCausalLM

    seen: list[tuple[Tensor, Tensor, Tensor]] = []

    def attend(
        _: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        __: Any,
        scaling: float | None = None,
        **rest: Any,
    ) -> tuple[Tensor, None]:
        seen.append(
            (
                query[0].transpose(0, 1).contiguous(),
                key[0].transpose(0, 1).contiguous(),
                value[0].transpose(0, 1).contiguous(),
            )
        )
        mixed = torch.nn.functional.scaled_dot_product_attention(
            query, key, value, is_causal=True, scale=scaling, enable_gqa=True
        )
        return mixed.transpose(1, 2), None

    AttentionInterface.register("rounding", attend)
    AttentionMaskInterface.register("rounding", lambda *_, **__: None)
    loaded = (
        AutoModelForCausalLM.from_pretrained(model, dtype=dtype, attn_implementation="rounding")
        .to(device)
        .eval()
    )
    with torch.no_grad():
        loaded(torch.tensor([prompt], device=device), use_cache=False)
    return seen


def measure_layers(
    model: str, prompt: list[int], lengths: list[int], groups: list[int], head_dims: list[int]
) -> Iterator[tuple[str, Any]]:
    """Event ``("row", figures)`` for each dtype, step and shape, then for the model's own layers;
    runs in a child.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    for name in DTYPES:
        dtype = getattr(torch, name)
        captured = model_layers(model, prompt, dtype, device)
        for step in ("prefill", "decode"):
            decode = step == "decode"
            for head_dim in head_dims:
                for group in groups:
                    for tokens in lengths:
                        layer = random_layer(dtype, tokens, group, head_dim, decode, device)
                        shape = {"tokens": tokens, "group": group, "head_dim": head_dim}
                        yield (
                            "row",
                            {
                                "step": step,
                                "dtype": name,
                                "inputs": "random",
                                **shape,
                                **compare([layer]),
                            },
                        )
            layers = [
                Layer(query[-DECODED:].contiguous() if decode else query, key, value, decode)
                for query, key, value in captured
            ]
            shape = {
                "tokens": len(prompt),
                "group": layers[0].group,
                "head_dim": layers[0].query.shape[-1],
            }
            yield (
                "row",
                {
                    "step": step,
                    "dtype": name,
                    "inputs": f"all {len(layers)} layers of {Path(model).name}",
                    **shape,
                    **compare(layers),
                },
            )
