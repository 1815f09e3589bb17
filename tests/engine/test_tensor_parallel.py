"""Two workers, each with one of the demo model's two KV heads: each scores and selects for its own,
and the tokens are one worker's.

And two workers with one KV head between them: each has a copy, and the tokens are those of a model
    that has the KV head twice.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.workers import tensor_parallel
from specontext_vllm.distillation.draft import DraftModel
from specontext_vllm.distillation.shape import DraftShape
from specontext_vllm.synthetic.tasks import make_problem, score
from tests.distillation.tiny_models import make_config, make_model
from tests.engine.conftest import engine

pytestmark = pytest.mark.usefixtures("forked_workers")
needs_two = pytest.mark.skipif(
    torch.cuda.is_available() and torch.cuda.device_count() < 2, reason="needs two GPUs"
)

SHAPE = {"attention_backend": "specontext", "max_model_len": 2048, "max_num_batched_tokens": 2048}


@needs_two
def test_two_workers_give_the_tokens_of_one_with_one_tier_and_with_two(own_head):
    from vllm import SamplingParams

    pages, pool = 200, 0.125
    problems = [
        make_problem(kind, seed=seed, approx_tokens=1250)
        for kind, seed in (("needle", 40), ("recitation", 50))
    ]
    params = [
        SamplingParams(temperature=0, max_tokens=24 + 2 * len(p.answer.split())) for p in problems
    ]
    tokens, texts = {}, {}
    for name, workers, tiers in (
        ("alone", 1, {}),
        ("one", 2, {}),
        ("two", 2, {"host_kv_gib": pool, "gpu_kv_gib": 0.0046, "stickiness": 0}),
    ):
        settings = {"specontext": {"retrieval_head": str(own_head), "budget": 128, **tiers}}
        with engine(
            **SHAPE,
            **tensor_parallel(workers),
            num_gpu_blocks_override=pages,
            additional_config=settings,
        ) as llm:
            replies = llm.chat([p.messages for p in problems], params, use_tqdm=False)
            stats = llm.collective_rpc("specontext_stats")
        tokens[name] = [list(r.outputs[0].token_ids) for r in replies]
        texts[name] = [r.outputs[0].text for r in replies]
        assert len(stats) == workers
        for worker in stats:
            assert worker["pages_read"] < 0.12 * worker["pages_total"]
        if tiers:
            # The pool is the machine's: its workers share it.
            assert 0 < sum(worker["host_pool_bytes"] for worker in stats) <= pool * 2**30
            assert all(worker["fetched_bytes"] > 0 for worker in stats)
    assert [score(p, text) for p, text in zip(problems, texts["one"])] == [1.0] * 2
    assert tokens["two"] == tokens["one"] == tokens["alone"]


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 4, reason="needs four GPUs")
def test_four_workers_with_two_kv_heads_give_the_tokens_of_one(own_head):
    """Pairs of them hold the same KV head, each with a half of its query heads, and choose for
    these: where everything is read the tokens are one worker's, else each has its own pages.
    """
    from vllm import SamplingParams

    problem = make_problem("needle", seed=40, approx_tokens=1250)
    params = SamplingParams(temperature=0, max_tokens=24 + 2 * len(problem.answer.split()))
    tokens, texts = {}, {}
    for workers in (1, 4):
        for budget in (2048, 128):
            settings = {"specontext": {"retrieval_head": str(own_head), "budget": budget}}
            with engine(
                **SHAPE,
                **tensor_parallel(workers),
                num_gpu_blocks_override=200,
                additional_config=settings,
            ) as llm:
                (reply,) = llm.chat([problem.messages], params, use_tqdm=False)
                assert len(llm.collective_rpc("specontext_stats")) == workers
            tokens[workers, budget] = list(reply.outputs[0].token_ids)
            texts[workers, budget] = reply.outputs[0].text
    assert tokens[4, 2048] == tokens[1, 2048]
    assert score(problem, texts[4, 128]) == score(problem, texts[1, 128]) == 1.0


def counted(llm: Any, what: str) -> float:
    """vLLM's count of drafts."""
    return sum(
        metric.value
        for metric in llm.get_metrics()
        if metric.name == f"vllm:spec_decode_num_{what}"
    )


