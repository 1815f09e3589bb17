"""A worker's layers that run on our backend: found in the loaded model, then bound to page tables,
to the two tiers and to what selects in each of them.

vLLM: what it allows to wait for a GPU.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor
from vllm.utils.gpu_sync_debug import gpu_sync_allowed

from specontext_vllm.cpu_kernels.huge_pages import use_huge_pages
from specontext_vllm.engine.kv_dtype import refuse_scales
from specontext_vllm.engine.kv_group import KVGroup
from specontext_vllm.engine.layers import our_layer_names, shape_of
from specontext_vllm.residency.tiers import TieredKV
from specontext_vllm.retrieval.checkpoint import layer_groups
from specontext_vllm.retrieval.layer_selection import LayerSelector
from specontext_vllm.step_data import PageTable


class OurLayers:
    """The layers that are selected for.

    Args:
        vllm_config: the engine's configuration.
        model: the loaded target.

    Attributes:
        names: in the model's order.
        kv_names: those of them that keep KV; the others read that of one of these.
        kv_order: for each of ``names``, the place among ``kv_names`` of the one whose KV it reads.
        shape: what they have in common.

    Raises:
        ConfigError: there are none, or one page table cannot serve them all.
    """

    def __init__(self, vllm_config: Any, model: Any) -> None:
        self.names = our_layer_names(vllm_config, model)
        self.shape = shape_of(vllm_config, self.names)
        refuse_scales(vllm_config, self.names)
        context = vllm_config.compilation_config.static_forward_context
        self._layers = [context[name] for name in self.names]
        for layer in self._layers:
            layer.impl.is_selected_for = True
        self.kv_names = [
            name
            for name, layer in zip(self.names, self._layers, strict=True)
            if layer.impl.kv_owner is None
        ]
        self.kv_order = [
            self.kv_names.index(layer.impl.kv_owner or name)
            for name, layer in zip(self.names, self._layers, strict=True)
        ]

    def bind(
        self,
        groups: Sequence[KVGroup],
        tables: Sequence[PageTable],
        tiers: TieredKV | None,
        selector: LayerSelector | None,
    ) -> None:
        """Once there is a KV cache: each layer reads the page table of its group.

        Args:
            groups: the layers' KV-cache groups.
            tables: their page tables.
        """
        if tables[0].pages.device.type == "cpu":
            use_huge_pages(layer.kv_cache for layer in self._layers)
        places = {
            name: (index, table)
            for group, table in zip(groups, tables, strict=True)
            for index, name in enumerate(group.layer_names)
        }
        # vLLM counts a model's other layers too; the head was trained for those that are ours.
        layer_group = layer_groups(len(self._layers), tables[0].groups)
        for place, (name, layer) in enumerate(zip(self.names, self._layers, strict=True)):
            impl, group = layer.impl, layer_group[place]
            impl.tiers, impl.place = tiers, place
            impl.layer, table = places[impl.kv_owner or name]
            if table.groups > 1:
                impl.group_table = table.of_group(group)
        self.select_with(selector)

    def select_with(self, selector: LayerSelector | None) -> None:
        """What selects in each layer from now on, if anything does."""
        for layer in self._layers:
            layer.impl.selector = selector

    def learn_pages(self, slots: Tensor) -> None:
        """What is kept of pages follows from their KV, which has come from elsewhere.

        Args:
            slots: ``[N]`` int64 of their tokens, page by page, on any device.
        """
        learning = [
            layer
            for layer in self._layers
            if layer.impl.selector is not None and layer.impl.kv_owner is None
        ]
        if not learning:
            return
        with gpu_sync_allowed():
            slots = slots.to(learning[0].kv_cache.device)
        for layer in learning:
            layer.impl.learn_pages(layer.kv_cache, slots)
