"""The sidecar itself: a retriever on its own device that answers messages, one after the other."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F

from specontext_vllm.config import PAGE_SIZE, pages_for
from specontext_vllm.retrieval.head import RetrievalHead
from specontext_vllm.retrieval.local import LocalRetriever
from specontext_vllm.sidecar.messages import (
    Allocate,
    Configure,
    Embeddings,
    Learn,
    Learned,
    Refill,
    Select,
    Selected,
    SidecarSpec,
    Wire,
    decode,
    encode,
)
from specontext_vllm.step_data import PageTable, Selection, StepBatch


class Sidecar:
    """Owns the retrieval head and its caches. An ordinary class: ``sidecar.link`` makes a Ray actor
    of it.

    Args:
        spec: what to build.
        on_gpu: whether Ray granted a GPU, or a fraction of one; it is the process's only one then.
    """

    def __init__(self, spec: SidecarSpec, on_gpu: bool) -> None:
        self.spec, self.device = spec, torch.device("cuda" if on_gpu else "cpu")
        head = RetrievalHead(
            spec.checkpoint, max_position=spec.max_model_len, dtype=spec.dtype, device=self.device
        )
        self.embedding = torch.empty(
            spec.vocab_size, spec.embed_size, dtype=spec.dtype, device=self.device
        )
        width = pages_for(spec.max_model_len)
        config = spec.config.model_copy(update={"head_key_dtype": spec.head_key_dtype})
        self.retriever = LocalRetriever(
            config,
            head,
            lambda token_ids: F.embedding(token_ids, self.embedding),
            num_kv_heads=spec.num_kv_heads,
            max_model_len=spec.max_model_len,
            table_pages=width,
            device=self.device,
            max_rows=spec.max_rows,
        )
        self.block_table = torch.zeros(spec.max_rows, width, dtype=torch.int32, device=self.device)
        self.selection = Selection.into(
            PageTable.allocate(spec.max_rows, spec.num_kv_heads, width, self.device)
        )
        self._batch: StepBatch | None = None
        self._handlers: dict[type, Callable[[Any], Any]] = {
            Embeddings: self._embeddings,
            Allocate: self._allocate,
            Refill: self._refill,
            Configure: self._configure,
            Select: self._select,
            Learn: self._learn,
        }

    @torch.inference_mode()
    def handle(self, wire: Wire) -> Wire:
        """The reply to one message of ``sidecar.messages``, both as ``encode`` has them."""
        message = decode(wire)
        return encode(self._handlers[type(message)](message))

    def _embeddings(self, message: Embeddings) -> None:
        self.embedding[message.first : message.first + len(message.rows)] = message.rows.to(
            self.device
        )

    def _allocate(self, message: Allocate) -> None:
        self.retriever.allocate_cache(message.num_blocks)
        self.retriever.warm_up(self.selection)

    def _refill(self, message: Refill) -> None:
        blocks, cache = message.blocks.to(self.device), self.retriever.cache
        cache.write_pages(blocks, message.keys.to(self.device), message.fused.to(self.device))

    def _configure(self, message: Configure) -> None:
        self.retriever.configure(message.config)

    def _select(self, message: Select) -> Selected:
        self.block_table.view(-1)[message.changed.to(self.device)] = message.blocks.to(self.device)
        decodes = message.num_decodes
        self._batch = batch = StepBatch(
            token_ids=message.token_ids.to(self.device),
            positions=message.positions.to(self.device),
            slots=message.slots.to(self.device),
            query_starts=message.query_starts.to(self.device),
            seq_lens=message.seq_lens.to(self.device),
            block_table=self.block_table,
            seq_lens_bound=message.seq_lens_bound,
            num_decodes=decodes,
            table_rows=decodes,
            num_tokens=len(message.token_ids),
            budgets=message.budgets,
        )
        self.retriever.select_eagerly(batch, self.selection)
        rows = decodes * self.spec.num_kv_heads
        lengths = self.selection.lengths[:rows].to("cpu", copy=True)
        width = pages_for(int(lengths.max())) if rows else 0
        return Selected(
            pages=self.selection.pages[:rows, :width].contiguous().cpu(),
            lengths=lengths,
            # The worker keeps the sums, so that they outlive this process.
            counters=torch.from_numpy(self.retriever.counters.since_reset(True)),
        )

    def _learn(self, message: Learn) -> Learned:
        batch, self._batch = self._batch, None
        assert batch is not None
        aux = [state.to(self.device) for state in message.aux]
        self.retriever.learn(batch, batch.num_decodes, aux)
        touched = (batch.slots // PAGE_SIZE).unique()
        cache = self.retriever.cache
        return Learned(
            keys=cache.keys_at(batch.slots).cpu(),
            fused=cache.fused[touched].cpu(),
        )
