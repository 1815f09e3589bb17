"""What passes from one stage of a decode step to the next (``engine/step.py``): plain dataclasses
around tensors, for every package from the engine down to the kernels.

H: KV heads of the target; P: tokens of a page; K: columns of the page table. A **head page** is one
page of one KV head; its id is ``page * H + head``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import torch
from torch import Tensor

WHOLE = 1 << 30
"""The budget, in tokens, of a row that reads its whole context because its request asks for it."""


@dataclass(frozen=True)
class StartedRequest:
    """A request that enters the batch: new, or resumed after a preemption.

    Attributes:
        name: vLLM's request id.
        pages: logical pages it holds.
        computed: leading pages whose content exists already: of a prefix hit, or the session's own,
            a partly filled one included.
    """

    name: str
    pages: list[int]
    computed: int


@dataclass(frozen=True)
class ScheduledStep:
    """What the scheduler decided for a step, as far as the tiers follow it.

    All pages are of ``PAGE_SIZE`` tokens (vLLM's kernel blocks): blocks of 32, 64 or 128 tokens are
    expanded into pages before they get here.

    Attributes:
        released: requests that hold no pages any more, also for a moment (preempted, resumed).
        started: requests that enter the batch.
        grown: ``(name, pages)``: further pages of a running request.
        decoding, prefilling: requests with a decode row, or with prompt tokens, in this step.
        written: ``(name, page)``: the first page of a request that this step writes to, counted
            from the request's start.
    """

    released: list[str] = field(default_factory=list)
    started: list[StartedRequest] = field(default_factory=list)
    grown: list[tuple[str, list[int]]] = field(default_factory=list)
    decoding: list[str] = field(default_factory=list)
    prefilling: list[str] = field(default_factory=list)
    written: list[tuple[str, int]] = field(default_factory=list)


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
class PageScores:
    """What scoring tells selection: a workspace in which the pages of the rows lie one row after
    the other, each row with its own number of pages (C pages in all).

    Attributes:
        page_max: ``[NQ, C]`` float32, largest ``q . k / sqrt(D)`` of a page's tokens, per query
            head of the scoring model.
        page_lse: ``[NQ, C]`` float32, log-sum-exp of the same.
        order: ``[H * G, C]`` int32 scratch of the selection.
        starts: ``[rows]`` int32, where the pages of each scored row start; None before scoring.
    """

    page_max: Tensor
    page_lse: Tensor
    order: Tensor
    starts: Tensor | None = None

    @classmethod
    def allocate(
        cls, num_queries: int, num_kv_heads: int, capacity: int, device: torch.device
    ) -> PageScores:
        """A workspace for ``capacity`` pages."""
        return cls(
            torch.empty(num_queries, capacity, dtype=torch.float32, device=device),
            torch.empty(num_queries, capacity, dtype=torch.float32, device=device),
            torch.empty(num_kv_heads, capacity, dtype=torch.int32, device=device),
        )

    @property
    def capacity(self) -> int:
        """C: pages the workspace holds."""
        return self.page_max.shape[1]


@dataclass(frozen=True)
class Stickiness:
    """Pages that need no fetch, and by how much a page that needs one must beat them.

    Attributes:
        lanes: ``[>= B]`` int32 rows of ``slot_of``; negative for padding rows.
        slot_of: ``[lanes, H, W]`` int32; negative for pages that need a fetch.
        margin: added to the logarithm of the score of a page that needs none.
    """

    lanes: Tensor
    slot_of: Tensor
    margin: float


@dataclass(frozen=True)
class Selection:
    """The head pages that the decode rows read, one sequence of them per (group of layers, row, KV
    head). There is one group, unless the head has queries for several.

    Persistent buffers, which captured CUDA graphs point at. With one tier they are those of the
    page table; with two, ``resolve`` makes a page table of each layer from them.

    Attributes:
        pages: ``[G * rows * H, K]`` int32 ids ``page * H + head`` in ascending order of position. A
            page is a block of vLLM's, or counted from the request's start; see ``page_ids``.
        lengths: ``[G * rows * H]`` int32 tokens in them, alike in all groups; 0 for padding rows.
        kept_mass: ``[rows, H * G]`` float32, share of the scoring model's attention on these pages.
        page_ids: ``[rows, W]`` int32, what each row's pages are called in ``pages``; None: as in
            the step's block table.
        groups: G, groups of layers.
    """

    pages: Tensor
    lengths: Tensor
    kept_mass: Tensor
    page_ids: Tensor | None = None
    groups: int = 1

    @classmethod
    def into(cls, table: PageTable, *, count_from_start: int = 0) -> Selection:
        """A selection in the buffers of ``table``.

        Args:
            count_from_start: with two tiers, or page tables of several KV groups, the largest
                number of pages of a request, which are then counted from its start.
        """
        device = table.pages.device
        kept_mass = torch.ones(
            table.rows, table.num_kv_heads * table.groups, dtype=torch.float32, device=device
        )
        page_ids = None
        if count_from_start:
            counted = torch.arange(count_from_start, dtype=torch.int32, device=device)
            page_ids = counted.expand(table.rows, -1)
        return cls(table.pages, table.lengths, kept_mass, page_ids, table.groups)

    @property
    def num_kv_heads(self) -> int:
        """H."""
        return self.kept_mass.shape[1] // self.groups


@dataclass(frozen=True)
class Misses:
    """The selected head pages that are in no hot buffer: what ``fetch`` copies from the host pool.

    Attributes:
        sources: ``[C]`` int32 head pages of the host pool, ``page * H + head``.
        targets: ``[C]`` int32 places in the hot buffers, ``(lane * S + slot) * H + head``.
        count: ``[1]`` int32, how many entries are valid; the host does not know.
    """

    sources: Tensor
    targets: Tensor
    count: Tensor


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


@dataclass(frozen=True)
class PageTable:
    """What decode attention of a layer reads: one sequence of head pages per (row, KV head); or
    what each of several groups of layers reads, one group after the other.

    Persistent buffers, which captured CUDA graphs point at.

    Attributes:
        pages: ``[G * rows * H, K]`` int32 head pages (``block * H + head``) in ascending order of
            position.
        lengths: ``[G * rows * H]`` int32 tokens in them; only the last page may be partly filled; 0
            for padding rows.
        num_kv_heads: H.
        groups: G.
    """

    pages: Tensor
    lengths: Tensor
    num_kv_heads: int
    groups: int = 1

    @classmethod
    def allocate(
        cls, rows: int, num_kv_heads: int, max_pages: int, device: torch.device, groups: int = 1
    ) -> PageTable:
        """An empty table for ``rows`` requests of up to ``max_pages`` pages a head."""
        sequences = groups * rows * num_kv_heads
        return cls(
            torch.zeros(sequences, max_pages, dtype=torch.int32, device=device),
            torch.zeros(sequences, dtype=torch.int32, device=device),
            num_kv_heads,
            groups,
        )

    def of_group(self, group: int) -> PageTable:
        """What the layers of one group read: the same buffers."""
        size = self.rows * self.num_kv_heads
        span = slice(group * size, (group + 1) * size)
        return PageTable(self.pages[span], self.lengths[span], self.num_kv_heads)

    @property
    def rows(self) -> int:
        """Requests the buffers hold."""
        return self.lengths.shape[0] // (self.num_kv_heads * self.groups)

    @property
    def max_pages(self) -> int:
        """K: the largest number of pages that one sequence may read."""
        return self.pages.shape[1]
