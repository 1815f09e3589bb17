"""The pages that a step's decode rows read: their scores, what is selected, what must be fetched,
and what attention reads.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


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
