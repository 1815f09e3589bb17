"""Two tiers beside layers of other kinds: two pools of blocks in vLLM's own scheduler, no model."""

from __future__ import annotations

import pytest

from specontext_vllm.engine import other_blocks
from specontext_vllm.engine.scheduler import SpeContextAsyncScheduler, SpeContextScheduler
from tests.engine.test_scheduler import hit, make, request, run, step, vllm_config

__all__ = ["vllm_config"]  # a fixture
HOST = {"host_kv_gib": 1, "retriever": "recent"}


def pools(scheduler):
    """The pools of the layers of full attention and of those with windows."""
    managers = scheduler.kv_cache_manager.coordinator.single_type_managers
    ours, others = (manager.block_pool for manager in managers)
    assert scheduler.kv_cache_manager.block_pool is ours
    return ours, others


def free(scheduler) -> list[int]:
    return [pool.get_num_free_blocks() for pool in pools(scheduler)]


@pytest.mark.parametrize("cls", [SpeContextScheduler, SpeContextAsyncScheduler])
def test_layers_with_windows_have_blocks_of_their_own_beside_two_tiers(vllm_config, cls):
    scheduler = make(vllm_config, cls, window=64, **HOST)
    ours, others = pools(scheduler)
    # 33 blocks of a window and a step's tokens, twice 6 of each of four requests, the null block.
    assert (ours.num_gpu_blocks, others.num_gpu_blocks) == (100, 1 + 33 + 2 * 4 * 6)
    before = free(scheduler)
    scheduler.add_request(request("first", list(range(100, 300)), 100))
    step(scheduler)
    blocks = scheduler.kv_cache_manager.get_blocks("first").blocks
    assert {block.pool for block in blocks[0]} == {ours}
    assert {block.pool for block in blocks[1]} == {others}
    held = [many - few for many, few in zip(before, free(scheduler), strict=True)]
    assert held == [13, 13]
    for _ in range(50):
        step(scheduler)
    # Windows give up what has left them.
    held = [many - few for many, few in zip(before, free(scheduler), strict=True)]
    assert held[0] == 16 and held[1] <= 6
    while scheduler.running:
        step(scheduler)
    assert free(scheduler) == before
    assert scheduler.reset_prefix_cache()


def test_without_a_host_pool_all_blocks_are_of_one(vllm_config):
    scheduler = make(vllm_config, SpeContextScheduler, window=64)
    ours, others = pools(scheduler)
    assert ours is others


def test_a_prefix_is_hit_as_far_as_both_pools_have_it(vllm_config):
    scheduler = make(vllm_config, SpeContextScheduler, window=64, **HOST)
    tokens = run(scheduler, list(range(100, 300)), 20)
    assert hit(scheduler, tokens[:200]) == 192
    # Other requests take the windows' blocks; ours alone are no hit.
    others = pools(scheduler)[1]
    taken = others.get_new_blocks(others.get_num_free_blocks())
    assert hit(scheduler, tokens[:200]) == 0
    others.free_blocks(taken)


@pytest.mark.parametrize("cls", [SpeContextScheduler, SpeContextAsyncScheduler])
def test_where_the_others_pool_is_short_requests_wait_and_all_end(vllm_config, cls, monkeypatch):
    monkeypatch.setattr(other_blocks, "OTHERS_KEPT", 0)
    scheduler = make(vllm_config, cls, window=64, **HOST)
    assert pools(scheduler)[1].num_gpu_blocks == 34
    before = free(scheduler)
    for i in range(4):
        start = 1000 * (i + 1)
        scheduler.add_request(request(str(i), list(range(start, start + 250)), 60))
    step(scheduler)
    # Two of them fit into 33 blocks, though there are 99 of ours.
    assert len(scheduler.running) == 2 and free(scheduler)[0] > 60
    for _ in range(300):
        step(scheduler)
    assert not scheduler.running and not scheduler.waiting
    assert free(scheduler) == before


def test_blocks_of_the_same_number_are_told_apart_by_their_group(vllm_config):
    """A request waits for hits that are being computed, and for those alone."""
    scheduler = make(vllm_config, SpeContextScheduler, window=64, **HOST)
    scheduler.add_request(request("first", list(range(100, 150)), 10))
    scheduler.schedule()
    first, windows = scheduler.kv_cache_manager.get_blocks("first").get_block_ids()
    assert scheduler._is_being_computed([set(first), set()])
    assert scheduler._is_being_computed([set(), set(windows)])
    assert not scheduler._is_being_computed([{max(first) + 1}, set()])
    scheduler.kv_cache_manager.coordinator.single_type_managers[1].req_to_blocks["first"] = []
    assert not scheduler._is_being_computed([set(), set(first)])
