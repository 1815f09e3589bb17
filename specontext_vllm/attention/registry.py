"""The choice among the attention providers."""

from __future__ import annotations

from importlib.util import find_spec

import torch

from specontext_vllm.attention.cpu import CpuProvider
from specontext_vllm.attention.flash import (
    FlashAttentionProvider,
    flash_attention_takes,
    flash_attention_version,
)
from specontext_vllm.attention.provider import SETTING, AttentionProvider
from specontext_vllm.attention.triton import TritonProvider
from specontext_vllm.config import ConfigError


def refuse_provider(name: str, head_dim: int, dtype: torch.dtype, device_type: str) -> None:
    """Check what can be checked before there is a GPU to ask.

    Raises:
        ConfigError: when the named provider cannot run.
    """
    if name == "auto":
        return
    if device_type == "cpu":
        raise ConfigError(f"{SETTING}: found {name!r}, which needs a GPU; use auto on a CPU.")
    if name == "xformers" and find_spec("xformers") is None:
        raise ConfigError(
            f"{SETTING}: found 'xformers', which is not installed; pip install "
            "'specontext-vllm[xformers]' or use auto."
        )
    if name == "flash":
        if not flash_attention_takes(head_dim, dtype):
            raise ConfigError(
                f"{SETTING}: found 'flash', but vLLM's FlashAttention does not run {dtype} with "
                f"heads of {head_dim}; use auto."
            )


def choose_provider(
    name: str,
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    scale: float,
    dtype: torch.dtype,
    device_type: str,
    *,
    soft_cap: float = 0.0,
    has_sinks: bool = False,
    float8_kv: bool = False,
) -> AttentionProvider:
    """The provider of that name; "auto": FlashAttention where vLLM has it for this dtype and head
    size, Triton on other GPUs, the CPU's on a CPU.

    Args:
        soft_cap, has_sinks: what else the layers' attention does; see ``AttentionProvider``.
        float8_kv: whether keys and values are kept in 8-bit floats.
    Raises:
        ConfigError: when the named provider cannot run here.
    """
    arguments = (num_heads, num_kv_heads, head_dim, scale, dtype, soft_cap)
    refuse_provider(name, head_dim, dtype, device_type)
    if device_type == "cpu":
        return CpuProvider(*arguments)
    if name == "xformers":
        if has_sinks:
            raise ConfigError(
                f"{SETTING}: found 'xformers', which knows no attention sinks, as this model has; "
                "use auto."
            )
        if float8_kv:
            raise ConfigError(
                f"{SETTING}: found 'xformers', which reads no 8-bit floats, as --kv-cache-dtype "
                "fp8 keeps; use auto."
            )
        from specontext_vllm.attention.xformers import XformersProvider

        return XformersProvider(*arguments)
    version = flash_attention_version(head_dim, dtype, has_sinks=has_sinks, float8_kv=float8_kv)
    if name == "flash" and version is None:
        besides = " and sinks" * has_sinks + " and a KV cache in fp8" * float8_kv
        raise ConfigError(
            f"{SETTING}: found 'flash', but vLLM's FlashAttention does not run {dtype} with heads "
            f"of {head_dim}{besides} on this GPU; use auto."
        )
    if version is not None and name != "triton":
        return FlashAttentionProvider(*arguments)
    return TritonProvider(*arguments)
