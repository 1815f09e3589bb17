"""What the KV cache is kept in: the model's dtype, or 8-bit floats.

vLLM: the GPU's compute capability.
"""

from __future__ import annotations

from typing import Any

import torch

from specontext_vllm.config import ConfigError
from specontext_vllm.float8 import FP8

FP8_NAMES = ("fp8", "fp8_e4m3")
"""vLLM's names of 8-bit floats with one scale for all keys of a layer and one for all values."""

FP8_CAPABILITY = (8, 9)
"""Compute capability from which on a GPU converts them."""

WINDOWS = "sliding_window"
"""What --kv-cache-dtype-skip-layers calls layers that are not ours."""


def kv_dtype(vllm_config: Any) -> torch.dtype:
    """What keys and values of our layers are kept in."""
    return FP8 if _name(vllm_config) in FP8_NAMES else vllm_config.model_config.dtype


def _name(vllm_config: Any) -> str:
    """The setting; where that leaves it to the checkpoint, what this one declares, as a layer reads
    it (vllm/model_executor/layers/attention/attention.py).
    """
    name = vllm_config.cache_config.cache_dtype
    quantization = getattr(vllm_config.model_config.hf_config, "quantization_config", None) or {}
    if name == "auto" and quantization.get("kv_cache_scheme") is not None:
        return FP8_NAMES[0]
    return name


def refuse_kv_dtype(vllm_config: Any) -> None:
    """Raise a ConfigError for a KV cache that the kernels do not read."""
    model, cache, name = vllm_config.model_config, vllm_config.cache_config, _name(vllm_config)
    if name in FP8_NAMES:
        _refuse_device()
        skipped = sorted(set(cache.kv_cache_dtype_skip_layers) - {WINDOWS})
        if skipped:
            raise ConfigError(
                f"--kv-cache-dtype-skip-layers: found {', '.join(skipped)}, but "
                "--attention-backend specontext chooses pages of one dtype for all layers that "
                f"attend to the whole context; leave it out, or name {WINDOWS} alone."
            )
    elif name not in ("auto", str(model.dtype).removeprefix("torch.")):
        raise ConfigError(
            f"--kv-cache-dtype: found {name!r}, which --attention-backend specontext does not "
            "support: keys and values are kept in the model's own dtype, or as e4m3 with one scale "
            "a layer for each; use auto or fp8."
        )


def _refuse_device() -> None:
    from vllm.platforms import current_platform

    if not current_platform.is_cuda():
        return
    capability = current_platform.get_device_capability()
    if capability is not None and tuple(capability) < FP8_CAPABILITY:
        raise ConfigError(
            f"--kv-cache-dtype: found fp8, but {current_platform.get_device_name()} cannot convert "
            f"8-bit floats (compute capability {capability[0]}.{capability[1]}, needed "
            f"{FP8_CAPABILITY[0]}.{FP8_CAPABILITY[1]}); use auto."
        )


def refuse_scales(vllm_config: Any, layer_names: tuple[str, ...]) -> None:
    """Raise a ConfigError where the loaded layers have scales for each head.

    Uses: vllm.v1.attention.backend.AttentionLayer._k_scale,
        vllm.v1.attention.backend.AttentionLayer._v_scale
    Symptom: values are read as if all heads had the first one's scale.
    Reason: a layer keeps its scales in private buffers, of one element or of one a head.
    Remove when: vLLM asks a backend whether it supports them on every platform.
    """
    layers = vllm_config.compilation_config.static_forward_context
    for name in layer_names:
        layer = layers[name]
        if layer.impl.float8_kv and max(layer._k_scale.numel(), layer._v_scale.numel()) > 1:
            raise ConfigError(
                f"model: {vllm_config.model_config.model} has scales of its KV cache for each "
                "head, but --attention-backend specontext reads one for all keys of a layer and "
                "one for all values; use --kv-cache-dtype auto with the unquantized model."
            )
