"""One engine step as the retrieval head sees it; made by the runner adapters, free of vLLM's types."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class StepBatch:
    """Rows of a step, decode rows first: those whose one query token was generated. The others hold
    prompt tokens, be it one.

    Attributes:
        token_ids: ``[>= N]`` ids of the step's tokens.
        positions: ``[>= N]`` int64.
        slots: ``[>= N]`` int64 slots in the paged caches, none negative; -1 for padding.
        query_starts: ``[R + 1]`` int32 offsets of the rows' tokens.
        seq_lens: ``[>= R]`` int32 context lengths after the step; 0 for the padding rows of a
            graph.
        block_table: ``[>= R, W]`` int32; tails beyond a row's pages may be stale.
        seq_lens_bound: R host integers, each at least the row's context length.
        num_decodes: leading decode rows.
        table_rows: rows of the page table to fill, padding included.
        names: R request ids.
        query_lens: R host integers, the rows' query tokens.
        num_tokens: N.
        replayable: every row is a decode row, the tensors of tokens hold ``table_rows`` of them,
            and all tensors lie where those of every such step with as many rows do.
    """

    token_ids: Tensor
    positions: Tensor
    slots: Tensor
    query_starts: Tensor
    seq_lens: Tensor
    block_table: Tensor
    seq_lens_bound: list[int]
    num_decodes: int
    table_rows: int
    num_tokens: int
    names: Sequence[str] = ()
    query_lens: Sequence[int] = ()
    replayable: bool = False

    @property
    def num_rows(self) -> int:
        return len(self.seq_lens_bound)
