"""What a step's layers are told: the page table, and which rows read it.

vLLM: the interface of a metadata builder.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from vllm.v1.attention.backend import (
    AttentionCGSupport,
    AttentionMetadataBuilder,
    CommonAttentionMetadata,
)

from specontext_vllm.attention.provider import AttentionProvider, PrefillRows
from specontext_vllm.config import SpeContextConfig
from specontext_vllm.engine.drafts import num_drafts
from specontext_vllm.engine.names import LAYER_GROUPS_KEY
from specontext_vllm.residency.table_rows import table_rows
from specontext_vllm.retrieval.draft_lists import DraftLists
from specontext_vllm.step_data import PageTable, RowQueries


@dataclass
class SpeContextMetadata:
    """One step's attention, shared by all layers.

    Attributes:
        num_decodes: leading rows that decode; they read ``table``.
        decode_tokens: their query tokens.
        queries: which of these are whose; None: one a row.
        table: the page table, filled before the first layer; where the head has queries for groups
            of layers, the tables of all of them.
        prefill: the prompt rows after them, or None.
        num_tokens: query tokens of the step (with a FULL graph: padding included).
        common: vLLM's own description of the step, for retrievers that select per layer and the
            adapter of the V1 runner.
        selects: whether retrievers that select per layer do so in this step.
    """

    num_decodes: int
    decode_tokens: int
    queries: RowQueries | None
    table: PageTable
    prefill: PrefillRows | None
    num_tokens: int
    common: CommonAttentionMetadata
    selects: bool = True


def max_table_rows(vllm_config: Any) -> int:
    """The largest number of decode rows in a step, padding to a captured size included."""
    return table_rows(
        vllm_config.scheduler_config.max_num_seqs,
        vllm_config.compilation_config.max_cudagraph_capture_size or 0,
    )


class SpeContextMetadataBuilder(AttentionMetadataBuilder[SpeContextMetadata]):
    """Owns the page table and the provider that plans; the runtime fills the table in each step.
    One of layers that nobody selects for, a drafter's, has all rows attend densely, or with
    ``draft_lists`` those of one token read these.

    Implements: vllm.v1.attention.backend.AttentionMetadataBuilder
    """

    draft_lists: DraftLists | None = None

    def __init__(
        self, kv_cache_spec: Any, layer_names: list[str], vllm_config: Any, device: torch.device
    ) -> None:
        """Make the page table.

        Uses: vllm.config.compilation.CompilationConfig.static_forward_context
        Symptom: on the V1 runner prompt rows of one token stand among the decode rows.
        Reason: the runner sorts a step's rows by a threshold that only this private method sets.
        Remove when: a builder can state its threshold.
        """
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)
        # Decode rows lead the batch, then prompt rows of one token (the V1 runner sorts by this
        # threshold; the V2 runner by our adapter).
        self._init_reorder_batch_threshold(1, supports_spec_as_decode=True)
        self.max_queries = 1 + num_drafts(vllm_config)
        config = SpeContextConfig.from_additional_config(vllm_config.additional_config)
        max_model_len = vllm_config.model_config.max_model_len
        width = config.allocated_table_pages(max_model_len, device.type, num_drafts(vllm_config))
        self.table = PageTable.allocate(
            max_table_rows(vllm_config),
            kv_cache_spec.num_kv_heads,
            width,
            device,
            groups=vllm_config.additional_config.get(LAYER_GROUPS_KEY, 1),
        )
        layers = [
            vllm_config.compilation_config.static_forward_context[name] for name in layer_names
        ]
        # All layers of a group have one shape, so the first layer's provider can plan for all of
        # them.
        self.provider: AttentionProvider = layers[0].impl.provider
        for layer in layers:
            layer.impl.provider = self.provider
        self.is_lossless = config.is_lossless
        self.is_dense = not any(layer.impl.is_selected_for for layer in layers)

    @classmethod
    def get_cudagraph_support(cls, vllm_config: Any, kv_cache_spec: Any) -> AttentionCGSupport:
        """Decode rows of one token, or of as many drafts each."""
        if num_drafts(vllm_config):
            return AttentionCGSupport.UNIFORM_BATCH
        return AttentionCGSupport.UNIFORM_SINGLE_TOKEN_DECODE

    def build(
        self,
        common_prefix_len: int,
        common_attn_metadata: CommonAttentionMetadata,
        fast_build: bool = False,
    ) -> SpeContextMetadata:
        common = common_attn_metadata
        if self.draft_lists is not None and common.max_query_len == 1:
            self.draft_lists.lengthen(common.seq_lens[: common.num_reqs])
            table, rows = self.draft_lists.table, common.num_reqs
            tokens = common.num_actual_tokens
            return SpeContextMetadata(rows, rows, None, table, None, tokens, common)
        decodes = 0 if self.is_dense else self._leading_decodes(common)
        decode_tokens, queries = decodes, None
        if decodes and common.max_query_len > 1:
            starts = common.query_start_loc_cpu[: decodes + 1]
            if int(starts.diff().max()) > 1:
                decode_tokens = int(starts[-1])
                queries = RowQueries(common.query_start_loc[: decodes + 1], self.max_queries)
        prefill = None
        if decodes < common.num_reqs:
            starts = common.query_start_loc[decodes : common.num_reqs + 1]
            prefill = PrefillRows(
                starts=starts - decode_tokens if decodes else starts,
                seq_lens=common.seq_lens[decodes : common.num_reqs],
                block_table=common.block_table_tensor[decodes : common.num_reqs],
                max_query_len=common.max_query_len,
                max_seq_len=common.max_seq_len,
                offsets=(
                    common.query_start_loc_cpu[decodes : common.num_reqs + 1] - decode_tokens
                ).tolist(),
            )
        return SpeContextMetadata(
            decodes,
            decode_tokens,
            queries,
            self.table,
            prefill,
            common.num_actual_tokens,
            common,
            selects=not self.is_lossless,
        )

    def build_draft(self, common: CommonAttentionMetadata) -> SpeContextMetadata:
        """Lossless mode: metadata of a pass in which rows of one token each make drafts."""
        return replace(self.build(0, common), selects=True)

    def build_for_cudagraph_capture(
        self, common_attn_metadata: CommonAttentionMetadata
    ) -> SpeContextMetadata:
        metadata = self.build(0, common_attn_metadata)
        # Captured kernels also run once: give them something harmless to read, the first tokens of
        # block 0.
        self.table.pages.zero_()
        self.table.lengths.fill_(1 if metadata.queries is None else self.max_queries)
        self.provider.plan(self.table, metadata.num_decodes)
        return metadata

    def _leading_decodes(self, common: CommonAttentionMetadata) -> int:
        """Rows, padding included, in front of the first with prompt tokens or with more than a
        token and its drafts.
        """
        prompts = common.is_prefilling
        if common.max_query_len <= 1 and (prompts is None or not prompts.any()):
            return common.num_reqs
        is_prefill = common.query_start_loc_cpu.diff()[: common.num_reqs] > self.max_queries
        if prompts is not None:
            # Not told of padding.
            is_prefill[: len(prompts)] |= prompts[: len(is_prefill)]
        return int(is_prefill.int().argmax()) if is_prefill.any() else common.num_reqs
