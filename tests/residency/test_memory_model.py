"""The memory model against brute force and against the sizes that a worker really allocates."""

import random
import re
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from specontext_vllm.config import PAGE_SIZE, pages_for
from specontext_vllm.residency.ledger import Ledger
from specontext_vllm.residency.memory_model import (
    HOT_SHARE,
    MIN_GAIN,
    KVShape,
    MemoryModel,
    MemoryModelError,
    TierPlan,
)
from specontext_vllm.residency.step_time import StepTime
from specontext_vllm.residency.table_rows import default_captured_rows
from specontext_vllm.residency.tiers import TieredKV
from specontext_vllm.sizes import in_gib
from specontext_vllm.step_data import ScheduledStep, StartedRequest

SHAPE_8B = KVShape(
    num_layers=32,
    num_kv_heads=8,
    head_dim=128,
    itemsize=2,
    retriever_page_bytes=8 * 16 * 128 * 2 + 4096 * 2,
)
GIB = 1 << 30


def small(seed):
    r = random.Random(seed)
    shape = KVShape(r.randint(1, 6), r.choice([1, 2]), r.choice([4, 8]), 2, r.choice([0, 100]))
    model = MemoryModel(
        shape,
        budget_pages=2,
        table_pages=r.randint(2, 4),
        max_num_seqs=r.randint(1, 4),
        max_model_len=r.randint(100, 400),
    )
    return shape, model, r.randint(20, 300) * shape.page_bytes, r.randint(0, 500) * shape.page_bytes


@pytest.mark.parametrize("seed", range(30))
def test_plan_is_the_largest_that_fits(seed):
    shape, model, gpu, host = small(seed)
    try:
        plan = model.plan(gpu, host)
    except MemoryModelError as error:
        plan, refused = None, error
    else:
        model = model.with_lanes(plan.lanes)
    widths = [min(model.max_pages, int(f * model.table_pages)) for f in (1, 1.5, 2)]
    most = {
        w: max(
            (
                t
                for m in range(shape.num_layers + 1)
                for t in range(1, 800)
                if model.size(t, m, w).gpu_bytes <= gpu and model.size(t, m, w).host_bytes <= host
            ),
            default=0,
        )
        for w in widths
    }
    alone = max(
        (t for t in range(1, 800) if model.size(t, 0, widths[0]).gpu_bytes <= gpu), default=0
    )
    least = max(
        HOT_SHARE * max(most.values()),
        MIN_GAIN * alone,
        min(max(most.values()), 1 + model.max_pages),
    )
    if plan is None:
        assert max(most.values()) == 0 or max(most.values()) < least, refused
        return
    assert plan.gpu_bytes <= gpu and plan.host_bytes <= host
    assert plan.num_pages == most[plan.hot_pages] >= least
    assert all(most[w] < least for w in widths if w > plan.hot_pages)


