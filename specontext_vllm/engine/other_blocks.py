"""Blocks of layers that are not ours, where ours lie over two tiers.

vLLM hands out blocks of one pool to layers of every kind. Blocks of ours are then as many as both
tiers hold, most of them on the host, while vLLM keeps the others' on the GPU; so these get a pool
of their own, as large as the requests in flight need it. vLLM does the same for layers whose KV it
keeps on the host itself (vllm/v1/core/single_type_kv_cache_manager.py, HiSparseSourceManager).

vLLM: its pools of blocks, and what a group's layers keep of a request.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

from vllm.v1.hisparse.block_pool import SharedEventQueueBlockPool
from vllm.v1.kv_cache_interface import KVCacheSpecKind, get_kv_cache_spec_kind

from specontext_vllm.residency.memory_model import OTHERS_KEPT


def full_groups(groups: Sequence[Any]) -> list[int]:
    """The groups, of ``kv_cache_groups``, whose layers attend to the whole context: those of our
    layers.
    """
    return [
        index
        for index, group in enumerate(groups)
        if get_kv_cache_spec_kind(group.kv_cache_spec) == KVCacheSpecKind.FULL_ATTENTION
    ]


def num_other_blocks(vllm_config: Any, groups: Sequence[Any], ours: Collection[int]) -> int:
    """Blocks that the groups beside ``ours`` share: enough for one request with a whole step of
    prompt tokens among as many that decode as there may be, and vLLM's null block.

    Workers and the scheduler compute it by themselves, from the same configuration.
    """
    total = 1
    for index, group in enumerate(groups):
        if index in ours:
            continue
        spec = group.kv_cache_spec
        most = -(-spec.max_memory_usage_bytes(vllm_config) // spec.page_size_bytes)
        total += most + OTHERS_KEPT * vllm_config.scheduler_config.max_num_seqs * min(
            most, _held_blocks(spec, most)
        )
    return total


def _held_blocks(spec: Any, most: int) -> int:
    """Blocks of a request that decodes."""
    tokens = getattr(spec, "sliding_window", None) or getattr(spec, "attention_chunk_size", None)
    # It may begin, and end, within a block.
    return most if tokens is None else -(-tokens // spec.block_size) + 2


def keep_apart(vllm_config: Any, manager: Any) -> None:
    """Give the groups beside ours a pool of their own.

    Uses: vllm.v1.core.kv_cache_manager.KVCacheManager.coordinator,
        vllm.v1.core.kv_cache_coordinator.KVCacheCoordinator.block_pool,
        vllm.v1.core.kv_cache_coordinator.KVCacheCoordinator.single_type_managers,
        vllm.v1.core.kv_cache_coordinator.KVCacheCoordinator.get_num_blocks_to_allocate,
        vllm.v1.core.single_type_kv_cache_manager.SingleTypeKVCacheManager.block_pool,
        vllm.v1.core.single_type_kv_cache_manager.SingleTypeKVCacheManager.get_num_blocks_to_allocate,
        vllm.v1.core.single_type_kv_cache_manager.SingleTypeKVCacheManager.new_block_ids
    Symptom: layers with windows or states need GPU memory for as many blocks as both tiers have;
        and beside states workers are told to clear new blocks of ours by their number, which is no
        place in the two tiers.
    Reason: all groups' blocks are of one pool (vllm/v1/core/kv_cache_coordinator.py), and are
        cleared since they may have held a state. Frames are ours alone.
    Remove when: a group can say how many blocks it has.

    Args:
        manager: a scheduler's ``kv_cache_manager``, which has handed out nothing yet.
    """
    coordinator = manager.coordinator
    groups, pool = coordinator.kv_cache_config.kv_cache_groups, coordinator.block_pool
    ours = full_groups(groups)
    apart = SharedEventQueueBlockPool(
        num_gpu_blocks=num_other_blocks(vllm_config, groups, ours),
        enable_caching=pool.enable_caching,
        hash_block_size=pool.hash_block_size,
        enable_kv_cache_events=pool.enable_kv_cache_events,
        event_owner=pool,
    )
    wanted: list[int] = []
    for index, group in enumerate(coordinator.single_type_managers):
        if index in ours:
            group._record_new_block_ids = False
        else:
            group.block_pool, group._null_block = apart, apart.null_block
            group.get_num_blocks_to_allocate = _noting(group.get_num_blocks_to_allocate, wanted)
    count = coordinator.get_num_blocks_to_allocate

    def count_both(*args: Any, **kwargs: Any) -> int:
        """Blocks of ours that a request needs; more than there are where the others' pool lacks
        some.
        """
        wanted.clear()
        blocks = count(*args, **kwargs)
        return blocks if sum(wanted) <= apart.get_num_free_blocks() else pool.num_gpu_blocks + 1

    coordinator.get_num_blocks_to_allocate = count_both


def _noting(count: Any, wanted: list[int]) -> Any:
    def note(*args: Any, **kwargs: Any) -> int:
        wanted.append(count(*args, **kwargs))
        return 0

    return note
