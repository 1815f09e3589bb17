"""The case `real` on a published model and its committed head: a budget that holds the context is
dense attention, a selection finds a needle in 1,000 tokens, and keeps a copy going.
"""

from __future__ import annotations

import gc
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from benchmarks.prefilled import EngineSpec
from benchmarks.real.engine import Generation, run_engine
from benchmarks.real.settings import DENSE, Variant, settings_of
from benchmarks.real.tasks import Sources, make_groups
from tests.engine.conftest import cheap_collections, import_vllm

ROOT = Path(__file__).parents[2]
HEAD = ROOT / "models" / "smollm2-head"
NOVEL = ROOT / "specontext_vllm" / "demo" / "smollm2" / "northanger_abbey.txt"

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def asked(smollm2):
    """(groups by task, scores by task and setting)."""
    from vllm.distributed import cleanup_dist_env_and_memory

    sources = Sources(smollm2, (NOVEL,), forced_tokens=12)
    groups = {
        name: make_groups(sources, [name], [context], 1, seed=0)[0]
        for name, context in (("text", 384), ("copy", 512), ("niah_single_1", 1024))
    }
    needle = groups["niah_single_1"]
    # Long enough to tell the number.
    groups["niah_single_1"] = replace(needle, prompts=[replace(needle.prompts[0], reply_tokens=12)])
    dlm, recent = Variant("dlm", "dlm", "smollm2"), Variant("recent", "recent")
    settings = {
        "text": settings_of([dlm], [384]),
        "copy": settings_of([dlm, recent], [128]),
        "niah_single_1": settings_of([dlm, recent], [256]),
    }
    spec = EngineSpec(
        model=str(smollm2),
        head=str(HEAD),
        head_keys="auto",
        retriever=DENSE,
        dtype="float32",
        on_gpu=False,
        eager=True,
        max_model_len=1040,
    )
    work = [(groups[name], settings[name]) for name in groups]
    scores = {}
    import_vllm()
    with cheap_collections():
        try:
            for kind, value in run_engine(spec, work, sources, Generation()):
                assert kind != "failed", value
                if kind == "cell":
                    index, setting, result = value
                    (scores[work[index][0].task, setting.name],) = result["scores"]
        finally:
            gc.collect()
            cleanup_dist_env_and_memory()
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
    assert scores["text", DENSE] == pytest.approx(found, abs=1e-3)


def test_a_copy_goes_on_where_its_pages_are_read(asked):
    _, scores = asked
    dense, dlm, recent = (scores["copy", name] for name in (DENSE, "dlm 128", "recent 128"))
    assert dlm > dense - 0.3 and recent < dlm - 0.5


def test_a_needle_is_found_with_a_quarter_of_the_context(asked):
    _, scores = asked
    dense, dlm, recent = (
        scores["niah_single_1", name] for name in (DENSE, "dlm 256", "recent 256")
    )
    assert dense == dlm == 1 and recent == 0
