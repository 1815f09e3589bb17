"""Engines whose answers several files' tests compare: each goes through all scenarios once."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from specontext_vllm.observability.catalog import PREFIX
from tests.engine.asked import asked
from tests.engine.conftest import DEMO_MODEL, STOCK, engine
from tests.engine.own_budgets import counted, mixed, poisoned, scattered
from tests.engine.scenarios import ids, sampling, scenarios, until_sure

PAGES = 111
SHAPE = {
    # Preemption needs the pages to run out, chunked prefill prompts over 256 tokens.
    "max_model_len": 704,
    "max_num_seqs": 3,
    "num_gpu_blocks_override": PAGES,
    "attention_backend": "specontext",
}
SMALL, WHOLE = 64, 2048
"""Budgets: one that leaves out most pages of the longer prompts, and one over every context."""
SETTINGS = {
    "retrieval_head": str(DEMO_MODEL / "retrieval_head"),
    "budget": SMALL,
    "sink_tokens": 16,
    "recent_tokens": 16,
    "stickiness": 0,
}
KINDS = {
    "64": {"specontext_budget": 64},
    "128": {"specontext_budget": 128, "specontext_mode": "sparse"},
    "dense": {"specontext_mode": "dense"},
}
"""Settings of single requests."""
CHOSEN = (5, 6, 7)
"""Prompts that they are asked with, beyond every budget; three are in no one's way."""
STEPS_BEFORE_OUTAGE = 9


def run_stock(prompts) -> dict[str, object]:
    with engine(**STOCK) as llm:
        out = scenarios(llm, prompts) | {"asked": asked(llm, prompts)}
        return out | {"scattered": mixed(llm, scattered(), {"none": None})["none"]}


def run_both_budgets(prompts) -> dict[str, object]:
    """An engine that starts with the whole budget and puts generated pages into its prefix cache,
    with the small one from then on (``small budget``), and where it reads densely for a while.
    """
    settings = {**SETTINGS, "budget": WHOLE, "max_budget": "full", "cache_generated": True}
    with engine(**SHAPE, additional_config={"specontext": settings}) as llm:
        out = counted_scenarios(llm, prompts)
        llm.reset_prefix_cache()
        out["without kernels"] = without_kernels(llm, prompts)
        llm.collective_rpc("specontext_set", kwargs={"budget": SMALL})
        small = counted_scenarios(llm, prompts)
        small["own budgets"] = own_budgets(llm, scattered())

        def read(retriever: str) -> None:
            llm.collective_rpc("specontext_set", kwargs={"retriever": retriever})

        small["without kernels"] = without_kernels(llm, prompts)
        small |= outage(llm, prompts, lambda: read("dense"), lambda: read("dlm"))
        return {**out, "small budget": small}


def own_budgets(llm, prompts) -> dict[str, object]:
    """Requests with settings of their own beside each other."""
    before = counted(llm)
    out = mixed(llm, prompts, {"none": None, **KINDS})
    out["metrics"] = {name: value - before[name] for name, value in counted(llm).items()}
    if not torch.cuda.is_available():
        own = [None, KINDS["128"], KINDS["dense"]]
        out["poisoned"] = poisoned(llm, prompts, own)
        out["unpoisoned"] = [out["none"][0], out["128"][1], out["dense"][2]]
    return out


def without_kernels(llm, prompts) -> list[list[int]]:
    """The scenario ``plain``, a CPU running the definitions in torch instead of its C++ kernels."""
    llm.reset_prefix_cache()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("specontext_vllm.cpu_kernels.available", lambda: False)
        answers = [
            ids(llm.generate([{"prompt_token_ids": prompt}], sampling(), use_tqdm=False))[0]
            for prompt in prompts
        ]
    llm.reset_prefix_cache()
    return answers


def counted_scenarios(llm, prompts) -> dict[str, object]:
    """``scenarios``, with what the worker (``stats``) and the metrics (``shown``) count of them."""
    # On a GPU vLLM has warmed up with requests of its own.
    llm.collective_rpc("specontext_stats", args=(True,))
    before = shown(llm)
    out = scenarios(llm, prompts)
    # Read first, right after the last answer.
    out["shown"] = {name: value - before[name] for name, value in shown(llm).items()}
    out["stats"] = llm.collective_rpc("specontext_stats", args=(True,))[0]
    return out


def shown(llm) -> dict[str, float]:
    """What ``LLM.get_metrics`` says of the decode steps."""
    metrics = {
        metric.name.removeprefix(PREFIX): metric
        for metric in llm.get_metrics()
        if metric.name.startswith(PREFIX)
    }
    mass = metrics["kept_mass_ratio"]
    counters = {
        name: metrics[name].value
        for name in ("decode_steps", "decode_rows", "head_pages_read", "head_pages_held")
    }
    return {**counters, "choosing rows": mass.count, "kept mass": mass.sum}


def outage(llm, prompts, begin: Callable[[], None], end: Callable[[], None]) -> dict[str, list]:
    """``begin`` in the middle of a request, ``end`` after it, and ask on."""

    def generate(*chosen):
        return llm.generate([{"prompt_token_ids": p} for p in chosen], sampling(), use_tqdm=False)

    llm.reset_prefix_cache()
    generate(prompts[-1])
    core, tokens, step = llm.llm_engine, [], 0
    core.add_request("lived", {"prompt_token_ids": prompts[-2]}, sampling(max_tokens=60))
    while core.has_unfinished_requests():
        step += 1
        if step == STEPS_BEFORE_OUTAGE:
            begin()
        for output in core.step():
            tokens = until_sure(list(output.outputs[0].token_ids))
    end()
    # Pages from before it are hit, and new ones are made.
    after = generate(prompts[-1], prompts[5], prompts[-2])
    return {
        "lived through it": tokens,
        "after it": ids(after),
        "hits after it": [o.num_cached_tokens for o in after],
    }