def random_model(folder: Path, kv_heads: int) -> Path:
    """A random Llama of five layers and its head. With two KV heads, both are the one of the model
    that has one: the same function of dense attention.
    """
    from transformers import AutoModelForCausalLM

    def double(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return {
            name: w.repeat(kv_heads, 1) if "k_proj" in name or "v_proj" in name else w
            for name, w in state.items()
        }

    shape = {
        "hidden_size": 256,
        "intermediate_size": 320,
        "num_attention_heads": 4,
        "head_dim": 64,
        "max_position_embeddings": 2048,
    }
    one, several = (make_config("llama", **shape, num_key_value_heads=n) for n in (1, kv_heads))
    wide = AutoModelForCausalLM.from_config(several, dtype=torch.float32)
    wide.load_state_dict(double(make_model(one).state_dict()))
    wide.save_pretrained(folder)
    torch.manual_seed(1)
    draft = DraftModel(DraftShape.for_target(one, max_position=2048))
    wide_draft = DraftModel(DraftShape.for_target(several, max_position=2048))
    wide_draft.load_state_dict(double(draft.state_dict()))
    wide_draft.save(folder / "retrieval_head")
    return folder


@needs_two
def test_two_workers_with_one_kv_head_choose_pages_for_their_own_query_heads(tmp_path):
    from vllm import SamplingParams, TokensPrompt

    generator = torch.Generator().manual_seed(2)
    prompts = [
        TokensPrompt(prompt_token_ids=torch.randint(5, 97, (n,), generator=generator).tolist())
        for n in (900, 333, 610)
    ]
    params = SamplingParams(temperature=0, max_tokens=24, ignore_eos=True, detokenize=False)
    tokens = {}
    for name, workers, kv_heads, budget in (
        ("dense", 1, 2, 2048),
        ("alone", 1, 2, 128),
        ("two", 2, 1, 128),
        # Drafts of the head's own checkpoint, which both workers draft together.
        ("drafted", 2, 1, 2048),
        # Drafts of the target, over the pages that each worker selects for its own heads.
        ("lossless", 2, 1, 128),
    ):
        model = random_model(tmp_path / name, kv_heads)
        settings = {
            "specontext": {"budget": budget, "retrieval_head": str(model / "retrieval_head")}
        }
        shape = {**SHAPE, "max_model_len": 1024, "skip_tokenizer_init": True}
        if name == "lossless":
            settings["specontext"]["mode"] = "lossless"
        if name == "drafted":
            drafter = str(model / "retrieval_head")
            shape["speculative_config"] = {
                "method": "eagle3",
                "model": drafter,
                "num_speculative_tokens": 2,
            }
        with engine(
            **{**shape, "model": str(model)},
            **tensor_parallel(workers),
            num_gpu_blocks_override=260,
            additional_config=settings,
        ) as llm:
            if name == "lossless":
                scheduler = llm.llm_engine.engine_core.engine_core.scheduler
                scheduler.draft_length.choose = lambda contexts: 3
            replies = llm.generate(prompts, params, use_tqdm=False)
            stats = llm.collective_rpc("specontext_stats")
            if name == "lossless":
                accepted = counted(llm, "accepted_tokens")
                assert 0 < accepted < counted(llm, "draft_tokens")
        tokens[name] = [list(reply.outputs[0].token_ids) for reply in replies]
        if budget < 1024 and name != "lossless":
            assert len(stats) == workers and all(
                0 < worker["pages_read"] < 0.5 * worker["pages_total"] for worker in stats
            )
    assert tokens["two"] == tokens["alone"]
    assert tokens["drafted"] == tokens["dense"] == tokens["lossless"]
    assert all(a != b for a, b in zip(tokens["alone"], tokens["dense"], strict=True)), (
        "the pages that were left out mattered"
    )
