"""An engine that falls asleep in the middle of a request, on a CPU.

vLLM does not free memory there: it stops the scheduler and forgets the prefix cache as ever, and
what a GPU would lose is overwritten.
"""

from __future__ import annotations

from typing import Any

import torch

from tests.engine.scenarios import ids, sampling

STEPS_BEFORE = 9


def lose_memory(worker: Any) -> None:
    """What a GPU's worker does to sleep and to wake up again, and what happens meanwhile."""
    runtime = worker.model_runner.runtime
    runtime.give_back_memory()
    head, tiers = runtime.retriever.head, runtime.tiers
    head.cache.keys.fill_(float("nan"))
    head.cache.fused.fill_(float("nan"))
    if tiers is None:
        layers = worker.vllm_config.compilation_config.static_forward_context
        for name in runtime.layers.kv_names:
            layers[name].kv_cache.normal_()
    else:
        tiers.arena.fill_(float("nan"))
    runtime.start_anew()
    if tiers is not None:
        tiers.pools.host.fill_(float("nan"))


@torch.inference_mode()
def sleep_over(llm: Any, prompts: list[list[int]]) -> dict[str, list]:
    """Tokens of a request that slept, and of others after another night."""
    engine, tokens = llm.llm_engine, []
    llm.reset_prefix_cache()
    params = sampling(max_tokens=24)
    engine.add_request("slept", {"prompt_token_ids": prompts[-2]}, params)
    for _ in range(STEPS_BEFORE):
        outputs = engine.step()
    assert 0 < len(outputs[0].outputs[0].token_ids) < 24
    llm.sleep(level=1, mode="keep")
    llm.collective_rpc(lose_memory)
    llm.wake_up()
    while engine.has_unfinished_requests():
        for output in engine.step():
            tokens = list(output.outputs[0].token_ids)
    llm.sleep(level=1)
    llm.collective_rpc(lose_memory)
    llm.wake_up()
    llm.collective_rpc("specontext_audit")
    after = llm.generate(
        [{"prompt_token_ids": prompts[i]} for i in (5, -1)], sampling(), use_tqdm=False
    )
    return {"slept": tokens, "after it": ids(after)}
