"""The SPECONTEXT attention backend, and one layer's attention: decode rows read the page table,
prompt rows attend densely.

vLLM: the interfaces of an attention backend, and the step's metadata while a layer runs.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, ClassVar

import torch
from vllm.config import get_current_vllm_config
from vllm.forward_context import get_forward_context
from vllm.v1.attention.backend import AttentionBackend, AttentionImpl, AttentionType
from vllm.v1.kv_cache_interface import KVCacheLayout

from specontext_vllm.attention.provider import PrefillRows
from specontext_vllm.attention.registry import choose_provider
from specontext_vllm.config import PAGE_SIZE, ConfigError, SpeContextConfig
from specontext_vllm.engine.drafts import num_drafts
from specontext_vllm.engine.kv_dtype import FP8_NAMES
from specontext_vllm.engine.metadata import SpeContextMetadata, SpeContextMetadataBuilder
from specontext_vllm.engine.names import BACKEND_NAME
from specontext_vllm.float8 import FP8, KVScales
from specontext_vllm.residency.tiers import TieredKV
from specontext_vllm.retrieval.layer_selection import LayerSelector
from specontext_vllm.step_data import PageTable


class SpeContextBackend(AttentionBackend):
    """What vLLM asks a backend about.

    Implements: vllm.v1.attention.backend.AttentionBackend
    """

    supported_dtypes: ClassVar[list[torch.dtype]] = [torch.float16, torch.bfloat16, torch.float32]
    supported_kv_cache_dtypes: ClassVar[list[Any]] = ["auto", "float16", "bfloat16", *FP8_NAMES]
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
    def supports_sink(cls) -> bool:
        # Which prefill has them as well: attention/provider.py.
        return True

    @classmethod
    def supports_kv_connector(cls) -> bool:
        # Which ones: engine/connector.py.
        return True


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
        sinks: torch.Tensor | None = None,
        **extra: Any,
    ) -> None:
        self.num_heads, self.head_size, self.scale, self.num_kv_heads = (
            num_heads,
            head_size,
            float(scale),
            num_kv_heads,
        )
        self.kv_cache_dtype, self.float8_kv = kv_cache_dtype, kv_cache_dtype in FP8_NAMES
        # A parameter of the layer's, whose values are loaded later.
        self.sinks = sinks
        # A layer whose KV cache is also this one's, which then writes none.
        self.kv_owner = kv_sharing_target_layer_name
        unsupported = {
            "ALiBi slopes": alibi_slopes is not None,
            "a sliding window": sliding_window is not None,
            "an attention type other than decoder": attn_type != AttentionType.DECODER,
        } | {name: value is not None and value is not False for name, value in extra.items()}
        for what, found in unsupported.items():
            if found:
                raise ConfigError(
                    f"--attention-backend specontext: this model's attention uses {what}, which is "
                    "not supported; serve it with another backend."
                )
        from vllm.platforms import current_platform

        # Until the runtime says so, it might be a drafter's layer.
        self.is_selected_for = False
        self.tiers: TieredKV | None = None
        self.selector: LayerSelector | None = None
        self.layer = self.place = 0
        self.group_table: PageTable | None = None
        vllm_config = get_current_vllm_config()
        config = SpeContextConfig.from_additional_config(vllm_config.additional_config)
        self.provider = choose_provider(
            config.attention_provider,
            num_heads,
            num_kv_heads,
            head_size,
            self.scale,
            torch.get_default_dtype(),
            current_platform.device_type,
            soft_cap=float(logits_soft_cap or 0.0),
            has_sinks=sinks is not None,
            float8_kv=self.float8_kv,
        )
        self.provider.max_queries = 1 + num_drafts(vllm_config)
        self.provider.float8_kv = self.float8_kv

    def process_weights_after_loading(self, act_dtype: torch.dtype) -> None:
        """The kernels take sinks in float32.

        Overrides: vllm.v1.attention.backend.AttentionImplBase.process_weights_after_loading
        """
        if self.sinks is not None:
            self.sinks = self.sinks.detach().float()

    def forward(
        self,
        layer: torch.nn.Module,
        query: torch.Tensor,
        key: torch.Tensor | None,
        value: torch.Tensor | None,
        kv_cache: torch.Tensor,
        attn_metadata: SpeContextMetadata | None,
        output: torch.Tensor,
        output_scale: torch.Tensor | None = None,
        output_block_scale: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """``query [N, num_heads, D]`` -> ``output`` of the same shape;
        ``kv_cache [num_pages, H, P, 2 * D]``, with 8-bit floats the bytes of these.
        """
        if attn_metadata is None:  # vLLM's memory profile
            return output.fill_(0)
        if output_scale is not None or output_block_scale is not None:
            raise NotImplementedError(
                "specontext: fused output quantization is not supported; turn that fusion off."
            )
        kv_cache, scales = self._stored(kv_cache), self._scales(layer)
        decodes, tokens, table, prefill = (
            attn_metadata.num_decodes,
            attn_metadata.decode_tokens,
            attn_metadata.table,
            attn_metadata.prefill,
        )
        if self.tiers is not None:
            table = self.tiers.page_table(self.layer)
        elif self.group_table is not None:
            table = self.group_table
        if decodes and attn_metadata.selects and self.selector is not None and self.selector.active:
            common = attn_metadata.common
            self.selector.select(
                self.layer,
                query[:decodes],
                kv_cache,
                common.block_table_tensor,
                common.seq_lens,
                table.pages,
                table.lengths,
                scales,
            )
        if decodes:
            self.provider.decode(
                query[:tokens],
                kv_cache,
                table,
                decodes,
                output[:tokens],
                attn_metadata.queries,
                self.sinks,
                scales,
            )
        if prefill is not None:
            span = slice(tokens, attn_metadata.num_tokens)
            # A layer that reads another one's KV has no keys.
            keys, values = (None if new is None else new[span] for new in (key, value))
            self._prefill(query[span], keys, values, kv_cache, prefill, output[span], scales)
        return output

    def _prefill(
        self,
        query: torch.Tensor,
        key: torch.Tensor | None,
        value: torch.Tensor | None,
        kv_cache: torch.Tensor,
        prefill: PrefillRows,
        output: torch.Tensor,
        scales: KVScales | None,
    ) -> None:
        """Prompt rows attend densely, with two tiers over the frames of their pages."""
        if self.tiers is None:
            self.provider.prefill(query, kv_cache, prefill, output, self.sinks, scales)
        elif self.tiers.is_staged(self.layer):
            self._prefill_staged(self.tiers, query, key, value, kv_cache, prefill, output, scales)
        else:
            frames = self.tiers.prompt_block_table(self.layer, prefill.block_table)
            rows = replace(prefill, block_table=frames)
            self.provider.prefill(query, kv_cache, rows, output, self.sinks, scales)

    def _prefill_staged(
        self,
        tiers: TieredKV,
        query: torch.Tensor,
        key: torch.Tensor | None,
        value: torch.Tensor | None,
        arena: torch.Tensor,
        prefill: PrefillRows,
        output: torch.Tensor,
        scales: KVScales | None,
    ) -> None:
        """Prompt rows of an offloaded layer: their history arrives in a staging area, and the new
        tokens are written after it, by the layer whose KV it is.
        """
        for stage in tiers.staged_rows(self.place):
            if self.kv_owner is None:
                assert key is not None and value is not None
                new = key[stage.tokens], value[stage.tokens]
                self.provider.write(*new, arena, stage.slots, scales)
            starts = prefill.starts[stage.rows.start : stage.rows.stop + 1]
            offsets = prefill.offsets[stage.rows.start : stage.rows.stop + 1]
            rows = replace(
                prefill,
                starts=starts - starts[0],
                seq_lens=prefill.seq_lens[stage.rows],
                block_table=stage.block_table,
                offsets=[at - offsets[0] for at in offsets],
            )
            self.provider.prefill(
                query[stage.tokens], arena, rows, output[stage.tokens], self.sinks, scales
            )

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
        kv_cache, scales = self._stored(kv_cache), self._scales(layer)
        if self.tiers is not None:
            by_layer = get_forward_context().attn_metadata
            if by_layer is not None:
                metadata: SpeContextMetadata = by_layer[layer.layer_name]
                self.tiers.write(
                    self.layer,
                    key,
                    value,
                    slot_mapping,
                    metadata.decode_tokens,
                    metadata.queries,
                    scales,
                )
        elif kv_cache.numel():
            self.provider.write(key, value, kv_cache, slot_mapping, scales)
            self.learn_pages(kv_cache, slot_mapping)

    def learn_pages(self, kv_cache: torch.Tensor, slots: torch.Tensor) -> None:
        """What is kept of pages follows from the keys that are there at ``slots [N]``."""
        if self.selector is not None:
            self.selector.learn(self.layer, self._stored(kv_cache), slots)

    def _stored(self, kv_cache: torch.Tensor) -> torch.Tensor:
        """vLLM keeps 8-bit floats as bytes."""
        return kv_cache.view(FP8) if self.float8_kv else kv_cache

    def _scales(self, layer: Any) -> KVScales | None:
        """Uses: vllm.v1.attention.backend.AttentionLayer._k_scale,
            vllm.v1.attention.backend.AttentionLayer._v_scale,
            vllm.v1.attention.backend.AttentionLayer._q_scale
        Symptom: keys and values that a checkpoint has scales for are read a constant too small.
        Reason: a layer keeps them in these private buffers, for every backend to read.
        Remove when: vLLM hands them to the backend.
        """
        if not self.float8_kv:
            return None
        return KVScales(layer._k_scale, layer._v_scale, layer._q_scale)
