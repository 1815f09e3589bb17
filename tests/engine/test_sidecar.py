"""The head in a Ray actor gives the tokens of the head in the worker: float32, real weights, every
way a request can go, and a death.
"""

from __future__ import annotations

import os
import signal
import time

import pytest

from specontext_vllm.observability.catalog import PREFIX
from tests.conftest import CUDA
from tests.engine.conftest import DEMO_MODEL, engine
from tests.engine.test_exactness import ids, sampling, scenarios, until_sure
from tests.sidecar.test_remote import SIDECAR, actor_pid

# An engine that starts densely would keep other pages in its prefix cache than one that never was.
SETTINGS = {
    "retrieval_head": str(DEMO_MODEL / "retrieval_head"),
    "budget": 64,
    "sink_tokens": 16,
    "recent_tokens": 16,
    "cache_generated": True,
}
# Preemption needs the pages to run out, chunked prefill prompts over 256 tokens.
SHAPE = {
    "max_model_len": 704,
    "max_num_seqs": 3,
    "num_gpu_blocks_override": 111,
    "attention_backend": "specontext",
}
# With a sidecar the page table is as wide as the context. An inline engine that starts densely has
# the same one, in its captured graphs too, and may become dense again for as long as the sidecar is
# away.
INLINE = {"retriever": "dense"}
STEPS_BEFORE_DEATH = 9


def run(prompts, where):
    with engine(**SHAPE, additional_config={"specontext": {**SETTINGS, **where}}) as llm:
        llm.collective_rpc("specontext_set", kwargs={"retriever": "dlm"})
        # On a GPU vLLM has warmed up with requests of its own.
        llm.collective_rpc("specontext_stats", args=(True,))
        before = shown(llm)
        out = scenarios(llm, prompts)
        # Read first, right after the last answer.
        out["shown"] = {name: value - before[name] for name, value in shown(llm).items()}
        out["stats"] = llm.collective_rpc("specontext_stats", args=(True,))[0]
        out |= outage(llm, prompts, has_actor=where is SIDECAR)
        out["late stats"] = llm.collective_rpc("specontext_stats")[0]
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


def outage(llm, prompts, has_actor: bool) -> dict[str, list]:
    """Kill the actor in the middle of a request, let it come back, and ask on; inline, read densely
    for as long instead.
    """

    def generate(*chosen):
        return llm.generate([{"prompt_token_ids": p} for p in chosen], sampling(), use_tqdm=False)

    llm.reset_prefix_cache()
    generate(prompts[-1])
    core, tokens, step = llm.llm_engine, [], 0
    core.add_request("lived", {"prompt_token_ids": prompts[-2]}, sampling(max_tokens=60))
    while core.has_unfinished_requests():
        step += 1
        if step == STEPS_BEFORE_DEATH:
            if has_actor:
                os.kill(actor_pid(), signal.SIGKILL)
            else:
                llm.collective_rpc("specontext_set", kwargs={"retriever": "dense"})
        for output in core.step():
            tokens = until_sure(list(output.outputs[0].token_ids))
    if has_actor:
        deadline = time.monotonic() + 120
        while not llm.collective_rpc("specontext_stats")[0]["sidecar_up"]:
            assert time.monotonic() < deadline, "the sidecar did not come back"
            time.sleep(0.2)
    else:
        llm.collective_rpc("specontext_set", kwargs={"retriever": "dlm"})
    # Pages from before the death are hit, and new ones are made.
    after = generate(prompts[-1], prompts[5], prompts[-2])
    return {
        "lived through a death": tokens,
        "after it": ids(after),
        "hits after it": [o.num_cached_tokens for o in after],
    }


@pytest.fixture(scope="module")
def inline(prompts):
    return run(prompts, INLINE)


@pytest.fixture(scope="module")
def remote(prompts):
    pytest.importorskip("ray")
    return run(prompts, SIDECAR)


@pytest.mark.parametrize(
    "scenario",
    [
        "plain",
        "ragged",
        "prefix hit",
        "next turn",
        "next turn, cold",
        "neighbour aborted",
        "lived through a death",
        "after it",
        "hits after it",
    ],
)
def test_tokens_are_those_of_the_head_in_the_worker(inline, remote, scenario):
    assert remote[scenario] == inline[scenario]


def test_metrics_read_right_after_an_answer_have_all_of_its_steps(inline, remote):
    for run in (inline, remote):
        found, stats = run["shown"], run["stats"]
        counted = (
            found["decode_steps"],
            found["decode_rows"],
            found["head_pages_read"],
            found["head_pages_held"],
        )
        assert counted == (
            stats["steps"],
            stats["decode_rows"],
            stats["pages_read"],
            stats["pages_total"],
        )
        assert found["kept mass"] / found["choosing rows"] == pytest.approx(
            stats["kept_mass_mean"], rel=1e-5
        )


def test_the_scenarios_happened(inline, remote):
    assert inline["preempted"] > 0 and remote["preempted"] == inline["preempted"]
    assert remote["cached tokens"] == inline["cached tokens"] > 0
    ours, theirs = remote["stats"], inline["stats"]
    # Of all tokens, those behind the answers too; see until_sure.
    assert ours["kept_mass_mean"] == pytest.approx(
        theirs["kept_mass_mean"], rel=1e-2 if CUDA else 1e-4
    )
    assert {**ours, "kept_mass_mean": None}.items() >= {**theirs, "kept_mass_mean": None}.items()
    assert ours["pages_read"] < 0.5 * ours["pages_total"]
    assert ours["sidecar_dense_rows"] == ours["sidecar_restarts"] == 0
    late = remote["late stats"]
    # The request that lived through the death read densely to its end, and nobody else did.
    assert late["sidecar_restarts"] == 1 and late["sidecar_up"] == 1
    assert late["sidecar_dense_rows"] >= 40
    assert remote["hits after it"][0] > 0 and remote["hits after it"][2] > 0
