"""The case `real` on a published model and its committed head: a budget that holds the context is
dense attention, a selection finds a needle in 2,000 tokens, and keeps a copy going.
"""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from benchmarks.children import engine_env, run_child
from benchmarks.prefilled import EngineSpec
from benchmarks.real.engine import Generation, run_engine
from benchmarks.real.settings import DENSE, Variant, settings_of
from benchmarks.real.tasks import Sources, make_groups

ROOT = Path(__file__).parents[2]
HEAD = ROOT / "models" / "smollm2-head"
PROMPTS = 2

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def asked(smollm2, tmp_path_factory):
    """(groups by task, scores by task and setting)."""
    sources = Sources(smollm2, (ROOT / "docs",), forced_tokens=16)
    groups = {
        name: make_groups(sources, [name], [context], PROMPTS, seed=0)[0]
        for name, context in (("text", 384), ("copy", 512), ("niah_single_1", 2048))
    }
    needles = groups["niah_single_1"]
    # Long enough to tell the number.
    short = replace(needles.prompts[0], reply_tokens=12)
    groups["niah_single_1"] = replace(needles, prompts=[short])
    dlm, recent = Variant("dlm", "dlm", "smollm2"), Variant("recent", "recent")
    settings = {
        "text": settings_of([dlm], [384]),
        "copy": settings_of([dlm, recent], [128]),
        "niah_single_1": settings_of([dlm, recent], [512]),
    }
    spec = EngineSpec(
        model=str(smollm2),
        head=str(HEAD),
        head_keys="auto",
        retriever=DENSE,
        dtype="float32",
        on_gpu=False,
        eager=True,
        max_model_len=2064,
    )
    work = [(groups[name], settings[name]) for name in groups]
    scores = {}
    events = run_child(
        run_engine,
        spec,
        work,
        sources,
        Generation(),
        log=tmp_path_factory.mktemp("real") / "engine.log",
        seconds=300,
        env=engine_env(on_gpu=False, cpu_kv_gib=1),
    )
    for kind, value in events:
        assert kind != "failed", value
        if kind == "cell":
            index, setting, result = value
            scores[work[index][0].task, setting.name] = result["scores"]
    return groups, scores


def test_a_budget_over_the_context_is_dense_and_dense_is_transformers(asked, smollm2):
    from transformers import AutoModelForCausalLM

    groups, scores = asked
    assert scores["text", "dlm 384"] == pytest.approx(scores["text", DENSE], abs=1e-3)
    model = AutoModelForCausalLM.from_pretrained(str(smollm2), dtype=torch.float32)
    prompt = groups["text"].prompts[0]
    ids = [*prompt.tokens, *prompt.forced[0]]
    with torch.inference_mode():
        logits = model(torch.tensor([ids])).logits[0, len(prompt.tokens) : -1]
    forced = torch.tensor(prompt.forced[0][1:])
    found = logits.log_softmax(-1).gather(1, forced[:, None]).mean().item()
    assert scores["text", DENSE][0] == pytest.approx(found, abs=1e-3)


def test_a_copy_goes_on_where_its_pages_are_read(asked):
    _, scores = asked
    dense, dlm, recent = (
        sum(scores["copy", name]) / PROMPTS for name in (DENSE, "dlm 128", "recent 128")
    )
    assert dlm > dense - 0.3 and recent < dlm - 0.5


def test_a_needle_is_found_with_a_quarter_of_the_context(asked):
    _, scores = asked
    dense, dlm, recent = (
        scores["niah_single_1", name] for name in (DENSE, "dlm 512", "recent 512")
    )
    assert dense == dlm == [1.0] and recent == [0.0]
