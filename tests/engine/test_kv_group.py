"""Our KV-cache group among vLLM's, and pages within its blocks; vLLM's own objects, no model."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from vllm.v1.kv_cache_interface import (
    FullAttentionSpec,
    KVCacheConfig,
    KVCacheGroupSpec,
    KVCacheLayout,
    KVCacheTensor,
    SlidingWindowSpec,
)
from vllm.v1.worker.utils import AttentionGroup, prepare_kernel_block_sizes

from specontext_vllm.config import PAGE_SIZE, ConfigError
from specontext_vllm.engine.backend import SpeContextBackend
from specontext_vllm.engine.compat import allocate_kv_cache_as
from specontext_vllm.engine.kv_group import Block, KVGroup, expected_block, find_kv_groups

OURS = ("model.layers.1.attn", "model.layers.3.attn")
OTHERS = ("model.layers.0.attn", "model.layers.2.attn")
THIRD = "model.layers.4.attn"
CPU = torch.device("cpu")


class OtherBackend(SpeContextBackend):
    @staticmethod
    def get_name():
        return "OTHER"


def full(block_size, heads=2):
    return FullAttentionSpec(
        block_size=block_size, num_kv_heads=heads, head_size=64, dtype=torch.float32
    )


WINDOW = SlidingWindowSpec(
    block_size=16, num_kv_heads=2, head_size=64, dtype=torch.float32, sliding_window=64
)
OTHERS_APART = ((OTHERS, WINDOW), ((THIRD,), WINDOW))


def config_of(*groups):
    return KVCacheConfig(
        num_blocks=100,
        kv_cache_tensors=[],
        kv_cache_groups=[KVCacheGroupSpec(list(names), spec) for names, spec in groups],
    )


def tensor_of(names):
    return KVCacheTensor(size=64, layers=list(names), layer_stride=16, block_stride=8)


def engine_config(rows=4, max_model_len=512):
    """What metadata builders and block tables read of vLLM's configuration."""
    layers = {
        name: SimpleNamespace(impl=SimpleNamespace(provider=None, is_selected_for=name in OURS))
        for name in (*OURS, *OTHERS)
    }
    return SimpleNamespace(
        additional_config={},
        model_config=SimpleNamespace(max_model_len=max_model_len),
        max_in_flight_tokens=512,
        scheduler_config=SimpleNamespace(max_num_seqs=rows, disable_hybrid_kv_cache_manager=False),
        parallel_config=SimpleNamespace(
            decode_context_parallel_size=1, prefill_context_parallel_size=1
        ),
        cache_config=SimpleNamespace(
            block_size=16, get_resolved_kv_cache_layout=lambda: KVCacheLayout.LBHNC
        ),
        attention_config=SimpleNamespace(hisparse_config=None),
        speculative_config=None,
        compilation_config=SimpleNamespace(
            static_forward_context=layers, max_cudagraph_capture_size=0
        ),
    )


def attention_group(block_size, names=OURS, index=0):
    """vLLM's AttentionGroup of our layers, split as the runners split it."""
    spec = full(block_size)
    group = AttentionGroup(SpeContextBackend, list(names), spec, index)
    (kernel_block_size,) = prepare_kernel_block_sizes(config_of((names, spec)), [[group]])
    assert kernel_block_size == PAGE_SIZE
    group.create_metadata_builders(engine_config(), CPU, kernel_block_size)
    return group


def test_our_groups_are_found_by_their_layers():
    window = SlidingWindowSpec(
        block_size=32, num_kv_heads=2, head_size=64, dtype=torch.float32, sliding_window=64
    )
    config = config_of((OTHERS, window), (OURS, full(64)))
    assert find_kv_groups(OURS, config.kv_cache_groups) == (KVGroup(1, OURS, block_pages=4),)
    first, second = ((name,) for name in OURS)
    several = config_of((second, full(64)), (OTHERS, window), (first, full(64)))
    assert find_kv_groups(OURS, several.kv_cache_groups) == (
        KVGroup(0, second, block_pages=4),
        KVGroup(2, first, block_pages=4),
    )
    with pytest.raises(ConfigError, match="KV heads, head sizes, scales or caps"):
        find_kv_groups((*OTHERS, *OURS), config.kv_cache_groups)


def test_the_attention_group_is_found_by_its_backend():
    ours, other = attention_group(32), AttentionGroup(OtherBackend, list(OTHERS), full(32), 0)
    group = KVGroup(0, OURS, 2)
    assert group.attention_group([[other, ours]]) is ours
    wider = AttentionGroup(SpeContextBackend, list(OTHERS), full(32, heads=4), 0)
    # Of a drafter, or of the model itself.
    assert group.attention_group([[wider, ours]]) is ours
    group = KVGroup(0, (*OURS, *OTHERS), 2)
    with pytest.raises(ConfigError, match="KV heads, head sizes, scales or caps"):
        group.attention_group([[ours, wider]])


