"""What our schedulers ask of the prefix cache and of sessions; vLLM's own scheduler and pages, no
model.
"""

from __future__ import annotations

import pytest
import torch
from vllm.engine.arg_utils import EngineArgs
from vllm.sampling_params import SamplingParams
from vllm.utils.hashing import sha256
from vllm.v1.core.kv_cache_utils import get_request_block_hasher, init_none_hash
from vllm.v1.kv_cache_interface import (
    FullAttentionSpec,
    KVCacheConfig,
    KVCacheGroupSpec,
    SlidingWindowSpec,
)
from vllm.v1.outputs import ModelRunnerOutput
from vllm.v1.request import Request
from vllm.v1.structured_output import StructuredOutputManager

from specontext_vllm.engine.scheduler import SpeContextAsyncScheduler, SpeContextScheduler
from tests.engine.conftest import DEMO_MODEL

STOP = 7
init_none_hash(sha256)


@pytest.fixture(scope="module")
def vllm_config():
    args = EngineArgs(
        model=str(DEMO_MODEL),
        dtype="float32",
        max_model_len=512,
        max_num_seqs=4,
        max_num_batched_tokens=512,
        enforce_eager=True,
        gpu_memory_utilization=0.1,
        attention_backend="specontext",
        additional_config={"specontext": {"budget": 112}},
    )
    return args.create_engine_config()


