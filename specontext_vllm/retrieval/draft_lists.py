"""The pages that a drafter's layer reads while it drafts one token after the other: those that the
target's last step read, and those that are begun since.
"""

from __future__ import annotations

import torch
from torch import Tensor

from specontext_vllm.config import PAGE_SIZE, pages_for
from specontext_vllm.step_data import PageTable, StepBatch


class DraftLists:
    """One list for each row of a step, in the order of the batch, and KV head. Everything runs on
    the device alone, so graphs may hold it.

    Args:
        rows, num_kv_heads, table_pages: shape of the target's page table.
        num_drafts: drafts of a row, at the most.
        sink_pages: first pages that a prompt's row reads.

    Attributes:
        table: the lists; a draft's length is set by ``lengthen``.
    """

    def __init__(
        self,
        rows: int,
        num_kv_heads: int,
        table_pages: int,
        *,
        num_drafts: int,
        sink_pages: int,
        device: torch.device,
    ) -> None:
        self._ahead, self._sink_pages, self._target_pages = (
            pages_for(num_drafts),
            sink_pages,
            table_pages,
        )
        self.table = PageTable.allocate(rows, num_kv_heads, table_pages + self._ahead, device)
        self._left_out = torch.zeros(rows, num_kv_heads, dtype=torch.int32, device=device)
        """Tokens of each row's context that its lists lack."""

    def take_decodes(self, table: PageTable, batch: StepBatch) -> None:
        """Take over the lists of a step's decode rows, drafts included.

        Args:
            table: the target's, in vLLM's own pages.
        """
        rows, heads = batch.table_rows, table.num_kv_heads
        lengths = table.lengths[: rows * heads].view(rows, heads)
        pages = table.pages[: rows * heads].view(rows, heads, -1)
        self._take(range(rows), pages, lengths, batch)

    def take_prompts(self, batch: StepBatch) -> None:
        """Make lists for a step's prompt rows, for which nothing was selected: the first pages and
        the newest ones.
        """
        rows = range(batch.num_decodes, batch.num_rows)
        heads, width = self.table.num_kv_heads, self._target_pages
        seq_lens = batch.seq_lens[rows.start : rows.stop, None]
        block_table = batch.block_table[rows.start : rows.stop]
        # [R, K]
        column = torch.arange(width, dtype=torch.int32, device=seq_lens.device)
        left_out = ((seq_lens + PAGE_SIZE - 1) // PAGE_SIZE - width).clamp(min=0)
        page = torch.where(column < self._sink_pages, column, column + left_out)
        ids = block_table.gather(1, page.clamp(max=block_table.shape[1] - 1).long())
        head = torch.arange(heads, dtype=torch.int32, device=seq_lens.device)[:, None]
        lengths = (seq_lens - left_out * PAGE_SIZE).expand(-1, heads)
        self._take(rows, ids[:, None] * heads + head, lengths, batch)

    def lengthen(self, seq_lens: Tensor) -> None:
        """Set the lengths for contexts of ``seq_lens [R]`` tokens, whose last one is being
        drafted from; 0 for padding rows.
        """
        rows, heads = len(seq_lens), self.table.num_kv_heads
        lengths = seq_lens[:, None] - self._left_out[:rows]
        # vLLM's warm-up has contexts of any length.
        self.table.lengths[: rows * heads] = lengths.clamp(
            0, self.table.max_pages * PAGE_SIZE
        ).flatten()

    def _take(self, rows: range, pages: Tensor, lengths: Tensor, batch: StepBatch) -> None:
        """``pages [R, H, K]`` of ``lengths [R, H]`` tokens, and behind them the pages that drafts
        may yet begin.
        """
        heads = self.table.num_kv_heads
        seq_lens = batch.seq_lens[rows.start : rows.stop]
        block_table = batch.block_table[rows.start : rows.stop]
        lists = self.table.pages.view(-1, heads, self.table.max_pages)[rows.start : rows.stop]
        lists[..., : pages.shape[2]] = pages
        count = (lengths + PAGE_SIZE - 1) // PAGE_SIZE
        total = (seq_lens + PAGE_SIZE - 1) // PAGE_SIZE
        head = torch.arange(heads, dtype=torch.int32, device=pages.device)
        for ahead in range(self._ahead):
            page = (total + ahead).clamp(max=block_table.shape[1] - 1)
            ids = block_table.gather(1, page.long()[:, None]) * heads + head
            lists.scatter_(2, (count + ahead).long()[..., None], ids[..., None])
        self._left_out[rows.start : rows.stop] = seq_lens[:, None] - lengths
