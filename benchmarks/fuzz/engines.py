"""The engines, and what they answer to a mix."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from benchmarks.fuzz.mixes import MAX_MODEL_LEN, MAX_SEQS, PAGES, STEP_TOKENS, Mix
from benchmarks.prompts import make_prompts
from benchmarks.shapes import DEMO_MODEL

# The engine with one tier starts with a budget over the context, which keeps generated pages in its
# prefix cache; it still does under the small budget, so two tiers must, too.
SETTINGS = {
    "retrieval_head": str(DEMO_MODEL / "retrieval_head"),
    "budget": MAX_MODEL_LEN,
    "sink_tokens": 16,
    "recent_tokens": 16,
    "stickiness": 0,
    "cache_generated": True,
}
SMALL_BUDGET = 64
TIERS = {"budget": SMALL_BUDGET, "host_kv_gib": 0.25, "gpu_kv_gib": 0.0036}


@dataclass
class Answer:
    """What came of one completion of a request.

    Attributes:
        tokens: token ids.
        logprobs: per token the log-probabilities by token id; empty where none were asked for.
        prompt: log-probabilities of the prompt's tokens, each None or by token id; empty where none
            were asked for.
        end: the reasons for its end; None where it was aborted.
    """

    tokens: list[int]
    logprobs: list[dict[int, float]]
    prompt: list[dict[int, float] | None]
    end: tuple[str | None, int | str | None] | None


Answers = list[dict[int, Answer]]
"""Of a mix: of each request its completions, by their index."""


def play(llm: Any, mix: Mix, gaps: bool = False) -> Answers:
    """What an engine answers to a mix.

    Args:
        llm: an engine in this process.
        gaps: take greedy tokens' two likeliest log-probabilities at least, whatever was asked for.
    """
    from vllm import SamplingParams

    engine = llm.llm_engine
    scheduler = engine.engine_core.engine_core.scheduler
    scheduler.max_num_scheduled_tokens, scheduler.scheduler_config.enable_chunked_prefill = (
        mix.step_tokens,
        mix.chunked,
    )
    if mix.cold:
        llm.reset_prefix_cache()
    answers: Answers = [{} for _ in mix.requests]
    waiting = sorted(range(len(mix.requests)), key=lambda index: mix.requests[index].arrives)
    step, prefilling = 0, set()
    while waiting or engine.has_unfinished_requests():
        while waiting and (
            mix.requests[waiting[0]].arrives <= step or not engine.has_unfinished_requests()
        ):
            index = waiting.pop(0)
            request = mix.requests[index]
            params = {"detokenize": False, **request.params}
            if gaps and params["temperature"] == 0:
                params["logprobs"] = max(2, params.get("logprobs") or 0)
            engine.add_request(
                str(index), {"prompt_token_ids": list(request.prompt)}, SamplingParams(**params)
            )
            if request.leaves_after == 0:
                prefilling.add(index)
        for output in engine.step():
            index = int(output.request_id)
            # vLLM returns the completions of a request one at a time.
            answers[index] |= {
                completion.index: _answer(output, completion) for completion in output.outputs
            }
            leaves_after = mix.requests[index].leaves_after
            if (
                leaves_after
                and not output.finished
                and len(output.outputs[0].token_ids) >= leaves_after
            ):
                engine.abort_request([output.request_id])
        # Aborted while their prompts are under way, if these take several steps.
        engine.abort_request([str(index) for index in prefilling])
        prefilling.clear()
        step += 1
        if step == mix.storm:
            engine.reset_prefix_cache(reset_running_requests=True)
    return answers


def _answer(output: Any, completion: Any) -> Answer:
    def plain(entry: dict[int, Any]) -> dict[int, float]:
        return {token: found.logprob for token, found in entry.items()}

    end = (completion.finish_reason, completion.stop_reason) if completion.finish_reason else None
    return Answer(
        list(completion.token_ids),
        [plain(entry) for entry in completion.logprobs or ()],
        [None if entry is None else plain(entry) for entry in output.prompt_logprobs or ()],
        end,
    )


def engine_arguments(name: str, on_gpu: bool) -> dict[str, Any]:
    """Of ``LLM``: "stock", "specontext" or "two tiers"."""
    arguments: dict[str, Any] = {
        "model": str(DEMO_MODEL),
        "dtype": "float32",
        "max_model_len": MAX_MODEL_LEN,
        "max_num_seqs": MAX_SEQS,
        "max_num_batched_tokens": STEP_TOKENS,
        "enforce_eager": not on_gpu,
        "gpu_memory_utilization": 0.08 if on_gpu else 0.3,
        "kv_cache_memory_bytes": 2 << 30 if on_gpu else None,
        "seed": 0,
        "block_size": 16,
        "num_gpu_blocks_override": PAGES,
        "disable_log_stats": False,
        # Admit a request as soon as its first chunk has pages, so that more are preempted.
        "scheduler_reserve_full_isl": False,
    }
    if name == "stock":
        # vLLM's own CPU attention takes blocks of 32 tokens only; the tokens in all are the same.
        return (
            arguments
            if on_gpu
            else arguments | {"block_size": 32, "num_gpu_blocks_override": -(-PAGES // 2)}
        )
    settings = SETTINGS | TIERS if name == "two tiers" else SETTINGS
    return arguments | {
        "attention_backend": "specontext",
        "additional_config": {"specontext": settings},
    }


def play_all(llm: Any, name: str, seed: str, rounds: int, on_gpu: bool) -> dict[str, list[Answers]]:
    """Every mix's answers by what gave them: "stock", "specontext" and "one tier" (the same engine
    under the small budget), or "two tiers".
    """
    bases = make_prompts(DEMO_MODEL, 24)
    passes = {
        "stock": (("stock", None),),
        "specontext": (("specontext", MAX_MODEL_LEN), ("one tier", SMALL_BUDGET)),
        "two tiers": (("two tiers", None),),
    }[name]
    found: dict[str, list[Answers]] = {}
    for title, budget in passes:
        if budget:
            llm.collective_rpc("specontext_set", kwargs={"budget": budget})
        llm.reset_prefix_cache()
        found[title] = [
            play(llm, Mix.draw(f"{seed}/{number}", bases, on_gpu), gaps=name == "stock")
            for number in range(rounds)
        ]
    return found


def preemptions(llm: Any) -> int:
    return sum(
        metric.value for metric in llm.get_metrics() if metric.name == "vllm:num_preemptions"
    )


def run_engine(name: str, on_gpu: bool, seed: str, rounds: int) -> Iterator[tuple[str, Any]]:
    """Yields ``("answers", (answers by title, preemptions))``; runs in a child."""
    from vllm import LLM

    llm = LLM(**engine_arguments(name, on_gpu))
    yield "answers", (play_all(llm, name, seed, rounds, on_gpu), preemptions(llm))