def make(vllm_config, cls, block_size=16, *, window=0, **settings):
    given = vllm_config.additional_config
    vllm_config.additional_config = {**given, "specontext": {**given["specontext"], **settings}}
    spec = FullAttentionSpec(
        block_size=block_size, num_kv_heads=2, head_size=64, dtype=torch.float32
    )
    groups = [KVCacheGroupSpec(["layer"], spec)]
    if window:
        sliding = SlidingWindowSpec(
            block_size=block_size,
            num_kv_heads=2,
            head_size=64,
            dtype=torch.float32,
            sliding_window=window,
        )
        groups.append(KVCacheGroupSpec(["sliding"], sliding))
    kv = KVCacheConfig(num_blocks=1600 // block_size, kv_cache_tensors=[], kv_cache_groups=groups)
    vllm_config.cache_config.num_gpu_blocks = kv.num_blocks
    try:
        return cls(vllm_config, kv, StructuredOutputManager(vllm_config), block_size=block_size)
    finally:
        vllm_config.additional_config = given


def request(
    name: str,
    tokens: list[int],
    answer: int,
    *,
    resumable: bool = False,
    block_size: int = 16,
    own: dict | None = None,
) -> Request:
    sampling = SamplingParams(
        temperature=0, max_tokens=answer, stop_token_ids=[STOP], extra_args=own
    )
    sampling.update_from_generation_config({}, None)
    return Request(
        name,
        list(tokens),
        sampling,
        None,
        resumable=resumable,
        block_hasher=get_request_block_hasher(block_size, sha256),
    )


def step(scheduler, token: int = 9):
    """One step that samples ``token`` for every request whose prompt is through."""
    out = scheduler.schedule()
    finish(scheduler, out, token)
    return out


def finish(scheduler, out, token: int) -> None:
    names = list(out.num_scheduled_tokens)
    scheduler.update_from_output(
        out,
        ModelRunnerOutput(
            names, {name: row for row, name in enumerate(names)}, [[token] for _ in names]
        ),
    )


def hit(scheduler, tokens: list[int], block_size: int = 16) -> int:
    """Tokens of a prompt that the prefix cache has."""
    return scheduler.kv_cache_manager.get_computed_blocks(
        request("probe", [*tokens, 1], 1, block_size=block_size)
    )[1]


def run(
    scheduler, prompt: list[int], answer: int, block_size: int = 16, own: dict | None = None
) -> list[int]:
    """The request's tokens whose KV was computed."""
    scheduler.add_request(request("first", prompt, answer, block_size=block_size, own=own))
    for _ in range(answer):
        step(scheduler)
    assert not scheduler.running
    return prompt + [9] * (answer - 1)


@pytest.mark.parametrize("cls", [SpeContextScheduler, SpeContextAsyncScheduler])
@pytest.mark.parametrize(
    ("length", "settings", "kept"),
    [
        (200, {}, 192),
        (40, {}, 112),
        (200, {"cache_generated": True}, 288),
        (200, {"budget": 512}, 288),
        (200, {"retriever": "dense"}, 288),
    ],
    ids=[
        "beyond the budget: the prompt",
        "within it: the budget",
        "cache_generated: all",
        "budget over the context: all",
        "dense: all",
    ],
)
def test_pages_of_generated_tokens_are_cached_where_their_kv_is_exact(
    vllm_config, cls, length, settings, kept
):
    scheduler = make(vllm_config, cls, **settings)
    tokens = run(scheduler, list(range(100, 100 + length)), 100)
    assert hit(scheduler, tokens) == min(kept, len(tokens) // 16 * 16)


@pytest.mark.parametrize(
    ("own", "kept"),
    [
        ({"specontext_budget": 160}, 160),
        ({"specontext_budget": 200}, 192),
        ({"specontext_mode": "dense"}, 224),
        ({"specontext_mode": "sparse"}, 112),
    ],
    ids=str,
)
def test_a_request_s_own_budget_says_which_of_its_pages_are_exact(vllm_config, own, kept):
    scheduler = make(vllm_config, SpeContextAsyncScheduler, max_budget="full")
    tokens = run(scheduler, list(range(100, 140)), 200, own=own)
    assert hit(scheduler, tokens) == kept


def test_a_session_that_turns_dense_keeps_what_was_sparse_out_of_the_cache(vllm_config):
    scheduler = make(vllm_config, SpeContextScheduler, max_budget="full")
    dense = {"specontext_mode": "dense"}
    prompt, more = list(range(100, 140)), list(range(400, 440))
    scheduler.add_request(request("session", prompt, 150, resumable=True))
    for _ in range(150):
        step(scheduler)
    scheduler.add_request(request("session", more, 50, resumable=True, own=dense))
    for _ in range(50):
        step(scheduler)
    assert hit(scheduler, scheduler.requests["session"].prompt_token_ids) == 112


@pytest.mark.parametrize("block_size", [32, 64, 128])
@pytest.mark.parametrize("length", [200, 40])
def test_of_larger_blocks_the_whole_exact_ones_are_cached(vllm_config, block_size, length):
    scheduler = make(vllm_config, SpeContextScheduler, block_size)
    tokens = run(scheduler, list(range(100, 100 + length)), 100, block_size)
    exact = max(length, 112)  # the prompt, or the budget
    assert hit(scheduler, tokens, block_size) == exact // block_size * block_size


@pytest.mark.parametrize("block_size", [16, 64])
def test_a_hit_waits_for_the_step_that_computes_its_blocks(vllm_config, block_size):
    scheduler = make(vllm_config, SpeContextScheduler, block_size)
    prompt = list(range(100, 230))
    for name in ("first", "second"):
        scheduler.add_request(request(name, prompt, 4, block_size=block_size))
    assert step(scheduler).num_scheduled_tokens == {"first": 130}
    assert step(scheduler).num_scheduled_tokens == {"first": 1, "second": 2}


@pytest.mark.parametrize("block_size", [16, 64])
def test_a_hit_waits_for_computed_blocks_alone(vllm_config, block_size):
    """The first request's prompt is long through when the second comes; its block of generated
    tokens, which it still writes, is none that is hit.
    """
    scheduler = make(vllm_config, SpeContextScheduler, block_size)
    prompt = list(range(100, 230))
    scheduler.add_request(request("first", prompt, 9, block_size=block_size))
    step(scheduler)
    scheduler.add_request(request("second", prompt, 4, block_size=block_size))
    assert step(scheduler).num_scheduled_tokens == {"first": 1, "second": 2}


def test_a_preempted_request_does_not_cache_what_it_had_generated(vllm_config):
    scheduler = make(vllm_config, SpeContextScheduler)
    prompt = list(range(100, 300))
    scheduler.add_request(request("first", prompt, 100))
    for _ in range(60):
        step(scheduler)
    scheduler.reset_prefix_cache(reset_running_requests=True)
    assert hit(scheduler, prompt) == 0
    for _ in range(41):
        step(scheduler)
    assert not scheduler.running and hit(scheduler, prompt + [9] * 99) == 192


def test_a_sessions_answers_stay_out_of_the_cache_though_they_become_its_prompt(vllm_config):
    scheduler = make(vllm_config, SpeContextScheduler)
    prompt, more = list(range(100, 300)), list(range(400, 500))
    scheduler.add_request(request("session", prompt, 50, resumable=True))
    for _ in range(50):
        step(scheduler)
    scheduler.add_request(request("session", more, 3, resumable=True))
    for _ in range(3):
        step(scheduler)
    session = scheduler.requests["session"]
    assert session.num_prompt_tokens == 200 + 49 + 100
    assert hit(scheduler, prompt) == hit(scheduler, session.prompt_token_ids) == 192


@pytest.mark.parametrize("block_size", [16, 64])
@pytest.mark.parametrize(("length", "start"), [(20, 16), (31, 16), (32, 32), (33, 32), (9, 0)])
def test_a_session_goes_on_from_a_page_whose_end_the_head_knows(
    vllm_config, length, start, block_size
):
    """Its last chunk's answer ended while the next step was under way, with a token that was then
    discarded.
    """
    scheduler = make(vllm_config, SpeContextAsyncScheduler, block_size)
    prompt, more = list(range(100, 100 + length)), list(range(400, 420))
    scheduler.add_request(request("session", prompt, 50, resumable=True, block_size=block_size))
    first = scheduler.schedule()
    ahead = scheduler.schedule()
    assert ahead.num_scheduled_tokens == {"session": 1}
    finish(scheduler, first, STOP)
    finish(scheduler, ahead, 11)
    scheduler.add_request(request("session", more, 3, resumable=True, block_size=block_size))
    out = scheduler.schedule()
    (data,) = out.scheduled_new_reqs
    assert data.num_computed_tokens == start and data.prompt_token_ids == prompt + more
    assert out.num_scheduled_tokens == {"session": length + 20 - start}
    # As many blocks as the tokens need, none held twice.
    assert len(data.block_ids[0]) == -(-(length + 20) // block_size)
    free = scheduler.kv_cache_manager.block_pool.get_num_free_blocks()
    assert free == 1600 // block_size - 1 - len(data.block_ids[0])


def test_a_session_with_windows_starts_from_what_the_prefix_cache_has(vllm_config):
    """Its newest page's first tokens look back at a block that its windows have given up."""
    scheduler = make(vllm_config, SpeContextAsyncScheduler, window=16)
    prompt, more = list(range(100, 170)), list(range(400, 420))
    scheduler.add_request(request("session", prompt, 50, resumable=True))
    first, ahead = scheduler.schedule(), scheduler.schedule()
    finish(scheduler, first, STOP)
    finish(scheduler, ahead, 11)
    scheduler.add_request(request("session", more, 3, resumable=True))
    (data,) = scheduler.schedule().scheduled_new_reqs
    assert data.num_computed_tokens == 64 and data.prompt_token_ids == prompt + more
    # Of the windows' layers the last block before these tokens is there, the null block elsewhere.
    full, sliding = data.block_ids
    assert 0 not in full and sliding[:3] == [0, 0, 0] and sliding[3] > 0