def test_a_request_s_blocks_are_pages_in_order():
    assert KVGroup(0, OURS, 1).pages(([3, 9],)) == [3, 9]
    assert KVGroup(1, OURS, 4).pages(([5], [3, 9])) == [12, 13, 14, 15, 36, 37, 38, 39]
    assert KVGroup(0, OURS, 4).pages(None) == KVGroup(0, OURS, 4).pages(([],)) == []
    assert KVGroup(0, OURS, 4).num_pages(10) == 40


@pytest.mark.parametrize("block_size", [16, 32, 64, 128])
def test_pages_are_vllm_s_kernel_blocks(block_size):
    """The table that attention gets, the slots that vLLM computes and the pages that the tiers
    count name the same places.
    """
    group, ours = attention_group(block_size), KVGroup(0, OURS, block_size // PAGE_SIZE)
    blocks = [7, 2, 30]
    table = group.map_to_kernel_block_table(torch.tensor([blocks], dtype=torch.int32))
    assert table[0].tolist() == ours.pages((blocks,))
    # As in _compute_slot_mappings_kernel, vllm/v1/worker/gpu/block_table.py.
    positions = np.arange(3 * block_size)
    slots = np.array(blocks)[positions // block_size] * block_size + positions % block_size
    assert (slots // PAGE_SIZE == np.array(table[0])[positions // PAGE_SIZE]).all()
    assert (slots % PAGE_SIZE == positions % PAGE_SIZE).all()


def test_our_layers_alone_are_bound_to_our_arena(monkeypatch):
    from vllm.v1.worker.gpu import attn_utils

    def of_vllm(kv_cache_config, *_):
        return {name: "vLLM's" for t in kv_cache_config.kv_cache_tensors for name in t.layers}

    monkeypatch.setattr(attn_utils, "allocate_kv_cache", of_vllm)
    config = config_of((OTHERS, full(32)), (OURS, full(32)))
    config.kv_cache_tensors = [tensor_of(OTHERS), tensor_of(OURS)]
    with allocate_kv_cache_as("arena", OURS):
        given = attn_utils.allocate_kv_cache(config, CPU, KVCacheLayout.LBHNC)
    assert given == dict.fromkeys(OTHERS, "vLLM's") | dict.fromkeys(OURS, "arena")
    assert attn_utils.allocate_kv_cache is of_vllm


def test_a_drafter_s_layers_get_memory_for_themselves_alone():
    """vLLM lists layers of one shape together, in one allocation for all."""
    from vllm.v1.worker.gpu import attn_utils

    spec, drafter = full(16), "model.layers.4.attn"
    config = config_of(((*OURS, drafter), spec))
    each = config.num_blocks * spec.page_size_bytes
    tensor = KVCacheTensor(3 * each, [OURS[0], drafter, OURS[1]], each, spec.page_size_bytes)
    config.kv_cache_tensors = [tensor]
    with allocate_kv_cache_as("arena", OURS):
        given = attn_utils.allocate_kv_cache(config, CPU, KVCacheLayout.LBHNC, [16])
    cache = given.pop(drafter)
    assert given == dict.fromkeys(OURS, "arena")
    assert cache.shape == (config.num_blocks, 2, 16, 128)
    assert cache.untyped_storage().nbytes() == each


def test_a_drafter_s_layers_beside_windows_have_as_many_blocks_as_ours_and_no_bytes_of_theirs():
    from vllm.v1.worker.gpu import attn_utils

    spec, drafter = full(16), "model.layers.4.attn"
    config = config_of(((*OURS, drafter), spec), (OTHERS, WINDOW))
    each = config.num_blocks * spec.page_size_bytes
    config.kv_cache_tensors = [
        KVCacheTensor(3 * each, list(names), each, spec.page_size_bytes)
        for names in ((*OURS, drafter), OTHERS)
    ]
    # As many as the scheduler hands out to ours, or fewer.
    for count in (config.num_blocks, 7):
        with allocate_kv_cache_as("arena", OURS, {1: count}):
            given = attn_utils.allocate_kv_cache(config, CPU, KVCacheLayout.LBHNC, [16, 16])
        caches = [given[name] for name in (drafter, *OTHERS)]
        assert [len(cache) for cache in caches] == [config.num_blocks, count, count]
        for value, cache in enumerate(caches):
            cache.fill_(value)
        assert [int(cache.unique()) for cache in caches] == [0, 1, 2]


def test_layers_of_other_kinds_get_memory_for_their_own_blocks_over_one_another():
    from vllm.v1.worker.gpu import attn_utils

    spec = full(16)
    config = config_of((OURS, spec), OTHERS_APART[0], OTHERS_APART[1])
    each = config.num_blocks * spec.page_size_bytes
    config.kv_cache_tensors = [
        KVCacheTensor(2 * each, list(names), each, spec.page_size_bytes)
        for names in (OURS, *(names for names, _ in OTHERS_APART))
    ]
    with allocate_kv_cache_as("arena", OURS, {1: 7, 2: 7}):
        given = attn_utils.allocate_kv_cache(config, CPU, KVCacheLayout.LBHNC, [16, 16, 16])
    assert {given.pop(name) for name in OURS} == {"arena"}
    assert {cache.shape[0] for cache in given.values()} == {7}
    # Two layers of one group, and in the same bytes the one of the other: a block is one group's.
    storages = {cache.untyped_storage().data_ptr() for cache in given.values()}
    assert len(storages) == 1
    cache = given[OTHERS[0]]
    assert cache.untyped_storage().nbytes() == 2 * 7 * spec.page_size_bytes
    cache[3] = 1.0
    assert given[THIRD][3].eq(1).all() and given[THIRD].sum() == cache[3].numel()
    assert not given[OTHERS[1]].any()


@pytest.mark.parametrize("block_size", [16, 64])
def test_the_v2_runner_selects_over_pages_of_our_group(monkeypatch, block_size):
    from vllm.v1.worker.gpu.model_runner import GPUModelRunner

    from specontext_vllm.engine.runner_v2 import SpeContextModelRunnerV2

    ratio = block_size // PAGE_SIZE
    manager = torch.tensor([[3, 5, 0, 0], [8, 0, 0, 0]], dtype=torch.int32)
    slots = torch.stack([torch.full((2,), -1), torch.tensor([5 * block_size + 1, 8 * block_size])])
    monkeypatch.setattr(GPUModelRunner, "prepare_attn", lambda *_: ((manager + 20, manager), slots))
    taken = []
    runner = object.__new__(SpeContextModelRunnerV2)
    runner.vllm_config = engine_config()
    runner.runtime = SimpleNamespace(
        step=SimpleNamespace(before_model=taken.append),
        kv_groups=(KVGroup(1, OURS, ratio), KVGroup(0, OTHERS, ratio)),
        attention_groups=[attention_group(block_size, index=at) for at in (1, 0)],
    )
    returned = runner.prepare_attn(
        SimpleNamespace(
            num_reqs=2,
            num_tokens=2,
            num_reqs_after_padding=2,
            num_tokens_after_padding=2,
            is_prefilling_np=np.array([False, False]),
            input_ids=torch.tensor([11, 12]),
            positions=torch.tensor([block_size + 1, 0]),
            query_start_loc=torch.tensor([0, 1, 2], dtype=torch.int32),
            seq_lens=torch.tensor([block_size + 2, 1], dtype=torch.int32),
            seq_lens_cpu_upper_bound=torch.tensor([block_size + 2, 1]),
            req_ids=["a", "b"],
            num_scheduled_tokens=np.array([1, 1]),
        )
    )
    (batch,) = taken
    assert returned[0][1] is manager  # what vLLM goes on with stays its own
    first = torch.arange(ratio)
    assert batch.block_table[0, : 2 * ratio].tolist() == [
        *(3 * ratio + first),
        *(5 * ratio + first),
    ]
    (other,) = batch.other_block_tables
    assert other[0, :ratio].tolist() == (23 * ratio + first).tolist()
    page = batch.block_table.gather(1, (batch.positions // PAGE_SIZE)[:, None]).squeeze(1)
    assert (batch.slots == page * PAGE_SIZE + batch.positions % PAGE_SIZE).all()


def test_a_block_costs_what_vllm_counts_for_it():
    config = engine_config()
    same = {name: full(32) for name in (*OURS, *OTHERS)}
    page = full(32).page_size_bytes
    # A drafter's layers stand beside ours.
    assert expected_block(config, same, OURS) == Block(4 * page, 2, 2 * page, layers=2)
    assert expected_block(config, same, (*OURS, *OTHERS)).other_bytes == 0
    # Layers of different widths share one group, with a spec each.
    wider = {OURS[0]: full(32), OURS[1]: full(32, heads=4)}
    assert expected_block(config, wider, OURS) == Block(3 * page, 2, 0, layers=2)
    # Groups lie over one another.
    window = SlidingWindowSpec(
        block_size=32, num_kv_heads=2, head_size=64, dtype=torch.float32, sliding_window=64
    )
    mixed = dict.fromkeys(OTHERS, window) | dict.fromkeys(OURS, full(32))
    # What the others need of their own beside two tiers: 17 blocks of a request with a step's
    # prompt tokens, 4 of each that decodes, twice, and vLLM's null block.
    apart = (1 + 17 + 2 * 4 * 4) * 2 * page
    assert expected_block(config, mixed, OURS) == Block(2 * page, 2, 0, 2, apart_bytes=apart)
    # vLLM makes blocks of smaller pages longer, until all have the same size.
    shorter = dict.fromkeys(OTHERS, window) | dict.fromkeys(OURS, full(16))
    assert expected_block(config, shorter, OURS) == Block(2 * page, 2, 0, 2, apart_bytes=apart)
    # A drafter of another shape has blocks of its own.
    drafters = dict.fromkeys((THIRD, "drafter"), full(16, heads=4))
    beside = expected_block(config, mixed | drafters, OURS)
    assert (beside.groups, beside.layers, beside.other_bytes) == (2, 2, 0)
    # Three of ours to one with a window are three groups.
    most = (*OURS, OTHERS[0])
    mostly = {OTHERS[1]: window} | dict.fromkeys(most, full(32))
    assert expected_block(config, mostly, most) == Block(
        page, 2, 0, layers=1, groups=3, apart_bytes=apart // 2
    )
