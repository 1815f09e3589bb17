"""The memory model against brute force and against the sizes that a worker really allocates."""

import random

import pytest
import torch

from specontext_vllm.config import pages_for
from specontext_vllm.residency.memory_model import HOT_SHARE, KVShape, MemoryModel, MemoryModelError, StepTime
from specontext_vllm.residency.tiers import TieredKV

SHAPE_8B = KVShape(num_layers=32, num_kv_heads=8, head_dim=128, itemsize=2, head_page_bytes=8 * 16 * 128 * 2 + 4096 * 2)
GIB = 1 << 30


def small(seed):
    r = random.Random(seed)
    shape = KVShape(r.randint(1, 6), r.choice([1, 2]), r.choice([4, 8]), 2, r.choice([0, 100]))
    model = MemoryModel(
        shape, budget_pages=2, table_pages=r.randint(2, 4), max_num_seqs=r.randint(1, 4), max_model_len=r.randint(100, 400)
    )
    return shape, model, r.randint(20, 300) * shape.page_bytes, r.randint(0, 500) * shape.page_bytes


@pytest.mark.parametrize("seed", range(30))
def test_plan_is_the_largest_that_fits(seed):
    shape, model, gpu, host = small(seed)
    widths = [min(model.max_pages, int(f * model.table_pages)) for f in (1, 1.5, 2)]
    most = {
        w: max(
            (t for m in range(shape.num_layers + 1) for t in range(1, 800)
             if model.size(t, m, w).gpu_bytes <= gpu and model.size(t, m, w).host_bytes <= host),
            default=0,
        )
        for w in widths
    }  # fmt: skip
    try:
        plan = model.plan(gpu, host)
    except MemoryModelError as error:
        alone = max((t for t in range(1, 800) if model.size(t, 0, widths[0]).gpu_bytes <= gpu), default=0)
        assert max(most.values()) == 0 or max(most.values()) * HOT_SHARE < 1.02 * alone, error
        return
    assert plan.gpu_bytes <= gpu and plan.host_bytes <= host
    assert plan.num_pages == most[plan.hot_pages] >= HOT_SHARE * max(most.values())
    assert all(most[w] < HOT_SHARE * max(most.values()) for w in widths if w > plan.hot_pages)


@pytest.mark.parametrize("seed", range(10))
def test_thresholds_are_the_longest_that_fit(seed):
    shape, model, gpu, host = small(seed)
    for requests in (1, 3):
        for offloaded, tokens in enumerate(model.thresholds(gpu, requests, host)):
            def fits(pages, offloaded=offloaded, requests=requests):
                return model._bytes_at(pages, requests, offloaded) <= gpu and offloaded * requests * pages * shape.page_bytes <= host

            assert tokens == 16 * max((p for p in range(1, 2000) if fits(p)), default=0)


def test_capacity_of_the_paper_shape():
    """16 GiB on the GPU and 80 on the host hold about 20 requests of 32k, four times what the GPU alone holds."""
    model = MemoryModel(SHAPE_8B, budget_pages=128, table_pages=128, max_num_seqs=20, max_model_len=33300)
    both, alone = model.plan(16 * GIB, 80 * GIB), model.plan(16 * GIB, 0)
    assert 20 <= both.num_pages / pages_for(33280) < 22 and both.host_layers >= 29
    assert both.num_pages > 4 * alone.num_pages and alone.host_layers == 0
    assert model.offloaded_layers(2048, 20, 16 * GIB) == 0
    assert model.offloaded_layers(16384, 20, 16 * GIB) < model.offloaded_layers(32768, 20, 16 * GIB)


def test_refusals_name_the_setting_and_the_numbers():
    crowded = MemoryModel(SHAPE_8B, budget_pages=128, table_pages=128, max_num_seqs=1024, max_model_len=131072)
    with pytest.raises(MemoryModelError, match=r"--max-num-seqs 1024 .* 16.0 GiB .*; --max-num-seqs \d+ is the largest that pays"):
        crowded.plan(16 * GIB, 80 * GIB)
    with pytest.raises(MemoryModelError, match="hold not one page"):
        crowded.plan(1000, 0)
    with pytest.raises(MemoryModelError, match="--num-gpu-blocks-override 1000000"):
        crowded.plan(16 * GIB, 80 * GIB, 1_000_000)


@pytest.mark.parametrize("name", ["8B", "1B", "demo"])
def test_plan_against_what_is_allocated(name):
    """Bytes of the tensors of a worker, scaled-down tiers of three real layer shapes, within 3 %."""
    shape = {"8B": SHAPE_8B, "1B": KVShape(16, 8, 64, 2, 8 * 16 * 64 * 2 + 2048 * 2), "demo": KVShape(6, 2, 64, 4, 9216)}[name]
    model = MemoryModel(shape, budget_pages=4, table_pages=4, max_num_seqs=3, max_model_len=256)
    plan = model.plan(96 << 20, 64 << 20)
    tiers = TieredKV(
        plan, num_layers=shape.num_layers, num_kv_heads=shape.num_kv_heads, head_dim=shape.head_dim,
        dtype={2: torch.bfloat16, 4: torch.float32}[shape.itemsize], max_requests=3, max_rows=3, table_pages=4, max_pages=16,
        keep_unreferenced=True, timed=True, device=torch.device("cpu"),
    )  # fmt: skip
    hot = tiers.hot
    tables = [tiers.frames, tiers.hot_frames, tiers.tables, hot.slot_of, hot.page_of, hot.source_of, hot.stamp, hot.slots, hot.sources]
    allocated = tiers.arena.nbytes + sum(t.nbytes for t in tables) + plan.num_pages * shape.head_page_bytes
    assert allocated == pytest.approx(plan.gpu_bytes, rel=0.03)
    assert tiers.host.nbytes == plan.host_bytes > 0


def test_step_time_is_bytes_over_bandwidth():
    law = StepTime(weight_bytes=16_000_000_000)
    compute, transfer, moved = law.step(SHAPE_8B, requests=20, length=32768, budget_pages=128, offloaded=29, miss_rate=0.05)
    assert moved == pytest.approx(20 * 29 * 128 * 0.05 * 65536, rel=1e-6)
    assert transfer == pytest.approx(moved / 50e9) and 0.005 < compute < 0.008
