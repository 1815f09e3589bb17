"""The retriever in the worker itself: its head, its rule and the scoring workspace."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from specontext_vllm.config import PAGE_SIZE, ConfigError, SpeContextConfig, pages_for
from specontext_vllm.retrieval.cache import HeadCache
from specontext_vllm.retrieval.cached_head import CachedHead
from specontext_vllm.retrieval.counters import Counters
from specontext_vllm.retrieval.head import RetrievalHead
from specontext_vllm.retrieval.row_budgets import RowBudgets
from specontext_vllm.retrieval.rules import make_rule
from specontext_vllm.retrieval.scoring import WORKSPACE_BYTES, ScoreInputs, row_starts
from specontext_vllm.retrieval.selection import Fallback, fill_lengths, select_rows
from specontext_vllm.step_data import (
    PageScores,
    RowPart,
    Selection,
    StepBatch,
    StepShape,
    Stickiness,
)


class LocalRetriever:
    """A ``Retriever`` that scores and selects on the worker's own device. Nothing waits for a GPU.

    Args:
        config: validated settings.
        head: the retrieval head, or None for a rule that needs none.
        embed: token ids ``[N]`` -> the target's embeddings ``[N, E]``.
        num_kv_heads: KV heads of the target on this worker.
        max_model_len: longest context, in tokens.
        table_pages: columns of the page table: no selection may keep more pages.
        device: where everything lives.
        max_rows: the largest number of decode rows of a step, padding included.
        embeds_outside: no graph may hold ``embed``, because workers exchange something in it.
        num_drafts: drafts of a row, at the most.
    """

    def __init__(
        self,
        config: SpeContextConfig,
        head: RetrievalHead | None,
        embed: Callable[[Tensor], Tensor],
        *,
        num_kv_heads: int,
        max_model_len: int,
        table_pages: int,
        device: torch.device,
        max_rows: int,
        embeds_outside: bool = False,
        num_drafts: int = 0,
    ) -> None:
        self.embeds_outside, self.num_drafts = embeds_outside, num_drafts
        self.config, self.num_kv_heads, self.device = config, num_kv_heads, device
        self.head = (
            None
            if head is None
            else CachedHead(head, embed, config.head_key_dtype, device, max_rows)
        )
        self.max_model_len, self.max_pages = max_model_len, pages_for(max_model_len)
        self.table_pages = table_pages
        queries = num_kv_heads if head is None else head.spec.num_heads
        # As many rows at once whatever the groups: a graph holds no second part.
        groups = 1 if head is None else head.spec.layer_groups
        capacity = max(self.max_pages, WORKSPACE_BYTES // (8 * queries // groups))
        self.scores = PageScores.allocate(queries, num_kv_heads * groups, capacity, device)
        self.budgets = RowBudgets(
            config,
            max_rows=max_rows,
            max_pages=self.max_pages,
            table_pages=self._selected_pages,
            device=device,
        )
        self._take_settings(config)
        self.counters = Counters(device)
        self._embeds: Tensor | None = None
        if head is not None and embeds_outside:
            self._embeds = torch.zeros(
                max_rows, head.spec.embed_size, dtype=head.dtype, device=device
            )

    @property
    def reads_aux(self) -> bool:
        """See ``Retriever``."""
        return self.head is not None

    @property
    def has_head(self) -> bool:
        """Whether rules that need a head can be had."""
        return self.head is not None

    @property
    def row_totals(self) -> Tensor:
        """See ``Retriever``."""
        return self.budgets.totals

    @property
    def key_dtype(self) -> torch.dtype | None:
        """See ``Retriever``."""
        return None if self.head is None else self.head.key_dtype

    @property
    def _selected_pages(self) -> int:
        """Columns of the page table without those for pages that drafts begin; all where it holds
        the longest context anyway.
        """
        if self.table_pages >= self.max_pages:
            return self.table_pages
        return self.table_pages - pages_for(self.num_drafts)

    @property
    def capturable(self) -> bool:
        """See ``Retriever``. What selects per layer is captured with the layers, by vLLM."""
        return self.rule.capturable and not self.rule.per_layer

    @property
    def bytes_per_block(self) -> int:
        """See ``Retriever``."""
        return 0 if self.head is None else self.head.bytes_per_block

    @property
    def cache(self) -> HeadCache:
        """The head's caches, where there is a head and ``allocate_cache`` was called."""
        assert self.head is not None
        return self.head.cache

    # -- a step

    def select_eagerly(
        self, batch: StepBatch, selection: Selection, stickiness: Stickiness | None = None
    ) -> None:
        """All stages from tokens to a selection, launched one by one; ``DecodeStep`` has the same
        stages, those of the tiers, and graphs.
        """
        shape = self.shape_step(batch)
        queries = self.project(batch, shape)
        for part in shape.parts:
            scores = self.score(batch, shape, part, queries)
            self.select(batch, shape, part, scores, selection, stickiness)

    def shape_step(self, batch: StepBatch) -> StepShape:
        """See ``Retriever.shape_step``."""
        if batch.table_rows == 0:
            return StepShape(0, chooses=False, parts=())
        decodes = batch.num_decodes
        bounds = [pages_for(n) for n in batch.seq_lens_bound[:decodes]]
        totals = self.budgets.place(batch.budgets, decodes)
        if batch.dense:
            totals = [self.max_pages] * decodes
        read = [min(pair) for pair in zip(bounds, totals, strict=True)]
        chooses = read != bounds
        if self.config.stats:
            self.counters.count_step(
                self.num_kv_heads,
                read,
                bounds,
                chooses=chooses and not self.rule.per_layer,
                budgets=batch.budgets,
            )
        if not chooses or self.rule.per_layer:
            parts: tuple[RowPart, ...] = (RowPart(range(batch.table_rows), 1),)
        else:
            parts = tuple(self._parts(bounds, batch.table_rows))
        return StepShape(decodes, chooses, parts, batch.max_queries, batch.dense)

    def embed_outside(self, batch: StepBatch, rows: int) -> Tensor | None:
        """See ``Retriever.embed_outside``."""
        if self._embeds is None or self.head is None:
            return None
        return self._embeds[:rows].copy_(self.head.embed(batch.token_ids[:rows]))

    def project(
        self, batch: StepBatch, shape: StepShape, embeds: Tensor | None = None
    ) -> Tensor | None:
        """See ``Retriever.project``."""
        head, rows = self.head, shape.rows
        if head is None or rows == 0:
            return None
        if embeds is None:
            embeds = head.embed(batch.token_ids[:rows])
        return head.project(
            batch, rows, embeds, with_queries=shape.chooses and self.rule.needs_head
        )

    def score(
        self, batch: StepBatch, shape: StepShape, part: RowPart, queries: Tensor | None
    ) -> PageScores:
        """See ``Retriever.score``. Rows that are all read whole need no scores."""
        if self.rule.per_layer or not shape.chooses:
            return self.scores
        starts = row_starts(batch.seq_lens, part.rows)
        inputs = ScoreInputs(
            batch.block_table,
            batch.seq_lens,
            starts,
            part.rows,
            max_pages=part.max_pages,
            min_pages=self.budgets.totals,
            queries=queries,
            keys=None if self.head is None else self.head.cache.keys,
            keyless=1 if self.head is not None and self.head.keys_follow else 0,
        )
        return replace(self.rule.score(inputs, self.scores), starts=starts)

    def select(
        self,
        batch: StepBatch,
        shape: StepShape,
        part: RowPart,
        scores: PageScores,
        selection: Selection,
        stickiness: Stickiness | None = None,
    ) -> None:
        """See ``Retriever.select``."""
        if self.rule.per_layer and not shape.dense:
            fill_lengths(batch.seq_lens[: batch.table_rows], selection, self.budgets.totals)
            return
        fallback = self._fallback if shape.chooses else None
        select_rows(
            scores,
            batch.seq_lens,
            batch.seq_lens if scores.starts is None else scores.starts,
            batch.block_table if selection.page_ids is None else selection.page_ids,
            selection,
            self.budgets.everything if shape.dense else self.budgets.totals,
            sinks=self.config.sink_pages,
            recents=self.config.recent_pages,
            rows=part.rows,
            fallback=fallback,
            stickiness=stickiness,
        )
        if self.config.stats and shape.chooses:
            rows = slice(part.rows.start, part.rows.stop)
            kept = selection.kept_mass[rows]
            self.counters.count_choice(kept, batch.seq_lens[rows])
            if fallback is not None:
                heads = self.num_kv_heads
                lengths = selection.lengths[rows.start * heads : rows.stop * heads]
                budgets = self.budgets.totals[rows]
                self.counters.count_fallback(kept, lengths, budgets, fallback.threshold)

    def read_whole(self, batch: StepBatch, row: int, selection: Selection) -> None:
        """Write all pages of one row into ``selection``."""
        select_rows(
            self.scores,
            batch.seq_lens,
            batch.seq_lens,
            batch.block_table if selection.page_ids is None else selection.page_ids,
            selection,
            self.budgets.everything,
            sinks=self.config.sink_pages,
            recents=self.config.recent_pages,
            rows=range(row, row + 1),
        )

    def learn(self, batch: StepBatch, rows: int, aux: Sequence[Tensor]) -> None:
        """See ``Retriever.learn``."""
        if self.head is None:
            return
        if batch.max_queries > 1:
            # What was kept of the rows with drafts is known only now.
            self.head.learn_rows(batch, 0, max(rows, batch.num_rows), aux)
            return
        if rows:
            self.head.learn_decodes(batch, rows, aux)
        if rows < batch.num_rows:
            self.head.learn_rows(batch, batch.num_decodes, batch.num_rows, aux)

    def _parts(self, bounds: list[int], table_rows: int) -> Iterator[RowPart]:
        """Consecutive rows whose pages fit the workspace; padding rows join the last part."""
        first, pages = 0, 0
        for row, count in enumerate(bounds):
            if pages + count > self.scores.capacity:
                yield RowPart(range(first, row), max(bounds[first:row]))
                first, pages = row, 0
            pages += count
        yield RowPart(range(first, table_rows), max(bounds[first:], default=1))

    # -- an engine

    def allocate_cache(self, num_blocks: int) -> None:
        """See ``Retriever.allocate_cache``."""
        if self.head is not None:
            self.head.allocate(num_blocks)

    def shrink(self, max_model_len: int, table_pages: int) -> None:
        """See ``Retriever.shrink``."""
        self.max_model_len, self.max_pages = max_model_len, pages_for(max_model_len)
        self.table_pages = table_pages
        self._take_settings(self.config)

    def configure(self, config: SpeContextConfig) -> None:
        """See ``Retriever.configure``."""
        needed = config.table_pages(self.max_pages * PAGE_SIZE, self.num_drafts)
        if needed > self.table_pages:
            raise ConfigError(
                f"specontext: this engine's page table holds {self.table_pages * PAGE_SIZE} tokens "
                "a head and these settings "
                f"read up to {needed * PAGE_SIZE}; start it with that budget (or retriever dense)."
            )
        if config.rule.needs_head and not self.has_head:
            raise ConfigError(
                f"specontext: retriever {config.retriever} needs a retrieval head and this engine "
                "was started without one."
            )
        self._take_settings(config)

    def _take_settings(self, config: SpeContextConfig) -> None:
        # First what may refuse: then the settings before stay whole.
        self.rule = make_rule(config.retriever, config.rule_settings, self.device)
        self.config = config
        self.budgets.take_settings(config, self.max_pages, self._selected_pages)
        # The kept mass that a fallback goes by is the head's.
        self._fallback = None
        if self.rule.needs_head and config.confidence_threshold > 0:
            self._fallback = Fallback(config.confidence_threshold, self.budgets.fallbacks)

    def profile(self, num_tokens: int) -> None:
        """See ``Retriever.profile``."""
        if self.head is not None:
            self.head.profile(num_tokens)

    @torch.inference_mode()
    def warm_up(self, selection: Selection, stickiness: Stickiness | None = None) -> None:
        """Run a step that reads all and one that chooses, with a row just longer than the budget,
        so that Triton compiles its kernels before a request waits for them.
        """
        # The head knows no position beyond the model's longest context, which may end within a
        # page.
        tokens = min((self.config.budget_pages + 1) * PAGE_SIZE, self.max_model_len)

        for length in (min(PAGE_SIZE, tokens), tokens):
            batch = StepBatch.in_block_0(length, self.max_pages, self.device)
            self.select_eagerly(batch, selection, stickiness)
            if self.head is not None:
                self.learn(batch, 1, self.head.blank_aux(1))
        self.counters.clear()

    def stats(self, reset: bool = False) -> dict[str, float | int | str | None]:
        """Figures since the last reset: pages read and held (per KV head), rows that fell back,
        mean kept mass (None for selections per layer).
        """
        counted = self.counters.stats(reset)
        if self.rule.per_layer:
            counted["kept_mass_mean"] = None
        return {"retriever": self.config.retriever, "budget": self.config.budget, **counted}

    def sidecar_figures(self) -> dict[str, float]:
        """There is no sidecar."""
        return {}

    def close(self) -> None:
        """Nothing outlives the worker."""
