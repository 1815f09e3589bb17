"""The interface of every attention implementation."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from specontext_vllm.config import CONFIG_KEY
from specontext_vllm.float8 import KVScales
from specontext_vllm.step_data import PageTable, RowQueries

SETTING = f"additional_config.{CONFIG_KEY}.attention_provider"
"""The setting that names a provider, as messages spell it."""


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
    last axis), of the queries' dtype, or of 8-bit floats where calls come with ``scales``.

    Args:
        scale: factor on ``q . k``.
        dtype: of queries, and of keys and values that are written.
        soft_cap: logits become ``soft_cap * tanh(logit / soft_cap)``; 0: they stay.

    Attributes:
        max_queries: upper bound of a decode row's query tokens; more than 1 with drafts.
        float8_kv: whether calls come with ``scales``.
    """

    max_queries: int = 1
    float8_kv: bool = False

    def __init__(
        self,
        num_heads: int,
        num_kv_heads: int,
        head_dim: int,
        scale: float,
        dtype: torch.dtype,
        soft_cap: float = 0.0,
    ) -> None:
        self.num_heads, self.num_kv_heads, self.head_dim, self.scale, self.dtype = (
            num_heads,
            num_kv_heads,
            head_dim,
            scale,
            dtype,
        )
        self.soft_cap = soft_cap
        self.group = num_heads // num_kv_heads
        self.load()

    def load(self) -> None:
        """Called when it is made: import what it runs.

        Raises:
            ConfigError: what it runs is not there, or has no kernel for this shape.
        """
        return

    def warm_up(self, table: PageTable) -> None:
        """Called once an engine, before the first request: compile what ``decode`` runs. May
        overwrite the table.
        """
        return

    def plan(self, table: PageTable, rows: int) -> None:
        """Called once a step, when the table is filled: prepare what all layers' ``decode`` calls
        share.
        """
        return

    @abstractmethod
    def decode(
        self,
        query: Tensor,
        kv_cache: Tensor,
        table: PageTable,
        rows: int,
        output: Tensor,
        queries: RowQueries | None = None,
        sinks: Tensor | None = None,
        scales: KVScales | None = None,
    ) -> None:
        """Attend ``query [N, num_heads, D]`` over the table's pages into ``output`` of the same
        shape.

        ``output`` is contiguous. ``query`` may be a slice of a fused projection, with a larger row
        stride.

        Args:
            queries: which of the N tokens are whose; None: one a row. The last token of a row reads
                its whole list, the one before it all but one token, and so on.
            sinks: ``[num_heads]`` float32, of each head a logit that joins the sum of the softmax
                and has no value; None: there are none.
            scales: of the layer's keys and values; None: they are not scaled.
        """

    @abstractmethod
    def prefill(
        self,
        query: Tensor,
        kv_cache: Tensor,
        rows: PrefillRows,
        output: Tensor,
        sinks: Tensor | None = None,
        scales: KVScales | None = None,
    ) -> None:
        """Causal attention of ``query [N, num_heads, D]`` over the whole context into ``output`` of
        the same shape, which is contiguous. ``sinks`` and ``scales`` are those of ``decode``.
        """

    @abstractmethod
    def write(
        self,
        key: Tensor,
        value: Tensor,
        kv_cache: Tensor,
        slots: Tensor,
        scales: KVScales | None = None,
    ) -> None:
        """Store ``key``, ``value`` ``[>= N, H, D]`` at ``slots [N]`` int64; negative slots are
        padding. With ``scales`` divided by them, and cut off at the largest 8-bit float.
        """


def head_pages(kv_cache: Tensor) -> Tensor:
    """The cache as ``[num_blocks * H, P, 2 * D]``: one row per head page."""
    return kv_cache.view(-1, *kv_cache.shape[2:])
