"""The retrieval head at work: selects pages before a step's forward pass, learns the step's tokens
after it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from specontext_vllm.config import PAGE_SIZE, ConfigError, SpeContextConfig, pages_for
from specontext_vllm.retrieval.cache import HeadCache, head_key_dtype
from specontext_vllm.retrieval.counters import (
    CHOOSING_ROWS,
    DECODE_ROWS,
    FALLBACK_PAGES,
    FALLBACK_ROWS,
    KEPT_MASS,
    PAGES_HELD,
    PAGES_READ,
    STEPS,
    Counters,
)
from specontext_vllm.retrieval.graphs import StepGraphs, bucket
from specontext_vllm.retrieval.head import RetrievalHead
from specontext_vllm.retrieval.reference import Budget
from specontext_vllm.retrieval.rules import make_rule
from specontext_vllm.retrieval.scoring import WORKSPACE_BYTES, ScoreInputs, row_starts
from specontext_vllm.retrieval.selection import Fallback, fill_lengths, select_rows
from specontext_vllm.step_data import PageScores, Selection, StepBatch, Stickiness

PREFILL_CHUNK = 2048
"""Prompt tokens whose keys are made at a time, which bounds the head's activations."""


class LocalRetriever:
    """Owns the head, its caches and the scoring workspace of one worker.

    ``before_forward`` fills the page table that all layers of the step read; ``after_forward``
    turns the step's auxiliary hidden states into keys. Nothing between them waits for the GPU.

    Args:
        config: validated settings.
        head: the retrieval head, or None for a retriever that needs none.
        embed: token ids ``[N]`` -> the target's embeddings ``[N, E]``.
        num_kv_heads: KV heads of the target on this worker.
        max_model_len: longest context, in tokens.
        table_pages: columns of the page table: no selection may keep more pages.
        device: where everything lives.
        graphs: replays of steps without prompt tokens; None: everything runs eagerly.
        embeds_apart: ``embed`` may not be captured, since it exchanges something with other
            workers, say.
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
        graphs: StepGraphs | None = None,
        embeds_apart: bool = False,
    ) -> None:
        self.config, self.head, self.num_kv_heads, self.device = config, head, num_kv_heads, device
        self.embed = embed if head is None or head.embed_tokens is None else head.embed
        self.max_model_len, self.max_pages = max_model_len, pages_for(max_model_len)
        self.table_pages = table_pages
        self.key_dtype = (
            None
            if head is None
            else head_key_dtype(config.head_key_dtype, head.fc_weight.dtype, device)
        )
        self.cache: HeadCache | None = None
        queries = num_kv_heads if head is None else head.spec.num_heads
        capacity = max(self.max_pages, WORKSPACE_BYTES // (8 * queries))
        self.scores = PageScores.allocate(queries, num_kv_heads, capacity, device)
        self.rule = make_rule(config.retriever, config.rule_settings, device)
        self.counters = Counters(device)
        self._graphs, self._embeds_apart = graphs, embeds_apart
        self._kept_mass = torch.ones(0, num_kv_heads, dtype=torch.float32, device=device)
        self._embeds = torch.zeros(0, 0, device=device)

    @property
    def reads_aux(self) -> bool:
        """Whether ``after_forward`` wants the model's auxiliary hidden states."""
        return self.head is not None

    def allocate_cache(self, num_blocks: int) -> None:
        """Make room for ``num_blocks`` pages of KV."""
        if self._graphs is not None:
            self._graphs.clear()
        if self.head is not None:
            spec, dtype = self.head.spec, self.head.fc_weight.dtype
            self.cache = HeadCache.allocate(
                num_blocks,
                spec.num_kv_heads,
                spec.head_dim,
                spec.hidden_size,
                dtype,
                self.key_dtype,
                self.device,
            )

    @property
    def bytes_per_block(self) -> int:
        """Bytes the head's caches take for one page."""
        if self.head is None:
            return 0
        spec = self.head.spec
        return HeadCache.bytes_per_block(
            spec.num_kv_heads,
            spec.head_dim,
            spec.hidden_size,
            self.head.fc_weight.dtype,
            self.key_dtype,
        )

    def shrink(self, max_model_len: int, table_pages: int) -> None:
        """Before the first step: contexts are shorter, and the page table narrower, than was said
        at first.
        """
        self.max_model_len, self.max_pages, self.table_pages = (
            max_model_len,
            pages_for(max_model_len),
            table_pages,
        )

    def configure(self, config: SpeContextConfig) -> None:
        """Change the settings between steps; the head and the table's width stay.

        Raises:
            ConfigError: the page table is too narrow, or there is no head for a rule that needs one.
        """
        needed = config.table_pages(self.max_pages * PAGE_SIZE)
        if needed > self.table_pages:
            raise ConfigError(
                f"specontext: this engine's page table holds {self.table_pages * PAGE_SIZE} tokens "
                "a head and these settings "
                f"read up to {needed * PAGE_SIZE}; start it with that budget (or retriever dense)."
            )
        if config.rule.needs_head and self.head is None:
            raise ConfigError(
                f"specontext: retriever {config.retriever} needs a retrieval head and this engine "
                "was started without one."
            )
        self.config = config
        self.rule = make_rule(config.retriever, config.rule_settings, self.device)
        if self._graphs is not None:
            self._graphs.clear()

    # -- before the forward pass
    # --------------------------------------------------------------------------------------

    def before_forward(
        self,
        batch: StepBatch,
        pages: Tensor,
        lengths: Tensor,
        ids: Tensor | None = None,
        stickiness: Stickiness | None = None,
        behind: Callable[[], None] | None = None,
    ) -> None:
        """Fill the page table of the step's decode rows; for a retriever that selects per layer
        only its lengths.

        Args:
            batch: the step.
            pages: ``[>= table_rows * H, K]`` int32, written.
            lengths: ``[>= table_rows * H]`` int32, written; 0 for padding rows.
            stickiness: pages that selection sticks to.
            ids: ``[>= table_rows, W]`` int32 what a page is called in ``pages``; default the block
                table's ids.
            behind: enqueues what follows the selection, and is captured with it; left out of a step
                without decode rows.
        """
        if batch.table_rows == 0:
            return
        self._make_room(pages.shape[0] // self.num_kv_heads)
        config, decodes = self.config, batch.num_decodes
        bounds = [pages_for(n) for n in batch.seq_lens_bound[:decodes]]
        budget, _ = self._budget()
        choosing = max(bounds, default=0) > budget.total
        if config.stats:
            heads = self.num_kv_heads
            read, held_pages = (
                heads * sum(min(count, budget.total) for count in bounds),
                heads * sum(bounds),
            )
            self.counters.count_rows(
                decodes,
                decodes if choosing and not self.rule.per_layer else 0,
                read,
                held_pages,
            )
        parts = [
            (rows, max(bounds[rows.start : rows.stop], default=1))
            for rows in self._parts(bounds, batch.table_rows)
        ]
        inputs = (
            batch.token_ids,
            batch.positions,
            batch.slots,
            batch.seq_lens,
            batch.block_table,
            pages,
            lengths,
        )
        if not self._replays(batch) or len(parts) > 1:
            embeds = (
                self.embed(batch.token_ids[:decodes]) if self.head is not None and decodes else None
            )
            self._select(batch, decodes, embeds, choosing, parts, pages, lengths, ids, stickiness)
            if behind is not None:
                behind()
            return
        # The graph's rows include the padding's, which read nothing and write to nowhere.
        rows, embeds = batch.table_rows, None
        if self._embeds_apart and self.head is not None:
            embeds = self._embeds[:rows]
            embeds.copy_(self.embed(batch.token_ids[:rows]))
        parts = [(range(rows), bucket(parts[0][1]))] if choosing else [(range(rows), 1)]

        def work() -> None:
            found = (
                self.embed(batch.token_ids[:rows])
                if embeds is None and self.head is not None
                else embeds
            )
            self._select(batch, rows, found, choosing, parts, pages, lengths, ids, stickiness)
            if behind is not None:
                behind()

        self._graphs.run(("select", rows, choosing, parts[0][1]), inputs, work)

    def _replays(self, batch: StepBatch) -> bool:
        # What selects per layer is captured with the layers.
        return (
            self._graphs is not None
            and batch.replayable
            and self.rule.capturable
            and not self.rule.per_layer
        )

    def _budget(self) -> tuple[Budget, Fallback | None]:
        """What a row may read, and the fallback of a rule whose kept mass is the head's."""
        if self.rule.reads_everything:
            return Budget.everything(self.max_pages), None
        return Budget.of(self.config), Fallback.of(self.config) if self.rule.needs_head else None

    def _make_room(self, most_rows: int) -> None:
        """Buffers for every row that the page table has; a graph holds their addresses, so they are
        made once.
        """
        if self._kept_mass.shape[0] < most_rows:
            self._kept_mass = torch.ones(
                most_rows, self.num_kv_heads, dtype=torch.float32, device=self.device
            )
            if self._embeds_apart and self.head is not None:
                spec, dtype = self.head.spec, self.head.qk_weight.dtype
                self._embeds = torch.zeros(
                    most_rows, spec.embed_size, dtype=dtype, device=self.device
                )

    def _select(
        self,
        batch: StepBatch,
        decodes: int,
        embeds: Tensor | None,
        choosing: bool,
        parts: Sequence[tuple[range, int]],
        pages: Tensor,
        lengths: Tensor,
        ids: Tensor | None,
        stickiness: Stickiness | None,
    ) -> None:
        """The device's part of ``before_forward``.

        Args:
            decodes: leading rows whose keys are made. embeds: ``[decodes, E]`` embeddings of their
                tokens, if there is a head.
            choosing: whether some row may have more pages than the budget.
            parts: rows that are scored together, and an upper bound of their pages.
        """
        config = self.config
        budget, fallback = self._budget()
        queries = None
        if embeds is not None:
            queries = self._project_decodes(
                batch, decodes, embeds, with_queries=choosing and self.rule.needs_head
            )
        selection = Selection(pages, lengths, self._kept_mass)
        if self.rule.per_layer:
            fill_lengths(batch.seq_lens[: batch.table_rows], selection, budget)
            return
        for rows, most in parts:
            # Rows that are all read whole have no scores to find.
            starts = row_starts(batch.seq_lens, rows) if choosing else batch.seq_lens
            scores = self.scores
            if choosing:
                inputs = ScoreInputs(
                    batch.block_table,
                    batch.seq_lens,
                    starts,
                    rows,
                    max_pages=most,
                    min_pages=budget.total,
                    queries=queries,
                    keys=None if self.cache is None else self.cache.keys,
                )
                scores = self.rule.score(inputs, self.scores)
            select_rows(
                scores,
                batch.seq_lens,
                starts,
                batch.block_table if ids is None else ids,
                selection,
                budget,
                rows=rows,
                fallback=fallback if choosing else None,
                stickiness=stickiness,
            )
        if config.stats and choosing:
            kept = self._kept_mass[:decodes]
            self.counters.count_choice(kept, batch.seq_lens)
            if fallback is not None:
                read = (lengths[: decodes * self.num_kv_heads] + PAGE_SIZE - 1) // PAGE_SIZE
                self.counters.count_fallback(
                    (kept.mean(-1) < fallback.threshold).sum(),
                    (read - budget.total).clamp(min=0).sum(),
                )

    def _parts(self, bounds: list[int], table_rows: int) -> Iterator[range]:
        """Consecutive rows whose pages fit the workspace; padding rows join the last part."""
        first, held = 0, 0
        for row, count in enumerate(bounds):
            if held + count > self.scores.capacity:
                yield range(first, row)
                first, held = row, 0
            held += count
        yield range(first, table_rows)

    def _project_decodes(
        self, batch: StepBatch, rows: int, embeds: Tensor, *, with_queries: bool
    ) -> Tensor | None:
        """Write the keys of the first ``rows`` rows, of tokens with ``embeds [rows, E]``; return
        their queries ``[rows, NQ, D]`` if asked for.
        """
        head = self.head
        positions, slots = batch.positions[:rows], batch.slots[:rows]
        embeds = embeds.to(head.qk_weight.dtype)
        if self.device.type == "cpu":
            fused = self.cache.previous(batch.block_table[:rows], positions)
            if not with_queries:
                self.cache.write_keys(head.keys(embeds, fused, positions), slots)
                return None
            queries, keys = head.project(embeds, fused, positions)
            self.cache.write_keys(keys, slots)
            return queries
        from specontext_vllm.triton_kernels.head_input import head_input
        from specontext_vllm.triton_kernels.head_rope import rope_and_cache

        inputs = head_input(
            embeds,
            self.cache.fused,
            batch.block_table,
            positions,
            head.embed_norm,
            head.feature_norm,
            head.spec.rms_norm_eps,
            PAGE_SIZE,
        )
        skipped = 0 if with_queries else head.spec.num_heads
        first = skipped * head.spec.head_dim
        qk = F.linear(
            inputs, head.qk_weight[first:], None if head.qk_bias is None else head.qk_bias[first:]
        )
        queries = rope_and_cache(
            qk,
            head.cos_sin,
            positions,
            slots,
            self.cache.keys,
            head.spec.num_heads - skipped,
            None if head.qk_norm is None else head.qk_norm[skipped:],
            head.spec.rms_norm_eps,
        )
        return queries if with_queries else None

    # -- after the forward pass
    # ---------------------------------------------------------------------------------------

    def after_forward(self, batch: StepBatch, aux: Sequence[Tensor]) -> None:
        """Learn the step's tokens.

        Prompt tokens get their keys here, since the pair of token p+1 needs the aux of token p from
        this very pass. The decode rows' keys were written before it.

        Args:
            batch: the step that ``before_forward`` saw.
            aux: ``[>= N, H_target]`` auxiliary hidden states, one tensor per aux layer.
        """
        if self.head is None:
            return
        decodes = batch.num_decodes
        if self._replays(batch) and aux[0].shape[0] >= batch.table_rows:
            self._graphs.run(
                ("learn", batch.table_rows),
                (batch.slots, *aux),
                lambda: self._learn_decodes(batch, batch.table_rows, aux),
            )
        elif decodes:
            self._learn_decodes(batch, decodes, aux)
        if decodes == batch.num_rows:
            return
        rows = slice(decodes, batch.num_rows)
        starts = batch.query_starts[rows].long()
        last = batch.query_starts[decodes + 1 : batch.num_rows + 1].long() - 1
        before_first = self.cache.previous(batch.block_table[rows], batch.positions[starts])
        newest = None
        for begin in range(decodes, batch.num_tokens, PREFILL_CHUNK):
            end = min(begin + PREFILL_CHUNK, batch.num_tokens)
            fused = self.head.fuse([state[begin:end] for state in aux])
            previous = torch.cat([fused[:1] if newest is None else newest, fused[:-1]])
            previous = _scatter_inside(previous, starts - begin, before_first)
            span = slice(begin, end)
            embeds = self.embed(batch.token_ids[span]).to(fused.dtype)
            keys = self.head.keys(embeds, previous, batch.positions[span])
            self.cache.write_keys(keys, batch.slots[span])
            is_last = (
                _scatter_inside(
                    torch.zeros_like(batch.slots[span]), last - begin, torch.ones_like(last)
                )
                > 0
            )
            page_end = (batch.positions[span] + 1) % PAGE_SIZE == 0
            self.cache.remember(fused, batch.slots[span], page_end | is_last)
            newest = fused[-1:]

    def _learn_decodes(self, batch: StepBatch, rows: int, aux: Sequence[Tensor]) -> None:
        # One token a row: its fused aux is the newest of its page, whether or not the page is full.
        # The slot -1 of a padding row means the row of the cache that nobody reads.
        self.cache.fused[batch.slots[:rows] // PAGE_SIZE] = self.head.fuse(
            [state[:rows] for state in aux]
        )

    def profile(self, num_tokens: int) -> None:
        """Run the head's largest step on made-up data, so that vLLM's memory profile sees its
        activations.
        """
        if self.head is None:
            return
        spec, dtype = self.head.spec, self.head.fc_weight.dtype
        count = min(num_tokens, PREFILL_CHUNK)
        aux = [
            torch.zeros(num_tokens, spec.target_hidden_size, dtype=dtype, device=self.device)
            for _ in range(spec.num_aux)
        ]
        fused = self.head.fuse([state[:count] for state in aux])
        ids = torch.zeros(count, dtype=torch.int64, device=self.device)
        self.head.project(self.embed(ids).to(dtype), fused, ids)

    @torch.inference_mode()
    def warm_up(
        self,
        pages: Tensor,
        lengths: Tensor,
        ids: Tensor | None = None,
        stickiness: Stickiness | None = None,
    ) -> None:
        """Run a step that reads all and one that chooses, so that Triton compiles its kernels
        before a request waits for them.

        The one made-up row, just longer than the budget, lies in block 0, which vLLM never hands
        out.

        Args:
            pages, lengths, ids, stickiness: as in ``before_forward``; ids for one row.
        """
        # The head knows no position beyond the model's longest context, which may end within a
        # page.
        tokens = min((self.config.budget_pages + 1) * PAGE_SIZE, self.max_model_len)

        def filled(value: int, *shape: int, dtype: torch.dtype = torch.int32) -> Tensor:
            return torch.full(shape, value, dtype=dtype, device=self.device)

        for length in (min(PAGE_SIZE, tokens), tokens):
            batch = StepBatch(
                token_ids=filled(0, 1),
                positions=filled(length - 1, 1, dtype=torch.int64),
                slots=filled(0, 1, dtype=torch.int64),
                query_starts=torch.arange(2, dtype=torch.int32, device=self.device),
                seq_lens=filled(length, 1),
                block_table=filled(0, 1, self.max_pages),
                seq_lens_bound=[length],
                num_decodes=1,
                table_rows=1,
                num_tokens=1,
            )
            self.before_forward(batch, pages, lengths, ids, stickiness)
        self.counters = Counters(self.device)

    # -- figures
    # ------------------------------------------------------------------------------------------------------

    def stats(self, reset: bool = False) -> dict[str, float | int | str | None]:
        """Figures since the last reset: pages read and held (per KV head), rows that fell back,
        mean kept mass (None for selections per layer).
        """
        counted = self.counters.since_reset(reset)
        kept_mass = (
            float(counted[KEPT_MASS] / counted[CHOOSING_ROWS]) if counted[CHOOSING_ROWS] else 1.0
        )
        return {
            "retriever": self.config.retriever,
            "budget": self.config.budget,
            "steps": int(counted[STEPS]),
            "decode_rows": int(counted[DECODE_ROWS]),
            "pages_read": int(counted[PAGES_READ] + counted[FALLBACK_PAGES]),
            "pages_total": int(counted[PAGES_HELD]),
            "fallback_rows": int(counted[FALLBACK_ROWS]),
            "kept_mass_mean": None if self.rule.per_layer else kept_mass,
        }


def _scatter_inside(values: Tensor, index: Tensor, source: Tensor) -> Tensor:
    """``values [N, ...]`` with ``source[i]`` at ``index[i]`` where that lies in 0..N-1; without a
    host look at ``index``.
    """
    count = values.shape[0]
    inside = torch.where((index >= 0) & (index < count), index, count)
    return torch.cat([values, values[:1]]).index_copy(0, inside, source.to(values.dtype))[:count]
