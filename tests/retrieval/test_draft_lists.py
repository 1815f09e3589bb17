"""Lists of pages for drafts, against loops."""

from __future__ import annotations

import pytest
import torch

from specontext_vllm.config import PAGE_SIZE, pages_for
from specontext_vllm.retrieval.draft_lists import DraftLists
from specontext_vllm.step_data import PageTable, StepBatch

HEADS, WIDTH, TABLE, SINKS = 2, 14, 4, 1


def make_batch(seq_lens: list[int], num_decodes: int, table_rows: int, device) -> StepBatch:
    rows = len(seq_lens)
    block_table = torch.stack([torch.randperm(90)[:WIDTH] for _ in range(table_rows + rows)]).int()
    padded = torch.tensor(seq_lens + [0] * (table_rows - num_decodes), dtype=torch.int32)
    none = torch.zeros(0, dtype=torch.int64, device=device)
    return StepBatch(
        token_ids=none,
        positions=none,
        slots=none,
        query_starts=none.int(),
        seq_lens=padded.to(device),
        block_table=block_table.to(device),
        seq_lens_bound=seq_lens,
        num_decodes=num_decodes,
        table_rows=table_rows,
        num_tokens=0,
    )


@pytest.mark.parametrize("drafts", [3, 20], ids=["a page ahead", "two pages ahead"])
@pytest.mark.parametrize("padding", [0, 1], ids=["prompts too", "padding"])
def test_a_draft_reads_its_row_s_pages_up_to_itself_and_those_begun_since(padding, drafts, device):
    torch.manual_seed(drafts)
    decodes = [90, 16, 161, 33]
    prompts = [] if padding else [5, 64, 65, 150]
    batch = make_batch(decodes + prompts, len(decodes), len(decodes) + padding, device)
    table = PageTable.allocate(batch.table_rows, HEADS, TABLE, device)
    # Of each row and head the pages that are read, counted from the request's start.
    read: list[list[int]] = []
    for row, seq_len in enumerate(decodes):
        newest = pages_for(seq_len) - 1
        for head in range(HEADS):
            others = torch.randperm(newest)[: TABLE - 1].sort().values.tolist()
            read.append([*others, newest])
            ids = batch.block_table[row, read[-1]] * HEADS + head
            table.pages[row * HEADS + head, : len(read[-1])] = ids
            left_out = (newest + 1 - len(read[-1])) * PAGE_SIZE
            table.lengths[row * HEADS + head] = seq_len - left_out
    for seq_len in prompts:
        pages = range(pages_for(seq_len))
        first, rest = list(pages[:SINKS]), list(pages[SINKS:])
        read += [first + rest[max(0, len(rest) - TABLE + SINKS) :]] * HEADS
    lists = DraftLists(
        9, HEADS, TABLE, num_drafts=drafts, sink_pages=SINKS, device=torch.device(device)
    )
    lists.take_decodes(table, batch)
    if prompts:
        lists.take_prompts(batch)
    seq_lens = decodes + prompts
    for ahead in range(-2, drafts + 1):
        at = torch.tensor([n + ahead for n in seq_lens] + [0] * padding, dtype=torch.int32)
        lists.lengthen(at.to(device))
        for sequence, pages in enumerate(read):
            row, head = divmod(sequence, HEADS)
            total = seq_lens[row] + ahead
            begun = range(pages[-1] + 1, pages_for(total))
            wanted = [page for page in [*pages, *begun] if page < pages_for(total)]
            length = int(lists.table.lengths[sequence])
            left_out = pages_for(total) - len(wanted)
            assert length == total - left_out * PAGE_SIZE
            found = lists.table.pages[sequence, : pages_for(length)]
            assert torch.equal(found, batch.block_table[row, wanted] * HEADS + head)
        for sequence in range(len(read), len(read) + padding * HEADS):
            assert int(lists.table.lengths[sequence]) == 0
