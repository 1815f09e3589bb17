"""What the checks of the soak benchmark find when something is wrong. Its load on real servers is
in test_faults.py.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from types import SimpleNamespace

import pytest
from typer import BadParameter

from benchmarks.near_tie import NEAR_TIE_CPU
from benchmarks.prompts import make_prompts
from benchmarks.report import Report
from benchmarks.shapes import Shape
from benchmarks.soak.client import Load, apply_load
from benchmarks.soak.command import TABLES, chosen_engines, run_notes, tabulate
from benchmarks.soak.outcome import Outcome, complaints
from benchmarks.soak.references import write_random_model
from benchmarks.soak.server import ENGINES


def test_no_connection_serves_two_requests():
    """Else one that the server has closed in the meantime fails a request that it never saw."""
    from aiohttp import web
    from aiohttp.test_utils import TestServer

    seen: list[int] = []

    async def answer(request: web.Request) -> web.Response:
        seen.append(request.transport.get_extra_info("peername")[1])
        return web.json_response({"choices": [{"token_ids": [7]}]})

    async def run() -> Outcome:
        app = web.Application()
        app.router.add_post("/v1/completions", answer)
        async with TestServer(app) as server:
            target = SimpleNamespace(
                url=str(server.make_url("/")).rstrip("/"), resident_bytes=lambda: 1
            )
            return await apply_load(target, Load([[1]], [[7]], [[1.0]], 12, None, 2))

    outcome = asyncio.run(run())
    assert not outcome.failed and len(set(seen)) == len(seen) == 12


def test_complaints_name_what_is_wrong():
    outcome = Outcome(
        Counter(whole=100, wrong=1, failed=1), ["prompt 3"], ["prompt 4: TimeoutError"]
    )
    outcome.memory = [(float(i), i, 1000 + i * 10) for i in range(100)]
    left = {"running": 0, "waiting": 0, "kv_cache_usage": 0.25, "ledger": {"requests": 2}}
    assert set(complaints(outcome, left, True)) == {
        "wrong tokens",
        "failed requests",
        "memory",
        "requests left",
        "lanes left",
    }
    calm = Outcome(Counter(whole=100), memory=[(float(i), i, 1000) for i in range(100)])
    assert (
        complaints(calm, {"running": 0, "waiting": 0, "kv_cache_usage": 0.0, "ledger": {}}, True)
        == {}
    )


def test_an_earlier_run_is_judged_as_a_new_one():
    left = {
        "running": 0,
        "waiting": 0,
        "kv_cache_usage": 0.0,
        "preemptions": 2,
        "prefix_hit_tokens": 64,
        "ledger": {},
        "stats": {},
    }

    def engine(date: str, growth: int, **more) -> dict:
        memory = [(float(i), i, 1000 + i * growth) for i in range(101)]
        return {
            "date": date,
            "command": "c",
            "commit": "x",
            "counts": {"whole": 100},
            "wrong": [],
            "failed": [],
            "memory": memory,
            "seconds": 50,
            "left": left,
            **more,
        }

    result = Report(
        "soak",
        "",
        TABLES,
        details={
            "stock": engine("today", 20, partings=[0.01, 0.02]),
            "one-tier": engine("yesterday", 10),
        },
    )
    tabulate(result)
    rows = [(row["name"], row["requests"], row["per_second"], row["widest"]) for row in result.rows]
    assert rows == [
        (ENGINES["one-tier"].title, 100, 2.0, None),
        (ENGINES["stock"].title, 100, 2.0, 0.02),
    ]
    assert list(result.failures) == ["one tier, budget over the context: memory"]
    (note,) = run_notes(result.details)
    assert (
        note.index("today")
        < note.index("stock vLLM")
        < note.index("yesterday")
        < note.index("one tier")
    )
    assert run_notes({"stock": engine("today", 0)}) == []


def test_an_unknown_engine_is_named():
    with pytest.raises(
        BadParameter, match="--engines: found 'three-tiers'; use some of one-tier, two-tiers, stock"
    ):
        chosen_engines("one-tier,three-tiers")


def test_an_answer_may_part_from_dense_attention_at_a_near_tie_only():
    load = Load([[1]], [[10, 20, 30, 40]], [[5.0, 1e-6, 5.0, 5.0]], 1, None, 1)
    assert load.judge(0, [10, 20, 30], 3, whole=True) == (None, None)
    assert load.judge(0, [10, 20], 4, whole=False) == (None, None)
    assert load.judge(0, [10, 21, 99], 3, whole=True) == ("near tie", 1e-6)
    assert load.judge(0, [10, 20, 31], 3, whole=True) == ("wrong", 5.0)
    assert load.judge(0, [10, 20], 3, whole=True) == ("wrong", None)
    assert load.judge(0, [11], 4, whole=False) == ("wrong", 5.0)


def test_a_shape_gets_weights_that_attend(tmp_path):
    """The answer hangs on the whole prompt, which vLLM's dummy weights do not show."""
    import torch
    from transformers import AutoModelForCausalLM

    folder = write_random_model(Shape.named("tiny"), tmp_path)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    ids = torch.randint(0, 1000, (1, 200), generator=torch.Generator().manual_seed(1))
    changed = ids.clone()
    changed[0, 0] += 1
    with torch.no_grad():
        before, after = (model(x).logits[0, -1] for x in (ids, changed))
    assert (before - after).abs().max() > NEAR_TIE_CPU
    prompts = make_prompts(folder, 5)
    assert (
        200 <= len(prompts[0]) <= 900
        and len(prompts[4]) <= 100
        and all(max(prompt) < 1024 for prompt in prompts)
    )
