"""The head in a Ray actor gives the tokens of the head in the worker: float32, real weights, every
way a request can go, and a death.
"""

from __future__ import annotations

import os
import signal
import time

import pytest

from tests.conftest import CUDA
from tests.engine.conftest import engine
from tests.engine.shared_runs import SETTINGS, SHAPE, counted_scenarios, outage
from tests.sidecar.test_remote import SIDECAR, actor_pid

# The engine that it is compared with has other pages in its prefix cache otherwise.
BESIDE = {**SETTINGS, "cache_generated": True}


def run(prompts):
    with engine(**SHAPE, additional_config={"specontext": {**BESIDE, **SIDECAR}}) as llm:
        out = counted_scenarios(llm, prompts)

        def kill() -> None:
            os.kill(actor_pid(), signal.SIGKILL)

        def wait() -> None:
            deadline = time.monotonic() + 120
            while not llm.collective_rpc("specontext_stats")[0]["sidecar_up"]:
                assert time.monotonic() < deadline, "the sidecar did not come back"
                time.sleep(0.2)

        out |= outage(llm, prompts, kill, wait)
        out["late stats"] = llm.collective_rpc("specontext_stats")[0]
        return out


@pytest.fixture(scope="module")
def inline(both_budgets):
    """The head in the worker. The page table is as wide as the context, in captured graphs too, as
    with a sidecar; the engine reads densely for as long as the sidecar is away.
    """
    return both_budgets["small budget"]


@pytest.fixture(scope="module")
def remote(prompts):
    pytest.importorskip("ray")
    return run(prompts)


@pytest.mark.parametrize(
    "scenario",
    [
        "plain",
        "ragged",
        "prefix hit",
        "next turn",
        "next turn, cold",
        "neighbour aborted",
        "lived through it",
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
