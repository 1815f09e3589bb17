"""NaN where nothing may be read, while an engine answers."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch

from specontext_vllm.config import PAGE_SIZE, pages_for


def poison_unread(runner: Any, out: dict[str, Any]) -> None:
    """From now on the head pages of a step's requests that are not in a layer's page table are NaN
    there while the model runs, in every layer of ours.
    """
    runtime, step = runner.runtime, runner.runtime.step
    context = runtime.vllm_config.compilation_config.static_forward_context
    before, after, kept = step.before_model, step.after_model, []

    def before_model(batch: Any) -> None:
        before(batch)
        kept.clear()
        if batch.num_decodes < batch.num_rows:
            return
        block_tables = (batch.block_table, *batch.other_block_tables)
        each = zip(runtime.kv_groups, step.attention, block_tables, strict=True)
        for group, (table, _), block_table in each:
            layers = [context[name] for name in group.layer_names]
            # Where the head has queries for groups of layers, each of them has a table.
            for own in {
                id(layer.impl.group_table): layer.impl.group_table for layer in layers
            }.values():
                caches = [layer.kv_cache for layer in layers if layer.impl.group_table is own]
                poison(batch, own or table, block_table, caches)

    def poison(batch: Any, table: Any, block_table: torch.Tensor, caches: list[Any]) -> None:
        heads = table.num_kv_heads
        unread = torch.zeros(caches[0].shape[0] * heads, dtype=torch.bool)
        for row, tokens in enumerate(batch.seq_lens_bound):
            pages = block_table[row, : pages_for(tokens)].long()
            unread[(pages[:, None] * heads + torch.arange(heads)).flatten()] = True
        for sequence in range(batch.num_rows * heads):
            count = pages_for(int(table.lengths[sequence]))
            unread[table.pages[sequence, :count].long()] = False
        out["poisoned pages"] = out.get("poisoned pages", 0) + int(unread.sum())
        for cache in caches:
            pages = cache.view(-1, *cache.shape[2:])
            kept.append((pages, unread, pages[unread].clone()))
            pages[unread] = float("nan")

    def after_model(batch: Any, aux: Any) -> None:
        for pages, unread, content in kept:
            pages[unread] = content
        kept.clear()
        after(batch, aux)

    step.before_model, step.after_model = before_model, after_model


def poison_stale(runner: Any, out: dict[str, Any]) -> None:
    """From now on what decode rows have in place of tokens that are not computed yet is NaN when a
    step begins, as drafts that were rejected might have left it: the head's keys and fused states,
    and keys and values of our layers.
    """
    runtime, step = runner.runtime, runner.runtime.step
    context = runtime.vllm_config.compilation_config.static_forward_context
    caches = [context[name].kv_cache for name in runtime.layers.names]
    before, cache = step.before_model, runtime.retriever.cache

    def before_model(batch: Any) -> None:
        starts = batch.query_starts.tolist()
        for row in range(batch.num_decodes):
            first = int(batch.positions[starts[row]])
            places = torch.arange(first, pages_for(batch.seq_lens_bound[row]) * PAGE_SIZE)
            pages = batch.block_table[row, places // PAGE_SIZE].long()
            for kv in (*caches, cache.keys):
                kv[pages, :, places % PAGE_SIZE] = float("nan")
            begun = places[places % PAGE_SIZE == 0] // PAGE_SIZE
            cache.fused[batch.block_table[row, begun].long()] = float("nan")
            out["stale places"] = out.get("stale places", 0) + len(places)
        before(batch)

    step.before_model = before_model


@contextmanager
def poisoned_drafts(runner: Any) -> Iterator[Counter[str]]:
    """Within the block, while a drafter's layer reads lists of pages, all of its KV that is in no
    list is NaN. Yielded is how many pages of the rows' contexts that were, of how many.
    """
    lists, seen = runner.runtime.step.draft_lists, Counter[str]()
    heads = lists.table.num_kv_heads

    def reading_lists(original: Any) -> Any:
        def forward(*args: Any, **to: Any) -> Any:
            _, _, _, _, cache, metadata = args
            if metadata is None or metadata.table is not lists.table:
                return original(*args, **to)
            pages = cache.view(-1, *cache.shape[2:])
            unread = torch.ones(len(pages), dtype=torch.bool)
            for sequence in range(metadata.num_decodes * heads):
                count = pages_for(int(lists.table.lengths[sequence]))
                unread[lists.table.pages[sequence, :count].long()] = False
                seen["read"] += count
                seen["held"] += pages_for(int(metadata.common.seq_lens[sequence // heads]))
            kept = pages[unread].clone()
            pages[unread] = float("nan")
            result = original(*args, **to)
            pages[unread] = kept
            return result

        return forward

    context = runner.vllm_config.compilation_config.static_forward_context
    ours = set(runner.runtime.layers.names)
    with pytest.MonkeyPatch.context() as patch:
        for name in set(runner.runtime.attention_groups[0].layer_names) - ours:
            impl = context[name].impl
            patch.setattr(impl, "forward", reading_lists(impl.forward))
        yield seen
