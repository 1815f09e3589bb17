"""The head in a Ray actor gives the tokens of the head in the worker: float32, real weights, every way a request can go, and a death."""

from __future__ import annotations

import os
import signal
import time

import pytest

from tests.engine.conftest import DEMO_MODEL, engine
from tests.engine.test_exactness import ids, sampling, scenarios
from tests.sidecar.test_remote import actor_pid

SETTINGS = {"retrieval_head": str(DEMO_MODEL / "retrieval_head"), "budget": 64, "sink_tokens": 16, "recent_tokens": 16}
# Preemption needs the pages to run out, chunked prefill prompts over 256 tokens.
SHAPE = {"max_model_len": 704, "max_num_seqs": 3, "num_gpu_blocks_override": 111, "attention_backend": "specontext"}
STEPS_BEFORE_DEATH = 9


def run(prompts, sidecar):
    with engine(**SHAPE, additional_config={"specontext": {**SETTINGS, "sidecar": sidecar}}) as llm:
        out = scenarios(llm, prompts)
        out["stats"] = llm.collective_rpc("specontext_stats", args=(True,))[0]
        out |= outage(llm, prompts, sidecar)
        out["late stats"] = llm.collective_rpc("specontext_stats")[0]
        return out


def outage(llm, prompts, sidecar) -> dict[str, list]:
    """Kill the actor in the middle of a request, let it come back, and ask on; inline, read densely for as long instead."""

    def generate(*chosen):
        return llm.generate([{"prompt_token_ids": p} for p in chosen], sampling(), use_tqdm=False)

    llm.reset_prefix_cache()
    generate(prompts[-2])
    core, tokens, step = llm.llm_engine, [], 0
    core.add_request("lived", {"prompt_token_ids": prompts[-1]}, sampling(max_tokens=60))
    while core.has_unfinished_requests():
        step += 1
        if step == STEPS_BEFORE_DEATH:
            if sidecar == "ray":
                os.kill(actor_pid(), signal.SIGKILL)
            else:
                llm.collective_rpc("specontext_set", kwargs={"retriever": "dense"})
        for output in core.step():
            tokens = list(output.outputs[0].token_ids)
    if sidecar == "ray":
        deadline = time.monotonic() + 120
        while not llm.collective_rpc("specontext_stats")[0]["sidecar_up"]:
            assert time.monotonic() < deadline, "the sidecar did not come back"
            time.sleep(0.2)
    else:
        llm.collective_rpc("specontext_set", kwargs={"retriever": "dlm"})
    # Pages from before the death are hit, and new ones are made.
    after = generate(prompts[-2], prompts[5], prompts[-1])
    return {"lived through a death": tokens, "after it": ids(after), "hits after it": [o.num_cached_tokens for o in after]}


@pytest.fixture(scope="module")
def inline(prompts):
    return run(prompts, "inline")


@pytest.fixture(scope="module")
def remote(prompts):
    pytest.importorskip("ray")
    return run(prompts, "ray")


@pytest.mark.parametrize(
    "scenario",
    [
        "plain", "ragged", "prefix hit", "next turn", "next turn, cold", "neighbour aborted", "lived through a death", "after it",
        "hits after it",
    ],
)  # fmt: skip
def test_tokens_are_those_of_the_head_in_the_worker(inline, remote, scenario):
    assert remote[scenario] == inline[scenario]


def test_the_scenarios_happened(inline, remote):
    assert inline["preempted"] > 0 and remote["preempted"] == inline["preempted"]
    assert remote["cached tokens"] == inline["cached tokens"] > 0
    ours, theirs = remote["stats"], inline["stats"]
    assert ours["kept_mass_mean"] == pytest.approx(theirs["kept_mass_mean"], rel=1e-4)
    assert {**ours, "kept_mass_mean": None}.items() >= {**theirs, "kept_mass_mean": None}.items()
    assert ours["pages_read"] < 0.5 * ours["pages_total"]
    assert ours["sidecar_dense_rows"] == ours["sidecar_restarts"] == 0
    late = remote["late stats"]
    # The request that lived through the death read densely to its end, and nobody else did.
    assert late["sidecar_restarts"] == 1 and late["sidecar_up"] == 1
    assert late["sidecar_dense_rows"] >= 40
    assert remote["hits after it"][0] > 0 and remote["hits after it"][2] > 0
