"""The rows of a step."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

WHOLE = 1 << 30
"""The budget, in tokens, of a row that reads its whole context because its request asks for it."""


@dataclass(frozen=True)
class StepBatch:
    """The rows of a step, decode rows first: those whose query tokens were generated, nearly always
    one, or one and the drafts after it. The other rows hold prompt tokens, even if only one.

    Attributes:
        token_ids: ``[>= N]`` ids of the step's tokens.
        positions: ``[>= N]`` int64.
        slots: ``[>= N]`` int64 slots in the paged caches, none negative; -1 for padding.
        query_starts: ``[R + 1]`` int32 offsets of the rows' tokens.
        seq_lens: ``[>= R]`` int32 context lengths after the step; 0 for the padding rows of a
            graph.
        block_table: ``[>= R, W]`` int32; tails beyond a row's pages may be stale.
        other_block_tables: where vLLM keeps the layers that are selected for in several groups, the
            same of each further one.
        seq_lens_bound: R host integers, each at least the row's context length.
        num_decodes: leading decode rows.
        table_rows: rows of the page table to fill, padding included.
        num_tokens: N.
        names: R request ids.
        query_lens: R host integers, the rows' query tokens.
        max_queries: the most query tokens of a decode row; more than 1: rows verify drafts.
        kept: ``[>= R]`` int32, how many of each row's tokens belong to its request, known once the
            step has sampled: the others are drafts that were rejected. None: all.
        dense: every decode row reads its whole context, whatever the rule.
        budgets: tokens that each decode row reads at the most where its request says so, ``WHOLE``
            for all of them, and None where the settings say; empty: they say for all rows.
        replayable: every row is a decode row of ``max_queries`` tokens, the tensors of tokens hold
            those of ``table_rows`` rows, and all tensors lie where those of every such step with as
            many rows do.
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
    max_queries: int = 1
    kept: Tensor | None = None
    dense: bool = False
    replayable: bool = False
    other_block_tables: tuple[Tensor, ...] = ()
    budgets: Sequence[int | None] = ()

    @property
    def num_rows(self) -> int:
        """R."""
        return len(self.seq_lens_bound)

    @classmethod
    def in_block_0(cls, length: int, width: int, device: torch.device) -> StepBatch:
        """One made-up decode row of ``length`` tokens that lies in block 0 with all of its
        ``width`` pages: vLLM never hands that block out.
        """

        def filled(value: int, *shape: int, dtype: torch.dtype = torch.int32) -> Tensor:
            return torch.full(shape, value, dtype=dtype, device=device)

        return cls(
            token_ids=filled(0, 1),
            positions=filled(length - 1, 1, dtype=torch.int64),
            slots=filled(0, 1, dtype=torch.int64),
            query_starts=torch.arange(2, dtype=torch.int32, device=device),
            seq_lens=filled(length, 1),
            block_table=filled(0, 1, width),
            seq_lens_bound=[length],
            num_decodes=1,
            table_rows=1,
            num_tokens=1,
        )

    def without_drafts(self) -> StepBatch:
        """The ``table_rows`` as they would be if nothing had been drafted: of each row its first
        token, and the context up to that. Nothing waits for the device.
        """
        if self.max_queries == 1:
            return self
        starts = self.query_starts[: self.table_rows + 1]
        first = starts[:-1].long()
        return replace(
            self,
            token_ids=self.token_ids[first],
            positions=self.positions[first],
            slots=self.slots[first],
            seq_lens=self.seq_lens[: self.table_rows] - drafts_of(starts),
            max_queries=1,
        )


def drafts_of(starts: Tensor) -> Tensor:
    """``[rows]`` drafts of rows whose query tokens start at ``starts [rows + 1]``; none where a row
    of padding has no token.
    """
    return (starts.diff() - 1).clamp(min=0)


class RowPart(NamedTuple):
    """Consecutive rows that are scored together.

    Attributes:
        rows: their range, padding included.
        max_pages: upper bound of the pages of one of them.
    """

    rows: range
    max_pages: int


class StepShape(NamedTuple):
    """What the host knows of the decode rows of a step. Steps of one shape launch the same kernels,
    so it is also a key of CUDA graphs; a tuple, since it is made and hashed in every step.

    Attributes:
        rows: leading rows whose tokens get keys: the decode rows, and in a graph the padding rows.
        chooses: some row may have more pages than its budget; if none has, all are read whole.
        parts: the rows in parts whose scores fit the workspace; none without decode rows.
        max_queries, dense: see ``StepBatch``.
    """

    rows: int
    chooses: bool
    parts: tuple[RowPart, ...]
    max_queries: int = 1
    dense: bool = False

    def padded(self, table_rows: int) -> StepShape:
        """The shape that a graph is captured for: its ``table_rows`` rows include the padding's,
        which read nothing and write to nowhere, and its bound of the pages is one of few.
        """
        max_pages = bucket(self.parts[0].max_pages) if self.chooses else 1
        part = RowPart(range(table_rows), max_pages)
        return self._replace(rows=table_rows, parts=(part,))


def bucket(pages: int) -> int:
    """The smallest of 1, 2, 3, 4, 6, 8, 12, 16, 24, ... that is not below ``pages``, so that steps
    with longer and longer contexts need few graphs. Programs for pages beyond a row's end return at
    once.
    """
    step = max(1, (1 << (pages - 1).bit_length()) // 4)
    return -(-pages // step) * step


@dataclass(frozen=True)
class RowQueries:
    """Query tokens of decode rows that verify drafts: the row's newest tokens, each of which reads
    the row's list of pages up to itself.

    Attributes:
        starts: ``[rows + 1]`` int32 offsets of the rows' tokens; a row of padding has none.
        max_len: upper bound of a row's tokens.
    """

    starts: Tensor
    max_len: int
