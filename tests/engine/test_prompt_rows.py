"""Prompts are dense whatever their chunks are, and a warm cache answers as a cold one: float32,
real weights, a budget far below the context.
"""

from __future__ import annotations

import pytest
import torch

from tests.engine.conftest import DEMO_MODEL, engine
from tests.engine.scenarios import sampling

CLOSE = 2e-2 if torch.cuda.is_available() else 1e-3
"""Of log-probabilities; on a GPU float32 products run on tf32 units, in other orders for other
chunks.
"""


def at_once(llm, tokens: int) -> None:
    """A step has room for so many tokens; those of requests that decode come first."""
    llm.llm_engine.engine_core.engine_core.scheduler.max_num_scheduled_tokens = tokens


def generate(llm, prompts, **changes):
    return llm.generate(
        [{"prompt_token_ids": p} for p in prompts], sampling(**changes), use_tqdm=False
    )


def beside_a_decode_row(llm, neighbour, prompt):
    """The prompt's output; its neighbour decodes all the while."""
    asked = [sampling(max_tokens=180), sampling(prompt_logprobs=0, logprobs=5)]
    return llm.generate(
        [{"prompt_token_ids": p} for p in (neighbour, prompt)], asked, use_tqdm=False
    )[1]


def prompt_logprobs(output) -> torch.Tensor:
    return torch.tensor(
        [next(iter(entry.values())).logprob for entry in output.prompt_logprobs[1:]]
    )


def first_logprobs(output) -> dict[int, float]:
    return {token: entry.logprob for token, entry in output.outputs[0].logprobs[0].items()}


def gap(left: dict[int, float], right: dict[int, float]) -> float:
    assert set(left) & set(right)
    return max(abs(left[token] - right[token]) for token in set(left) & set(right))


def next_turn(llm, prompt, more):
    """The next turn of a conversation, its history from the cache and anew."""
    answer = generate(llm, [prompt], max_tokens=100)[0]
    turn = prompt + list(answer.outputs[0].token_ids) + more
    warm = generate(llm, [turn], logprobs=5)[0]
    llm.reset_prefix_cache()
    cold = generate(llm, [turn], logprobs=5)[0]
    llm.reset_prefix_cache()
    return warm, cold


@pytest.fixture(scope="module")
def outputs(prompts):
    settings = {
        "specontext": {
            "retrieval_head": str(DEMO_MODEL / "retrieval_head"),
            "budget": 64,
            "sink_tokens": 16,
            "recent_tokens": 16,
        }
    }
    found = {}
    with engine(
        max_model_len=896, attention_backend="specontext", additional_config=settings
    ) as llm:
        prompt = prompts[-2][:160]
        for room in (255, 1):
            at_once(llm, room)
            found["alone", room] = generate(llm, [prompt], prompt_logprobs=0, logprobs=5)[0]
            llm.reset_prefix_cache()
            at_once(llm, room + 1)
            found["beside", room] = beside_a_decode_row(llm, prompts[0], prompt)
            at_once(llm, 256)
            # What the cache has of it now.
            found["hit", room] = generate(llm, [prompt + prompts[4][:40]], logprobs=5)[0]
            llm.reset_prefix_cache()
        one_left = prompts[-1][: (len(prompts[-1]) - 1) // 16 * 16 + 1]
        for name in ("cold", "warm"):
            found[name] = generate(llm, [one_left], logprobs=5)[0]
        llm.reset_prefix_cache()
        found["turns"] = [next_turn(llm, prompts[row], prompts[4][:50]) for row in (-2, 5)]
    return found


@pytest.mark.parametrize("company", ["alone", "beside"])
def test_a_prompt_computed_one_token_a_step_is_as_dense_as_in_large_chunks(outputs, company):
    whole, single = outputs[company, 255], outputs[company, 1]
    torch.testing.assert_close(prompt_logprobs(single), prompt_logprobs(whole), rtol=0, atol=CLOSE)
    assert gap(first_logprobs(single), first_logprobs(whole)) < CLOSE
    assert list(single.outputs[0].token_ids) == list(whole.outputs[0].token_ids)


def test_what_such_a_prompt_leaves_in_the_prefix_cache_is_dense(outputs):
    whole, single = outputs["hit", 255], outputs["hit", 1]
    assert single.num_cached_tokens == whole.num_cached_tokens == 160
    assert gap(first_logprobs(single), first_logprobs(whole)) < CLOSE
    assert list(single.outputs[0].token_ids) == list(whole.outputs[0].token_ids)


def test_a_prompt_of_which_the_cache_lacks_one_token_is_dense(outputs):
    cold, warm = outputs["cold"], outputs["warm"]
    assert warm.num_cached_tokens == len(warm.prompt_token_ids) - 1
    assert gap(first_logprobs(cold), first_logprobs(warm)) < CLOSE
    assert list(warm.outputs[0].token_ids) == list(cold.outputs[0].token_ids)


def test_the_next_turn_answers_as_with_a_cold_cache(outputs):
    for warm, cold in outputs["turns"]:
        assert warm.num_cached_tokens >= 256
        assert gap(first_logprobs(warm), first_logprobs(cold)) < CLOSE
        assert list(warm.outputs[0].token_ids) == list(cold.outputs[0].token_ids)
