"""One decode step, in the order in which it happens. Nothing here waits for the GPU.

    begin         follow    what the scheduler decided: which requests have budgets of their own;
                            the tiers hand out and take back frames
    before_model  project   the rows' first new tokens: the head's keys, and queries
                  score     all pages by the queries                          -> PageScores
                  select    the pages that each row reads, within its budget  -> Selection
                  resolve   which of them the hot buffers lack                -> Misses
                            and where all of them lie in each layer           -> PageTable
                  fetch     start to copy the misses from the host pool
                  stage     start to copy the history of prompt rows
                  plan      what all layers' attention shares
    (vLLM runs the model)
    after_model   learn     keys and fused states, from the hidden states of the tokens that stay

With one tier of KV there is nothing to follow, resolve, fetch or stage: the selection itself is the
page table. Where vLLM keeps our layers in several groups, each with blocks of its own, a selection
counts pages from the start of their request, and a page table is written for each group. What
passes from one stage to the next is described in ``step_data/``.

``batch.num_decodes`` of a step's rows are decode rows. ``batch.table_rows`` is as many, or more
where vLLM replays its CUDA graph of a larger batch: the rows beyond are padding, which reads
nothing.

A decode row that verifies drafts has its newest token and the drafts after it. Its pages are chosen
for the first of them, as they would be without drafts; then its list is lengthened.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from specontext_vllm.attention.provider import AttentionProvider
from specontext_vllm.config import SpeContextConfig
from specontext_vllm.engine.kv_group import KVGroup
from specontext_vllm.engine.metrics import Exporter
from specontext_vllm.engine.request_settings import RequestBudgets
from specontext_vllm.engine.scheduled import ScheduleReader
from specontext_vllm.engine.stopwatch import Stopwatch
from specontext_vllm.residency.tiers import TieredKV
from specontext_vllm.retrieval.draft_lists import DraftLists
from specontext_vllm.retrieval.graphs import StepGraphs
from specontext_vllm.retrieval.protocol import Retriever
from specontext_vllm.retrieval.selection import add_drafts, name_pages
from specontext_vllm.step_data import PageTable, Selection, StepBatch, StepShape, Stickiness


class DecodeStep:
    """The steps of one worker.

    Args:
        retriever: chooses the pages that decode rows read, and learns each step's tokens.
        selection: those pages.
        table: the page table that attention reads; with two tiers, where layers have tables of
            their own, that of a drafter's layers, whose pages are not the selection's.
        provider: the attention over it.
        others: where vLLM keeps our layers in several groups, both of each further one; the
            selection then has buffers of its own.
        exporter: publishes what is counted and timed.
        tiers: where the pages lie, with a host pool; None without one.
        graphs: replay steps without prompt tokens; None: everything is launched one by one.
        kv_group: whose blocks the scheduler's output is read for.
        budgets: of the requests that have their own.
        num_drafts: drafts of a row, at the most.
        draft_lists: what a drafter's layers read beside this step's pages; None: they read all.
    """

    def __init__(
        self,
        retriever: Retriever,
        selection: Selection,
        table: PageTable,
        provider: AttentionProvider,
        *,
        exporter: Exporter,
        kv_group: KVGroup,
        budgets: RequestBudgets,
        others: Sequence[tuple[PageTable, AttentionProvider]] = (),
        tiers: TieredKV | None = None,
        graphs: StepGraphs | None = None,
        num_drafts: int = 0,
        draft_lists: DraftLists | None = None,
    ) -> None:
        self.retriever, self.selection = retriever, selection
        self.table = table
        self.attention = [(table, provider), *others]
        self.tiers, self.graphs, self.exporter = tiers, graphs, exporter
        self.num_drafts, self.draft_lists = num_drafts, draft_lists
        self._schedule, self._budgets = ScheduleReader(kv_group, num_drafts), budgets

    @torch.inference_mode()
    def begin(self, scheduler_output: Any) -> None:
        """Follow what the scheduler decided."""
        self._budgets.follow(scheduler_output)
        if self.tiers is not None:
            self.tiers.follow(self._schedule.read(scheduler_output))
        self.exporter.begin_step(idle=not scheduler_output.total_num_scheduled_tokens)

    def before_model(self, batch: StepBatch) -> None:
        """Choose the pages that the decode rows read, and see that they are there."""
        if budgets := self._budgets.of(batch.names[: batch.num_decodes]):
            batch = replace(batch, budgets=budgets)
        if self.tiers is not None:
            self.tiers.place_rows(batch.names[: batch.num_decodes], batch.table_rows)
        if batch.dense and batch.num_decodes:
            self.exporter.count_round(batch.max_queries - 1)
        with self._timed(self.exporter.select, batch):
            self._choose_or_replay(batch)
            if self.tiers is not None:
                self.tiers.fetch(batch.table_rows)
        if self.draft_lists is not None and batch.num_decodes < batch.num_rows:
            self.draft_lists.take_prompts(batch)
        # The host has counted the step's rows: /metrics has them before their tokens are made.
        self.exporter.end_selection()
        if self.tiers is not None:
            self.tiers.stage(batch)
        if batch.table_rows:
            for table, provider in self.attention:
                provider.plan(table, batch.table_rows)

    def choose_pages(
        self, batch: StepBatch, shape: StepShape, embeds: Tensor | None = None
    ) -> None:
        """Everything on the way from tokens to page tables; what one CUDA graph holds.

        Args:
            shape: what the host knows of the rows.
            embeds: ``[rows, E]`` embeddings of their tokens that were made outside of the graph.
        """
        rows = batch.without_drafts()
        queries = self.retriever.project(rows, shape, embeds)
        # A part: consecutive rows whose scores fit the workspace together. Nearly always one.
        for part in shape.parts:
            scores = self.retriever.score(rows, shape, part, queries)
            self.retriever.select(rows, shape, part, scores, self.selection, self._stickiness())
        if batch.max_queries > 1:
            add_drafts(self.selection, batch)
        if batch.other_block_tables and batch.table_rows:
            block_tables = (batch.block_table, *batch.other_block_tables)
            tables = [table for table, _ in self.attention]
            name_pages(self.selection, block_tables, tables, batch.table_rows)
        if self.tiers is not None and batch.table_rows:
            self.tiers.resolve(self.selection, rows)
            if self.table.pages is not self.selection.pages:
                # What a layer outside of the two tiers reads, a drafter's.
                tables = [self.table]
                name_pages(self.selection, [batch.block_table], tables, batch.table_rows)
        if self.draft_lists is not None and batch.table_rows:
            self.draft_lists.take_decodes(self.table, batch)

    def after_model(self, batch: StepBatch, aux: Sequence[Tensor] | None) -> None:
        """Learn the step's tokens from the model's auxiliary hidden states; None where the
        retriever reads none. Once the step has sampled: ``batch.kept`` says what stays.
        """
        if aux is None:
            return
        with self._timed(self.exporter.learn, batch):
            graphs, padded_rows = self._graphs_for(batch), batch.table_rows
            if batch.max_queries > 1 and self.retriever.embeds_outside:
                # The drafts are embedded here, in an exchange that no graph may hold.
                graphs = None
            if graphs is not None and aux[0].shape[0] >= padded_rows * batch.max_queries:
                # One graph serves all steps of as many rows with padding, so it learns the padding
                # too: that goes to a row of the head's cache that nobody reads.
                name = ("learn", padded_rows, batch.max_queries)
                inputs = (batch.positions, batch.slots, *aux, *self._inputs_of_drafts(batch))
                graphs.run(name, inputs, self.retriever.learn, batch, padded_rows, aux)
            else:
                self.retriever.learn(batch, batch.num_decodes, aux)

    def configure(self, config: SpeContextConfig) -> None:
        """Change the settings between steps; see ``Retriever.configure``."""
        self.retriever.configure(config)
        if self.graphs is not None:
            self.graphs.clear()

    def warm_up(self) -> None:
        """Compile what steps launch, before a request waits for it."""
        for table, provider in self.attention:
            provider.warm_up(table)
        self.retriever.warm_up(self.selection, self._stickiness())

    def _choose_or_replay(self, batch: StepBatch) -> None:
        shape, graphs = self.retriever.shape_step(batch), self._graphs_for(batch)
        # A graph holds a single part. There are several only where the scores of all rows exceed
        # the workspace, and none without decode rows.
        if graphs is None or len(shape.parts) != 1:
            self.choose_pages(batch, shape)
            return
        # Padding rows included and contexts rounded up, so that many steps share this graph.
        shape = shape.padded(batch.table_rows)
        # Only where workers exchange something in the embedding, which no graph may hold.
        embeds = self.retriever.embed_outside(batch.without_drafts(), shape.rows)
        name, inputs = ("choose", shape), self._inputs(batch)
        graphs.run(name, inputs, self.choose_pages, batch, shape, embeds)

    def _graphs_for(self, batch: StepBatch) -> StepGraphs | None:
        """The graphs, if this step may be replayed from one."""
        return self.graphs if batch.replayable and self.retriever.capturable else None

    def _inputs(self, batch: StepBatch) -> tuple[Tensor, ...]:
        """The tensors of a step that may lie elsewhere in another step of the same shape."""
        return (
            batch.token_ids,
            batch.positions,
            batch.slots,
            batch.seq_lens,
            batch.block_table,
            *batch.other_block_tables,
            self.selection.pages,
            self.selection.lengths,
            *self._inputs_of_drafts(batch),
        )

    @staticmethod
    def _inputs_of_drafts(batch: StepBatch) -> tuple[Tensor, ...]:
        """Those that only steps with drafts read, before the model or after it."""
        if batch.max_queries == 1:
            return ()
        kept = () if batch.kept is None else (batch.kept,)
        return batch.token_ids, batch.query_starts, batch.block_table, *kept

    def _stickiness(self) -> Stickiness | None:
        """By how much a page that must be fetched has to beat one that is in a hot buffer; None
        where nothing is fetched, or where the setting is 0.
        """
        margin = math.log1p(self.retriever.config.stickiness)
        return None if self.tiers is None or not margin else self.tiers.stickiness(margin)

    def _timed(self, watch: Stopwatch, batch: StepBatch) -> AbstractContextManager[None]:
        return watch.lap() if self.exporter.counting and batch.num_decodes else nullcontext()
