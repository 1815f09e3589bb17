"""The groups of our layers among vLLM's KV-cache groups, and pages within their blocks.

vLLM's scheduler hands out *blocks* of ``--block-size`` tokens. Kernels, page tables, the head's
caches and the two tiers count *pages* of PAGE_SIZE tokens, which are vLLM's "kernel blocks" of our
backend: page ``j`` of block ``b`` is ``b * block_pages + j`` (vllm/v1/worker/utils.py,
AttentionGroup.map_to_kernel_block_table).

vLLM: the rule by which a model's layers are grouped.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from specontext_vllm.config import PAGE_SIZE, ConfigError
from specontext_vllm.engine.layers import OTHER_SHAPES
from specontext_vllm.engine.names import BACKEND_NAME


@dataclass(frozen=True)
class KVGroup:
    """A KV-cache group of layers that run on our backend; nearly always they are all in one.

    Attributes:
        index: its place in what vLLM keeps per group: block tables, slot mappings, a request's
            block ids.
        layer_names: our layers in it that keep KV, in the model's order.
        block_pages: pages of a block.
    """

    index: int
    layer_names: tuple[str, ...]
    block_pages: int

    def num_pages(self, num_blocks: int) -> int:
        """Pages of ``num_blocks`` blocks."""
        return num_blocks * self.block_pages

    def pages(self, block_ids: Sequence[Sequence[int]] | None) -> list[int]:
        """Page ids of a request's blocks.

        Args:
            block_ids: as in vLLM's SchedulerOutput: a sequence of block ids for each group, or
                None where a request got none.
        """
        if block_ids is None:
            return []
        return self.pages_of(block_ids[self.index])

    def pages_of(self, blocks: Sequence[int]) -> list[int]:
        """Page ids of blocks of our group."""
        count = self.block_pages
        if count == 1:
            return list(blocks)
        return [page for block in blocks for page in range(block * count, (block + 1) * count)]

    def attention_group(self, attention_groups: Sequence[Sequence[Any]]) -> Any:
        """vLLM's AttentionGroup of our layers, which holds their metadata builder.

        Args:
            attention_groups: a model runner's ``attn_groups``.
        Raises:
            ConfigError: our layers do not share one shape of KV.
        """
        ours = [
            group
            for group in attention_groups[self.index]
            if group.backend.get_name() == BACKEND_NAME
            and not set(group.layer_names).isdisjoint(self.layer_names)
        ]
        if len(ours) != 1:
            raise ConfigError(OTHER_SHAPES)
        return ours[0]


def find_kv_groups(layer_names: Sequence[str], groups: Sequence[Any]) -> tuple[KVGroup, ...]:
    """The groups that our layers are in: one, or several where they outnumber the model's others
    one and a half times, since vLLM makes all of its groups equally large.

    Args:
        layer_names: our layers that keep KV.
        groups: ``kv_cache_groups`` of vLLM's KVCacheConfig.
    Raises:
        ConfigError: their blocks differ.
    """
    found = []
    for index, group in enumerate(groups):
        if names := tuple(name for name in layer_names if name in group.layer_names):
            found.append(KVGroup(index, names, group.kv_cache_spec.block_size // PAGE_SIZE))
    if len({group.block_pages for group in found}) != 1:
        raise ConfigError(OTHER_SHAPES)
    return tuple(found)


@dataclass(frozen=True)
class Block:
    """One of vLLM's blocks, before there is a KV cache.

    Attributes:
        num_bytes: GPU memory that vLLM counts for it, by which it divides what a worker offers.
        pages: pages of ours in it.
        other_bytes: of it in other layers of our group, a drafter's.
        layers: our layers that a block holds pages of, at the most.
        groups: those of layers of full attention: ours, and a drafter's of its own.
        apart_bytes: GPU memory of the groups beside ours, where their blocks are not of our pool;
            see ``other_blocks.py``. None: there are no others.
    """

    num_bytes: int
    pages: int
    other_bytes: int
    layers: int
    groups: int = 1
    apart_bytes: int | None = None


def expected_block(vllm_config: Any, specs: dict[str, Any], layer_names: Sequence[str]) -> Block:
    """What a block will be like.

    Groups overlay one another, so its bytes are the largest group's
    (vllm/v1/core/kv_cache_utils.py, _get_kv_cache_bytes_per_block, for layouts that keep a layer's
    blocks together, as ours does). vLLM makes blocks of layers with smaller pages longer, so ours
    may hold more tokens than --block-size says (unify_kv_cache_spec_page_size).

    Args:
        specs: the worker's KV cache specs by layer.
        layer_names: our layers that keep KV.
    Raises:
        ConfigError: their blocks differ.
    """
    try:
        from vllm.v1.core.kv_cache_planning import get_kv_cache_groups
    except ImportError:  # vLLM 0.32
        from vllm.v1.core.kv_cache_utils import get_kv_cache_groups

    from specontext_vllm.engine.other_blocks import full_groups, num_other_blocks

    groups = get_kv_cache_groups(vllm_config, dict(specs))
    ours = find_kv_groups(layer_names, groups)
    sizes = [
        {name: spec_of(group, name).page_size_bytes for name in group.layer_names}
        for group in groups
    ]
    indexes = [group.index for group in ours]
    beside = [sum(sizes[index].values()) for index in range(len(groups)) if index not in indexes]
    return Block(
        max(sum(by_layer.values()) for by_layer in sizes),
        ours[0].block_pages,
        sum(size for name, size in sizes[ours[0].index].items() if name not in layer_names),
        layers=max(len(group.layer_names) for group in ours),
        groups=len({*indexes, *(full_groups(groups) if beside else ())}),
        apart_bytes=num_other_blocks(vllm_config, groups, indexes) * max(beside)
        if beside
        else None,
    )


def spec_of(group: Any, layer_name: str) -> Any:
    """A layer's own spec, where a group of layers of different widths has one for each."""
    return getattr(group.kv_cache_spec, "kv_cache_specs", {}).get(layer_name, group.kv_cache_spec)
