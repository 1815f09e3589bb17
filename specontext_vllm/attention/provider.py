"""The interface every attention implementation offers, and the choice among them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec

import torch
from torch import Tensor

from specontext_vllm.config import CONFIG_KEY, ConfigError
from specontext_vllm.step_data import PageTable

SETTING = f"additional_config.{CONFIG_KEY}.attention_provider"


@dataclass(frozen=True)
class PrefillRows:
    """The rows of a step that attend densely.

    Attributes:
        starts: ``[R + 1]`` int32 offsets of the rows' query tokens, from 0.
        seq_lens: ``[R]`` int32 context lengths, the query tokens included.
        block_table: ``[R, W]`` int32 block ids.
        max_query_len, max_seq_len: upper bounds, in tokens.
        offsets: ``starts`` on the host.
    """

    starts: Tensor
    seq_lens: Tensor
    block_table: Tensor
    max_query_len: int
    max_seq_len: int
    offsets: Sequence[int]


class AttentionProvider(ABC):
    """Attention over paged KV ``[num_blocks, H, P, 2 * D]`` (contiguous; keys then values in the
    last axis).
    """

    def __init__(
        self, num_heads: int, num_kv_heads: int, head_dim: int, scale: float, dtype: torch.dtype
    ) -> None:
        self.num_heads, self.num_kv_heads, self.head_dim, self.scale, self.dtype = (
            num_heads,
            num_kv_heads,
            head_dim,
            scale,
            dtype,
        )
        self.group = num_heads // num_kv_heads

    def warm_up(self, table: PageTable) -> None:
        """Once an engine: compile what ``decode`` runs, before a request waits for it; may change
        the table's contents.
        """
        return

    def plan(self, table: PageTable, rows: int) -> None:
        """Once a step, after the table is filled and before the first layer: what all layers'
        ``decode`` calls share.
        """
        return

    @abstractmethod
    def decode(
        self, query: Tensor, kv_cache: Tensor, table: PageTable, rows: int, output: Tensor
    ) -> None:
        """Attend ``query [rows, num_heads, D]`` over the table's pages into ``output`` of the same
        shape.

        ``output`` is contiguous; ``query`` may be a slice of the layer's fused projection, as in
        uncompiled models.
        """

    @abstractmethod
    def prefill(self, query: Tensor, kv_cache: Tensor, rows: PrefillRows, output: Tensor) -> None:
        """Causal attention of ``query [N, num_heads, D]`` over the whole context into ``output`` of
        the same shape.
        """

    @abstractmethod
    def write(self, key: Tensor, value: Tensor, kv_cache: Tensor, slots: Tensor) -> None:
        """Store ``key``, ``value`` ``[>= N, H, D]`` at ``slots [N]`` int64; negative slots are
        padding.
        """


def head_pages(kv_cache: Tensor) -> Tensor:
    """The cache as ``[num_blocks * H, P, 2 * D]``: one row per head page."""
    return kv_cache.view(-1, *kv_cache.shape[2:])


def refuse_provider(name: str, head_dim: int, dtype: torch.dtype, device_type: str) -> None:
    """Raise a ConfigError for a provider that cannot run, as far as no GPU need be asked."""
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
        from specontext_vllm.attention.flash import flash_attention_takes

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
) -> AttentionProvider:
    """The provider of that name; "auto": FlashAttention where vLLM has it for this dtype and head
    size, Triton on other GPUs, torch on a CPU.

    Raises:
        ConfigError: when the named provider cannot run here.
    """
    arguments = (num_heads, num_kv_heads, head_dim, scale, dtype)
    refuse_provider(name, head_dim, dtype, device_type)
    if device_type == "cpu":
        from specontext_vllm.attention.reference import TorchProvider

        return TorchProvider(*arguments)
    if name == "xformers":
        from specontext_vllm.attention.xformers import XformersProvider

        return XformersProvider(*arguments)
    from specontext_vllm.attention.flash import FlashAttentionProvider, flash_attention_version

    has_flash = flash_attention_version(head_dim, dtype) is not None
    if name == "flash" and not has_flash:
        raise ConfigError(
            f"{SETTING}: found 'flash', but vLLM's FlashAttention does not run {dtype} with heads "
            f"of {head_dim} on this GPU; use auto."
        )
    if has_flash and name != "triton":
        return FlashAttentionProvider(*arguments)
    from specontext_vllm.attention.triton import TritonProvider

    return TritonProvider(*arguments)
