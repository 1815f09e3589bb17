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
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, KVCacheGroupSpec
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


def make(vllm_config, cls, **settings):
    given = vllm_config.additional_config
    vllm_config.additional_config = {**given, "specontext": {**given["specontext"], **settings}}
    spec = FullAttentionSpec(block_size=16, num_kv_heads=2, head_size=64, dtype=torch.float32)
    kv = KVCacheConfig(
        num_blocks=100, kv_cache_tensors=[], kv_cache_groups=[KVCacheGroupSpec(["layer"], spec)]
    )
    vllm_config.cache_config.num_gpu_blocks = kv.num_blocks
    try:
        return cls(vllm_config, kv, StructuredOutputManager(vllm_config), block_size=16)
    finally:
        vllm_config.additional_config = given


def request(name: str, tokens: list[int], answer: int, *, resumable: bool = False) -> Request:
    sampling = SamplingParams(temperature=0, max_tokens=answer, stop_token_ids=[STOP])
    sampling.update_from_generation_config({}, None)
    return Request(
        name,
        list(tokens),
        sampling,
        None,
        resumable=resumable,
        block_hasher=get_request_block_hasher(16, sha256),
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


def hit(scheduler, tokens: list[int]) -> int:
    """Tokens of a prompt that the prefix cache has."""
    return scheduler.kv_cache_manager.get_computed_blocks(request("probe", [*tokens, 1], 1))[1]


def run(scheduler, prompt: list[int], answer: int) -> list[int]:
    """The request's tokens whose KV was computed."""
    scheduler.add_request(request("first", prompt, answer))
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


@pytest.mark.parametrize(("length", "start"), [(20, 16), (31, 16), (32, 32), (33, 32), (9, 0)])
def test_a_session_goes_on_from_a_page_whose_end_the_head_knows(vllm_config, length, start):
    """Its last chunk's answer ended while the next step was under way, with a token that was then
    discarded.
    """
    scheduler = make(vllm_config, SpeContextAsyncScheduler)
    prompt, more = list(range(100, 100 + length)), list(range(400, 420))
    scheduler.add_request(request("session", prompt, 50, resumable=True))
    first = scheduler.schedule()
    ahead = scheduler.schedule()
    assert ahead.num_scheduled_tokens == {"session": 1}
    finish(scheduler, first, STOP)
    finish(scheduler, ahead, 11)
    scheduler.add_request(request("session", more, 3, resumable=True))
    out = scheduler.schedule()
    (data,) = out.scheduled_new_reqs
    assert data.num_computed_tokens == start and data.prompt_token_ids == prompt + more
    assert out.num_scheduled_tokens == {"session": length + 20 - start}
    # As many pages as the tokens need, none held twice.
    assert len(data.block_ids[0]) == -(-(length + 20) // 16)
    free = scheduler.kv_cache_manager.block_pool.get_num_free_blocks()
    assert free == 99 - len(data.block_ids[0])
