"""The SPECONTEXT attention backend: decode rows read the page table, prompt rows attend densely.

vLLM: the interfaces of an attention backend, and the step's metadata while a layer runs.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from vllm.config import get_current_vllm_config
from vllm.forward_context import get_forward_context
from vllm.v1.attention.backend import (
    AttentionBackend,
    AttentionCGSupport,
    AttentionImpl,
    AttentionMetadataBuilder,
    AttentionType,
    CommonAttentionMetadata,
)
from vllm.v1.kv_cache_interface import KVCacheLayout

from specontext_vllm.attention.provider import AttentionProvider, PrefillRows
from specontext_vllm.attention.registry import choose_provider
from specontext_vllm.config import PAGE_SIZE, ConfigError, SpeContextConfig
from specontext_vllm.engine.names import BACKEND_NAME
from specontext_vllm.residency.table_rows import table_rows
from specontext_vllm.residency.tiers import TieredKV
from specontext_vllm.retrieval.layer_selection import LayerSelector
from specontext_vllm.step_data import PageTable


class SpeContextBackend(AttentionBackend):
    """What vLLM asks a backend about.

    Implements: vllm.v1.attention.backend.AttentionBackend
    """

    supported_dtypes: ClassVar[list[torch.dtype]] = [torch.float16, torch.bfloat16, torch.float32]
    forward_includes_kv_cache_update = False

    @staticmethod
    def get_name() -> str:
        return BACKEND_NAME

    @staticmethod
    def get_impl_cls() -> type[SpeContextImpl]:
        return SpeContextImpl

    @staticmethod
    def get_builder_cls() -> type[SpeContextMetadataBuilder]:
        return SpeContextMetadataBuilder

    @staticmethod
    def get_supported_kernel_block_sizes(kv_cache_spec: Any = None) -> list[int]:
        return [PAGE_SIZE]

    @classmethod
    def supported_kv_cache_layouts(cls) -> tuple[KVCacheLayout, ...]:
        # One (page, KV head) contiguous: the unit that is selected.
        return (KVCacheLayout.LBHNC,)

    @classmethod
    def supports_kv_connector(cls) -> bool:
        return False


@dataclass
class SpeContextMetadata:
    """One step's attention, shared by all layers.

    Attributes:
        num_decodes: leading rows that decode, one query token each; they read ``table``.
        table: the page table, filled before the first layer.
        prefill: the prompt rows after them, or None.
        num_tokens: query tokens of the step (with a FULL graph: padding included).
        common: vLLM's own description of the step, for retrievers that select per layer and the
            adapter of the V1 runner.
    """

    num_decodes: int
    table: PageTable
    prefill: PrefillRows | None
    num_tokens: int
    common: CommonAttentionMetadata


def max_table_rows(vllm_config: Any) -> int:
    """The largest number of decode rows in a step, padding to a captured size included."""
    return table_rows(
        vllm_config.scheduler_config.max_num_seqs,
        vllm_config.compilation_config.max_cudagraph_capture_size or 0,
    )


class SpeContextMetadataBuilder(AttentionMetadataBuilder[SpeContextMetadata]):
    """Owns the page table and the provider that plans; the runtime fills the table in each step.

    Implements: vllm.v1.attention.backend.AttentionMetadataBuilder
    """

    _cudagraph_support: ClassVar[AttentionCGSupport] = (
        AttentionCGSupport.UNIFORM_SINGLE_TOKEN_DECODE
    )

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
        self._init_reorder_batch_threshold(1)
        config = SpeContextConfig.from_additional_config(vllm_config.additional_config)
        max_model_len = vllm_config.model_config.max_model_len
        width = config.allocated_table_pages(max_model_len, device.type)
        self.table = PageTable.allocate(
            max_table_rows(vllm_config), kv_cache_spec.num_kv_heads, width, device
        )
        layers = [
            vllm_config.compilation_config.static_forward_context[name] for name in layer_names
        ]
        # All layers of a group have one shape, so the first layer's provider can plan for all of
        # them.
        self.provider: AttentionProvider = layers[0].impl.provider
        for layer in layers:
            layer.impl.provider = self.provider

    def build(
        self,
        common_prefix_len: int,
        common_attn_metadata: CommonAttentionMetadata,
        fast_build: bool = False,
    ) -> SpeContextMetadata:
        common = common_attn_metadata
        decodes = self._leading_decodes(common)
        # One token each, or none in padding.
        decode_tokens = int(common.query_start_loc_cpu[decodes])
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
        return SpeContextMetadata(decodes, self.table, prefill, common.num_actual_tokens, common)

    def build_for_cudagraph_capture(
        self, common_attn_metadata: CommonAttentionMetadata
    ) -> SpeContextMetadata:
        metadata = self.build(0, common_attn_metadata)
        # Captured kernels also run once: give them something harmless to read, one token of block 0
        # a row.
        self.table.pages.zero_()
        self.table.lengths.fill_(1)
        self.provider.plan(self.table, metadata.num_decodes)
        return metadata

    @staticmethod
    def _leading_decodes(common: CommonAttentionMetadata) -> int:
        """Rows, padding included, in front of the first with prompt tokens or several tokens."""
        prompts = common.is_prefilling
        if common.max_query_len <= 1 and (prompts is None or not prompts.any()):
            return common.num_reqs
        is_prefill = common.query_start_loc_cpu.diff()[: common.num_reqs] > 1
        if prompts is not None:
            # Not told of padding.
            is_prefill[: len(prompts)] |= prompts[: len(is_prefill)]
        return int(is_prefill.int().argmax()) if is_prefill.any() else common.num_reqs


class SpeContextImpl(AttentionImpl):
    """One layer's attention.

    Implements: vllm.v1.attention.backend.AttentionImpl
    """

    def __init__(
        self,
        num_heads: int,
        head_size: int,
        scale: float,
        num_kv_heads: int,
        alibi_slopes: list[float] | None = None,
        sliding_window: int | None = None,
        kv_cache_dtype: str = "auto",
        logits_soft_cap: float | None = None,
        attn_type: str = AttentionType.DECODER,
        kv_sharing_target_layer_name: str | None = None,
        **extra: Any,
    ) -> None:
        self.num_heads, self.head_size, self.scale, self.num_kv_heads = (
            num_heads,
            head_size,
            float(scale),
            num_kv_heads,
        )
        self.kv_cache_dtype = kv_cache_dtype
        unsupported = {
            "ALiBi slopes": alibi_slopes is not None,
            "a sliding window": sliding_window is not None,
            "a cap on attention logits": bool(logits_soft_cap),
            "an attention type other than decoder": attn_type != AttentionType.DECODER,
            "KV sharing between layers": kv_sharing_target_layer_name is not None,
        } | {name: value is not None and value is not False for name, value in extra.items()}
        for what, found in unsupported.items():
            if found:
                raise ConfigError(
                    f"--attention-backend specontext: this model's attention uses {what}, which is "
                    "not supported; serve it with another backend."
                )
        from vllm.platforms import current_platform

        self.tiers: TieredKV | None = None
        self.selector: LayerSelector | None = None
        self.layer = 0
        config = SpeContextConfig.from_additional_config(
            get_current_vllm_config().additional_config
        )
        self.provider = choose_provider(
            config.attention_provider,
            num_heads,
            num_kv_heads,
            head_size,
            self.scale,
            torch.get_default_dtype(),
            current_platform.device_type,
        )

    def forward(
        self,
        layer: torch.nn.Module,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        kv_cache: torch.Tensor,
        attn_metadata: SpeContextMetadata | None,
        output: torch.Tensor,
        output_scale: torch.Tensor | None = None,
        output_block_scale: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """``query [N, num_heads, D]`` -> ``output`` of the same shape;
        ``kv_cache [num_pages, H, P, 2 * D]``.
        """
        if attn_metadata is None:  # vLLM's memory profile
            return output.fill_(0)
        if output_scale is not None or output_block_scale is not None:
            raise NotImplementedError(
                "specontext: fused output quantization is not supported; turn that fusion off."
            )
        decodes, table, prefill = (
            attn_metadata.num_decodes,
            attn_metadata.table,
            attn_metadata.prefill,
        )
        if self.tiers is not None:
            table = self.tiers.page_table(self.layer)
        if decodes and self.selector is not None and self.selector.active:
            common = attn_metadata.common
            self.selector.select(
                self.layer,
                query[:decodes],
                kv_cache,
                common.block_table_tensor,
                common.seq_lens,
                table.pages,
                table.lengths,
            )
        if decodes:
            self.provider.decode(query[:decodes], kv_cache, table, decodes, output[:decodes])
        if prefill is not None:
            span = slice(decodes, attn_metadata.num_tokens)
            self._prefill(query[span], key[span], value[span], kv_cache, prefill, output[span])
        return output

    def _prefill(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        kv_cache: torch.Tensor,
        prefill: PrefillRows,
        output: torch.Tensor,
    ) -> None:
        """Prompt rows attend densely, with two tiers over the frames of their pages."""
        if self.tiers is None:
            self.provider.prefill(query, kv_cache, prefill, output)
        elif self.tiers.is_staged(self.layer):
            self._prefill_staged(self.tiers, query, key, value, kv_cache, prefill, output)
        else:
            frames = self.tiers.prompt_block_table(self.layer, prefill.block_table)
            self.provider.prefill(query, kv_cache, replace(prefill, block_table=frames), output)

    def _prefill_staged(
        self,
        tiers: TieredKV,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        arena: torch.Tensor,
        prefill: PrefillRows,
        output: torch.Tensor,
    ) -> None:
        """Prompt rows of an offloaded layer: their history arrives in a staging area, and the new
        tokens are written after it.
        """
        for stage in tiers.staged_rows(self.layer):
            self.provider.write(key[stage.tokens], value[stage.tokens], arena, stage.slots)
            starts = prefill.starts[stage.rows.start : stage.rows.stop + 1]
            offsets = prefill.offsets[stage.rows.start : stage.rows.stop + 1]
            rows = replace(
                prefill,
                starts=starts - starts[0],
                seq_lens=prefill.seq_lens[stage.rows],
                block_table=stage.block_table,
                offsets=[at - offsets[0] for at in offsets],
            )
            self.provider.prefill(query[stage.tokens], arena, rows, output[stage.tokens])

    def do_kv_cache_update(
        self,
        layer: torch.nn.Module,
        key: torch.Tensor,
        value: torch.Tensor,
        kv_cache: torch.Tensor,
        slot_mapping: torch.Tensor,
    ) -> None:
        """Write the step's keys and values; nothing happens before the cache exists.

        Uses: vllm.model_executor.layers.attention.attention.unified_kv_cache_update
        """
        if self.tiers is not None:
            metadata = get_forward_context().attn_metadata
            if metadata is not None:
                self.tiers.write(
                    self.layer, key, value, slot_mapping, metadata[layer.layer_name].num_decodes
                )
        elif kv_cache.numel():
            self.provider.write(key, value, kv_cache, slot_mapping)
            if self.selector is not None:
                self.selector.learn(self.layer, kv_cache, slot_mapping)