@pytest.mark.parametrize("seed", range(20))
def test_thresholds_are_what_the_ledger_offloads(seed):
    """Equal requests just as long as S_T[i] need i layers offloaded, and a page more of each needs
    more than i.
    """
    r = random.Random(seed)
    shape = KVShape(r.randint(3, 7), 2, 4, 2, 100)
    requests = r.randint(1, 3)
    model = MemoryModel(
        shape, budget_pages=2, table_pages=2, max_num_seqs=requests, max_model_len=640
    )
    plan = model.plan(
        r.randint(200, 500) * shape.page_bytes, r.randint(300, 900) * shape.page_bytes
    )
    thresholds = model.thresholds(plan, requests)
    assert len(thresholds) == plan.host_layers + 1 and thresholds == sorted(thresholds)

    def needed(pages):
        ledger = Ledger(
            num_layers=shape.num_layers,
            num_pages=plan.num_pages,
            frames=np.arange(2 * plan.staging_pages, plan.frames),
            host_layers=plan.host_layers,
            hot_pages=plan.hot_pages,
            max_requests=requests,
            keep_unreferenced=False,
            return_pages=plan.num_pages,
        )
        started = [
            StartedRequest(f"r{i}", list(range(i * pages, (i + 1) * pages)), 0)
            for i in range(requests)
        ]
        decoding = [request.name for request in started]
        ledger.follow(ScheduledStep(started=started, decoding=decoding))
        return shape.num_layers - ledger.resident

    for offloaded, tokens in enumerate(thresholds):
        pages = tokens // PAGE_SIZE
        if pages > plan.hot_pages:
            assert needed(pages) <= offloaded
            assert model.offloaded_layers(plan, tokens, requests) <= offloaded
        if (
            pages > plan.hot_pages
            and pages < min(plan.num_pages // requests, model.max_pages)
            and offloaded < plan.host_layers
        ):
            assert needed(pages + 1) > offloaded
    assert model.offloaded_layers(plan, thresholds[-1] + 1, requests) is None


def test_capacity_of_the_paper_shape():
    """16 GiB on the GPU and 80 on the host hold about 20 requests of 32k, four times what the GPU
    alone holds.
    """
    model = MemoryModel(
        SHAPE_8B, budget_pages=128, table_pages=128, max_num_seqs=20, max_model_len=33300
    )
    both, alone = model.plan(16 * GIB, 80 * GIB), model.plan(16 * GIB, 0)
    assert 20 <= both.num_pages / pages_for(33280) < 22 and both.host_layers >= 29
    assert both.num_pages > 4 * alone.num_pages and alone.host_layers == 0
    assert model.offloaded_layers(both, 2048, 20) == 0
    assert model.offloaded_layers(both, 16384, 20) < model.offloaded_layers(both, 32768, 20)


@pytest.mark.parametrize("host", [0, 100 * GIB], ids=["one tier", "two tiers"])
def test_a_drafter_s_kv_lies_on_the_gpu_for_every_page(host):
    """A layer of the target's shape: with one tier as dear as one of its layers, and never in the
    host pool.
    """
    page = SHAPE_8B.page_bytes
    plans = []
    for drafter in (0, page):
        model = MemoryModel(
            replace(SHAPE_8B, drafter_page_bytes=drafter),
            budget_pages=128,
            table_pages=129,
            max_num_seqs=8,
            max_model_len=32768,
        )
        plans.append(model.plan(40 * GIB, host))
        assert plans[-1].gpu_bytes <= 40 * GIB and plans[-1].host_bytes <= host
        assert sum(plans[-1].parts.values()) == plans[-1].gpu_bytes
    alone, beside = plans
    assert "drafter's KV" not in alone.parts
    assert beside.parts["drafter's KV"] == beside.num_pages * page
    assert (beside.host_layers > 0) == (host > 0)
    if not host:
        each = 32 * page + SHAPE_8B.retriever_page_bytes
        assert beside.num_pages == 40 * GIB // (each + page) < alone.num_pages == 40 * GIB // each
    else:
        assert beside.num_pages < alone.num_pages


def test_all_layers_offloaded_need_no_more_than_their_hot_buffers():
    model = MemoryModel(
        KVShape(6, 2, 64, 4, 9216),
        budget_pages=16,
        table_pages=16,
        max_num_seqs=2,
        max_model_len=16384,
    )
    exact = TierPlan(
        num_pages=2100,
        host_layers=6,
        hot_pages=32,
        frames=2 * 6 * 32 + 2 * 8,
        staging_pages=8,
        host_bytes=0,
        gpu_bytes=0,
        parts={},
        lanes=2,
    )
    assert (
        model.thresholds(exact, 2) == [512] * 6 + [16384]
        and model.offloaded_layers(exact, 16384, 2) == 6
    )
    short = replace(exact, frames=exact.frames - 2)
    assert model.offloaded_layers(short, 16384, 2) is None


def test_refusals_name_the_setting_and_the_numbers():
    crowded = MemoryModel(
        SHAPE_8B, budget_pages=128, table_pages=128, max_num_seqs=1024, max_model_len=131072
    )
    wide = crowded.with_lanes(1024, budget_pages=8192, table_pages=8192)
    with pytest.raises(
        MemoryModelError,
        match=r"the hot buffer of a single request takes so much of the 16.00 GiB",
    ):
        wide.plan(16 * GIB, 8 * GIB)
    with pytest.raises(
        MemoryModelError,
        match="0.001 GiB of host memory add less than 2% to what 16.000 GiB of memory for KV "
        "hold, however small the hot buffers",
    ):
        crowded.plan(16 * GIB, GIB >> 10)
    with pytest.raises(MemoryModelError, match="hold not one page"):
        crowded.plan(1000, 0)
    with pytest.raises(MemoryModelError, match="--num-gpu-blocks-override 1000000"):
        crowded.plan(16 * GIB, 80 * GIB, 1_000_000)


def test_sizes_that_are_too_small_by_little_are_told_apart():
    model = MemoryModel(
        KVShape(6, 2, 64, 4, 9216),
        budget_pages=16,
        table_pages=16,
        max_num_seqs=1,
        max_model_len=1024,
    )
    least = model.size(100, 6, 16)
    assert model.plan(least.gpu_bytes, least.host_bytes, 100).num_pages == 100
    with pytest.raises(MemoryModelError) as error:
        model.plan(least.gpu_bytes - 1, least.host_bytes, 100)
    needed, there = re.search(
        r"need ([\d.]+) GiB .* there are ([\d.]+) and", str(error.value)
    ).groups()
    assert float(needed) > float(there)
    assert in_gib(2**30, 2**30 + 1, 0) == ["1.000000000", "1.000000001", "0.000000000"]
    assert in_gib(1) == ["0.000000001"] and in_gib(5 * 2**30, 5 * 2**30, 0) == [
        "5.00",
        "5.00",
        "0.00",
    ]


@pytest.mark.parametrize("host", [0, 40 << 20, 4 << 30])
def test_the_least_memory_holds_one_request_of_the_longest_context(host):
    model = MemoryModel(
        KVShape(6, 2, 64, 4, 9216),
        budget_pages=16,
        table_pages=16,
        max_num_seqs=2,
        max_model_len=8192,
    )
    least = model.min_gpu_bytes(host, 8192)
    assert (
        model.with_lanes(1).largest(least, host, 16).num_pages
        >= 1 + 512
        > model.with_lanes(1).largest(least - 1, host, 16).num_pages
    )
    assert model.min_gpu_bytes(host, 16) < least


@pytest.mark.parametrize(
    "requests", [1, 2, 3, 5, 7, 20, 37, 127, 128, 130, 200, 256, 400, 513, 1024]
)
def test_the_default_of_captured_rows_is_vllm_s(requests):
    from vllm.config import CUDAGraphMode, VllmConfig

    compilation = SimpleNamespace(
        cudagraph_mode=CUDAGraphMode.FULL_AND_PIECEWISE,
        max_cudagraph_capture_size=None,
        cudagraph_capture_sizes=None,
        post_init_cudagraph_sizes=lambda: None,
    )
    config = SimpleNamespace(
        model_config=SimpleNamespace(enforce_eager=False),
        compilation_config=compilation,
        uniform_decode_query_len=1,
        performance_mode=None,
        scheduler_config=SimpleNamespace(max_num_seqs=requests, max_num_batched_tokens=8192),
        speculative_config=None,
    )
    VllmConfig._set_cudagraph_sizes(config)
    assert default_captured_rows(requests) == compilation.max_cudagraph_capture_size


@pytest.mark.parametrize("name", ["8B", "1B", "demo"])
def test_plan_against_what_is_allocated(name):
    """Bytes of the tensors of a worker with a captured graph of more rows than requests,
    scaled-down tiers of three real layer shapes, within 1 %.
    """
    shape = {
        "8B": SHAPE_8B,
        "1B": KVShape(16, 8, 64, 2, 8 * 16 * 64 * 2 + 2048 * 2),
        "demo": KVShape(6, 2, 64, 4, 9216),
    }[name]
    model = MemoryModel(
        shape, budget_pages=4, table_pages=4, max_num_seqs=3, max_model_len=256, captured_rows=512
    )
    plan = model.plan(96 << 20, 64 << 20)
    tiers = TieredKV(
        plan,
        num_layers=shape.num_layers,
        num_kv_heads=shape.num_kv_heads,
        head_dim=shape.head_dim,
        dtype={2: torch.bfloat16, 4: torch.float32}[shape.itemsize],
        max_requests=3,
        max_rows=512,
        table_pages=4,
        max_pages=16,
        keep_unreferenced=True,
        timed=True,
        device=torch.device("cpu"),
    )
    tensors = tiers.device_tensors()
    arena = tensors.pop("arena")
    # A few bytes a request each, which the model leaves out.
    small = [tensors.pop(name) for name in ("resident", "step", "count", "capacity", "lanes")]
    assert sum(t.nbytes for t in small) < 4096
    tables = sum(t.nbytes for t in tensors.values())
    allocated = arena.nbytes + tables + plan.num_pages * shape.retriever_page_bytes
    assert tables == plan.parts["tables"]
    assert allocated == pytest.approx(plan.gpu_bytes, rel=0.01)
    assert tiers.pools.host.nbytes == plan.host_bytes > 0


def test_step_time_is_bytes_over_bandwidth():
    law = StepTime(weight_bytes=16_000_000_000)
    compute, transfer, moved = law.step(
        SHAPE_8B, requests=20, length=32768, budget_pages=128, offloaded=29, miss_rate=0.05
    )
    assert moved == pytest.approx(20 * 29 * 128 * 0.05 * 65536, rel=1e-6)
    assert transfer == pytest.approx(moved / 50e9) and 0.005 < compute < 0.008


@pytest.mark.parametrize("asked", [256, 1024])
def test_lanes_beyond_what_pays_leave_half_of_what_the_host_pool_adds(asked):
    """Llama-3.1-8B's KV, 16 GiB on the GPU and 80 on the host, budget 2048, vLLM's defaults of
    --max-num-seqs; the number is found anew by trying them one by one.
    """
    shape = KVShape(32, 8, 128, 2, 8 * 16 * 128 * 2 + 4096 * 2)
    gpu, host, width = 16 << 30, 80 << 30, 128

    def model(lanes: int) -> MemoryModel:
        return MemoryModel(
            shape,
            budget_pages=128,
            table_pages=128,
            max_num_seqs=asked,
            lanes=lanes,
            max_model_len=33280,
        )

    alone, best = (model(1).largest(gpu, size, width).num_pages for size in (0, host))
    plan = model(asked).plan(gpu, host)
    leaving = [
        lanes
        for lanes in range(1, plan.lanes + 5)
        if model(lanes).largest(gpu, host, width).num_pages >= alone + (best - alone) / 2
    ]
    assert leaving == list(range(1, plan.lanes + 1)) and 1 < plan.lanes < asked
    assert alone < plan.num_pages
    # As many as somebody asks for are kept wherever they pay, also where they leave less.
    pay = [
        lanes
        for lanes in range(plan.lanes, plan.lanes + 60)
        if model(lanes).largest(gpu, host, width).num_pages >= MIN_GAIN * alone
    ]
    assert len(pay) > 1
    assert [model(lanes).plan(gpu, host).lanes for lanes in (5, *pay)] == [5, *pay]
    assert model(pay[-1] + 1).plan(gpu, host).lanes == plan.lanes
    assert model(asked).plan(gpu, 0).lanes == asked


def test_a_plan_with_every_layer_offloaded_has_as_many_lanes_as_fit_or_is_refused():
    model = MemoryModel(
        SHAPE_8B, budget_pages=128, table_pages=128, max_num_seqs=4, max_model_len=34400
    )
    plan = model.plan_all_offloaded(8 * GIB, 20 * GIB)
    assert plan.num_pages == 1 + 4 * 2150
    assert plan.host_layers == SHAPE_8B.num_layers and plan.hot_pages == 256
    assert plan.frames == 32 * 4 * 256 + 2 * plan.staging_pages
    assert model.plan_all_offloaded(8 * GIB, 20 * GIB, 5000).num_pages == 5000
    for gpu, host in ((plan.gpu_bytes - 1, 20 * GIB), (8 * GIB, plan.host_bytes - 1)):
        fewer = model.plan_all_offloaded(gpu, host)
        assert fewer.lanes == 3 and fewer.num_pages == 1 + 3 * 2150
    one = model.with_lanes(1)
    one_plan = one.plan_all_offloaded(8 * GIB, 20 * GIB)
    for gpu, host in ((one_plan.gpu_bytes - 1, 20 * GIB), (8 * GIB, one_plan.host_bytes - 1)):
        with pytest.raises(MemoryModelError, match="set loading to adaptive"):
            model.plan_all_offloaded(gpu, host)
