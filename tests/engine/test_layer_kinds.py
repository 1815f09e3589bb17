"""Models whose layers differ: those of full attention are served by us, the others by vLLM."""

from __future__ import annotations

from collections import Counter
from functools import partial
from itertools import cycle
from pathlib import Path
from typing import Any

import pytest
import torch

from specontext_vllm.config import PAGE_SIZE, ConfigError, pages_for
from specontext_vllm.engine import refusals
from specontext_vllm.engine.draft_length import MAX_DRAFTS
from specontext_vllm.model_config import num_full_layers
from tests.engine import scripted
from tests.engine.families import (
    CHUNKED,
    FULL,
    HYBRID,
    PLAIN,
    SLIDING,
    WINDOW,
    WINDOWED,
    mistral,
    serving,
    write,
)
from tests.engine.planned import assert_planned
from tests.engine.poison import poison_unread
from tests.engine.scenarios import preemptions
from tests.engine.scripted import Script, scripted_drafts

BUDGET, TOKENS = 64, 20
"""Tokens: four pages, one of sinks and two of recents; an answer goes on in another page."""
SETTINGS = {"budget": 1024, "sink_tokens": 16, "recent_tokens": 16}
NEAR_TIE_16_BITS = 0.05
"""Of log-probabilities: logits of 4 to 8 are 0.03 apart in bfloat16, or equal."""
KV_GIB = 0.02
"""Memory for what requests keep, in engines whose number of blocks is compared with a plan's."""
DRAFTED = ("gpt_oss", "olmo3")
"""Families that are served with drafts, too: windows and learned sinks; full layers in three of
vLLM's groups.
"""
generator = torch.Generator().manual_seed(3)
PROMPTS = [torch.randint(5, 97, (n,), generator=generator).tolist() for n in (1, 130, 400)]
pytestmark = pytest.mark.skipif(
    torch.cuda.is_available(),
    reason="float32 products on a GPU differ from transformers' in their last digits",
)


def scenarios(asked: Any) -> dict[str, Any]:
    """Prompts of several chunks together, again with prefix hits, and the answers' next turn."""
    first = asked.answer(PROMPTS, TOKENS)
    out = {"first": first, "again": asked.answer(PROMPTS[::-1], TOKENS)}
    out["hits"] = asked.cached_tokens
    turns = [prompt + reply + PROMPTS[1][:40] for prompt, reply in zip(PROMPTS, first)]
    out["next turn"] = asked.answer(turns, TOKENS)
    return out


def up_to_near_ties(
    found: list[list[int]], expected: list[list[int]], gaps: list[list[float]]
) -> list[list[int]]:
    """``found``, with what is expected from a token on at which that was a near-tie in 16 bits:
    another order of the same sums may give either.

    Args:
        gaps: of the expected tokens, the distances of the two likeliest's log-probabilities.
    """
    out = []
    for mine, theirs, distances in zip(found, expected, gaps, strict=True):
        parted = next((i for i, pair in enumerate(zip(mine, theirs)) if pair[0] != pair[1]), None)
        is_tie = parted is not None and distances[parted] < NEAR_TIE_16_BITS
        out.append(theirs if is_tie else mine)
    return out


def allowed(
    kind: str, prompt: int, total: int, window: int, firsts: dict[int, int]
) -> torch.Tensor:
    """``[total, total]`` bool, which tokens each one reads: prompts densely, generated tokens the
    pages of ``recent`` under the small budget; within the window where the layers have one. Drafts
    read what their row's first token does, which ``firsts`` has by position.
    """
    read = torch.ones(total, total, dtype=torch.bool).tril()
    if kind == SLIDING:
        return read & ~torch.ones_like(read).tril(-window)
    for position in range(prompt, total):
        pages = pages_for(firsts.get(position, position) + 1)
        read[
            position, PAGE_SIZE : max(PAGE_SIZE, (pages - BUDGET // PAGE_SIZE + 1) * PAGE_SIZE)
        ] = False
    return read


def expected_by_transformers(
    model: Any,
    prompt: list[int],
    reply: list[int],
    window: int,
    firsts: dict[int, int] | None = None,
) -> list[int]:
    """The tokens that transformers' model gives where every token reads what it may."""
    # vLLM's own backend for transformers' models wraps their classes.
    model.model.do_not_compile = True
    ids = torch.tensor([prompt + reply[:-1]])
    total = ids.shape[1]
    masks = {
        kind: torch.zeros(total, total).masked_fill(
            ~allowed(kind, len(prompt), total, window, firsts or {}), torch.finfo(torch.float32).min
        )[None, None]
        for kind in (FULL, SLIDING)
    }
    with torch.no_grad():
        logits = model(input_ids=ids, attention_mask=masks, use_cache=False).logits
    return logits[0, len(prompt) - 1 :].argmax(-1).tolist()


@pytest.fixture(scope="module", params=WINDOWED)
def served(request, tmp_path_factory) -> dict[str, Any]:
    """A family's model and what is answered: by stock vLLM, by it without a window, and by us."""
    folder: Path = tmp_path_factory.mktemp(request.param)
    out: dict[str, Any] = {"family": request.param}
    out["model"] = write(folder, WINDOWED[request.param]())
    with serving(folder) as stock:
        out["stock"] = scenarios(stock)
    with serving(folder, hf_overrides={"sliding_window": 2048}) as wide:
        out["without windows"] = wide.answer(PROMPTS, TOKENS)
    with serving(folder, settings={**SETTINGS, "retriever": "quest"}) as ours:
        out["ours"] = scenarios(ours)
        out["layers"] = [int(name.split(".")[2]) for name in ours.runner.runtime.layers.names]
        out["groups"] = len(ours.runner.kv_cache_config.kv_cache_groups)
        ours.set(budget=BUDGET)
        out["quest"], out["stats"] = ours.answer(PROMPTS, TOKENS), ours.stats
        ours.set(retriever="recent")
        out["recent"] = ours.answer(PROMPTS, TOKENS)
        ours.llm.reset_prefix_cache()
        poison_unread(ours.runner, out)
        out["poisoned"] = ours.answer(PROMPTS, TOKENS)
        out["forgetful"] = forget_caps_and_sinks(ours)
    if request.param in DRAFTED:
        out["script"] = with_drafts(folder, out)
        lossless(folder, out)
    return out


def with_drafts(folder: Path, out: dict[str, Any]) -> Script:
    """What is answered when drafts are verified: at the whole budget and at the small one."""
    settings = {**SETTINGS, "retriever": "recent"}
    with (
        scripted_drafts() as script,
        serving(folder, settings=settings, speculative_config=scripted.CONFIG) as ours,
    ):
        script.watch(ours.runner)
        script.follow(PROMPTS, out["stock"]["first"])
        out["drafted"] = scenarios(ours)
        ours.set(budget=BUDGET)
        script.follow(PROMPTS, out["recent"])
        script.firsts.clear()
        out["drafted recent"] = ours.answer(PROMPTS, TOKENS)
    return script


def lossless(folder: Path, out: dict[str, Any]) -> None:
    """What is answered in lossless mode, and the share of drafts that was accepted, at the whole
    budget and at the small one.
    """
    settings = {**SETTINGS, "retriever": "recent", "mode": "lossless"}
    with serving(folder, settings=settings) as ours:
        lengths = cycle((3, 1, MAX_DRAFTS, 0, 2))
        scheduler = ours.llm.llm_engine.engine_core.engine_core.scheduler
        scheduler.draft_length.choose = lambda contexts: next(lengths)
        counted = Counter[str]()
        for name, budget in (("lossless", SETTINGS["budget"]), ("lossless recent", BUDGET)):
            ours.set(budget=budget)
            ours.llm.reset_prefix_cache()
            before, answered = counted, scenarios(ours)
            counted = Counter(
                {
                    metric.name: metric.value
                    for metric in ours.llm.get_metrics()
                    if "spec_decode_num" in metric.name and hasattr(metric, "value")
                }
            )
            made = counted - before
            accepted = made["vllm:spec_decode_num_accepted_tokens"]
            out[name] = answered, accepted / made["vllm:spec_decode_num_draft_tokens"]


def forget_caps_and_sinks(ours: Any) -> list[list[int]] | None:
    """The answers without them; None where the model has none."""
    context = ours.runner.vllm_config.compilation_config.static_forward_context
    impls = [context[name].impl for name in ours.runner.runtime.layers.names]
    if not impls[0].provider.soft_cap and impls[0].sinks is None:
        return None
    for impl in impls:
        impl.sinks, impl.provider.soft_cap = None, 0.0
    ours.set(retriever="dense")
    return ours.answer(PROMPTS, TOKENS)


def test_layers_with_windows_are_left_to_vllm_and_tokens_are_stock_s(served):
    types = served["model"].config.layer_types
    assert served["layers"] == [i for i, kind in enumerate(types) if kind == FULL]
    # vLLM's groups are equally large; layers that read the KV of others are in none.
    own = len(types) - getattr(served["model"].config, "num_kv_shared_layers", 0)
    few, many = sorted(types[:own].count(kind) for kind in (FULL, SLIDING))
    assert served["groups"] == (2 if many < 1.5 * few else 1 - -many // few)
    assert served["ours"] == served["stock"] and max(served["ours"]["hits"]) > 300
    # The windows count, so that a layer that ignored its own would be seen.
    assert served["without windows"][-1] != served["stock"]["first"][-1]


def test_caps_on_logits_and_sinks_count(served):
    forgetful = served["forgetful"]
    assert (forgetful is not None) is (served["family"] in ("gemma2", "gpt_oss"))
    assert forgetful is None or forgetful[-1] != served["stock"]["first"][-1]


def test_a_small_budget_is_for_the_layers_of_full_attention_alone(served):
    whole = served["stock"]["first"]
    assert served["quest"][0] == whole[0] and served["quest"][-1] != whole[-1]
    assert 0 < served["stats"]["pages_read"] < 0.4 * served["stats"]["pages_total"]
    assert served["recent"][0] == whole[0] and served["recent"][-1] != whole[-1]
    if served["family"] == "llama":
        pytest.skip("transformers gives this family no windows")
    # Cohere's windows hold one token more (vllm/model_executor/models/commandr.py).
    window = WINDOW + (served["family"] == "cohere2")
    expected = partial(expected_by_transformers, served["model"], window=window)
    for prompt, reply in zip(PROMPTS, served["recent"]):
        assert expected(prompt, reply) == reply


def test_pages_that_were_not_chosen_are_not_read(served):
    assert served["poisoned pages"] > 0 and served["poisoned"] == served["recent"]


@pytest.mark.parametrize("served", DRAFTED, indirect=True)
def test_drafts_are_verified_beside_layers_with_windows(served):
    """Rejected at every place; below the budget each reads what its row's first token chose."""
    assert served["drafted"] == served["stock"]
    script = served["script"]
    assert all(script.kept[count] > 0 for count in range(1, 2 + scripted.DRAFTS))
    names = sorted(script.firsts, key=lambda name: int(name.split("-")[0]))
    crossed = 0
    for prompt, reply, name in zip(PROMPTS, served["drafted recent"], names, strict=True):
        firsts = script.firsts[name]
        crossed += sum(p // PAGE_SIZE != first // PAGE_SIZE for p, first in firsts.items())
        expected = expected_by_transformers(served["model"], prompt, reply, WINDOW, firsts)
        assert expected == reply
    assert crossed > 0


@pytest.mark.parametrize("family", [*HYBRID, *PLAIN, *CHUNKED])
def test_a_family_s_tokens_are_stock_s_where_the_budget_covers_the_context(family, tmp_path):
    """State-space and linear layers beside ours, on a CPU as far as vLLM runs them there: linear
    attention in bfloat16 only, and Mamba 2 without a prefix cache. What families do within a layer,
    and layers with chunks. States, their blocks and how many fit are those of `specontext plan`.
    """
    arguments: dict[str, Any] = {
        "enable_prefix_caching": family == "qwen3_next" or family not in HYBRID
    }
    if family == "qwen3_next":
        arguments["dtype"] = "bfloat16"
    model = write(tmp_path, (HYBRID | PLAIN | CHUNKED)[family]())
    with serving(tmp_path, **arguments) as stock:
        expected, gaps = scenarios(stock), stock.gaps
    settings = {**SETTINGS, "retriever": "quest"}
    if family in HYBRID:
        settings["gpu_kv_gib"] = KV_GIB
        arguments["num_gpu_blocks_override"] = None
    with serving(tmp_path, settings=settings, **arguments) as ours:
        if family in HYBRID:
            assert_planned(tmp_path, ours, int(KV_GIB * 2**30))
        found = scenarios(ours)
        if "dtype" in arguments:
            found["next turn"] = up_to_near_ties(found["next turn"], expected["next turn"], gaps)
        assert found == expected
        is_shared = len(ours.runner.kv_cache_config.kv_cache_groups) > 1
        assert is_shared is (family not in PLAIN)
        assert len(ours.runner.runtime.layers.names) == num_full_layers(model.config)
        ours.set(budget=BUDGET)
        sparse, stats = ours.answer(PROMPTS, TOKENS), ours.stats
    assert sparse[0] == expected["first"][0] and sparse[-1] != expected["first"][-1]
    assert 0 < stats["pages_read"] < 0.4 * stats["pages_total"]


@pytest.fixture(scope="module")
def llama_folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("llama")
    write(folder, WINDOWED["llama"]())
    return folder


def test_preempted_requests_of_layers_of_two_kinds_answer_as_stock(llama_folder):
    crowd = [PROMPTS[-1][i : i + 40] for i in (0, 100, 200, 300)]
    shape = {"num_gpu_blocks_override": 32, "max_model_len": 256}
    out = []
    for settings in (None, {**SETTINGS, "retriever": "recent"}):
        with serving(llama_folder, settings=settings, **shape) as asked:
            out.append(asked.answer(crowd, 150))
            assert preemptions(asked.llm) > 0
    assert out[0] == out[1]


def test_a_model_of_windows_alone_is_never_attended_fully(tmp_path, monkeypatch):
    """By its configuration; and where that does not tell, by its layers."""
    config = mistral(SLIDING, SLIDING)
    write(tmp_path, config)
    with pytest.raises(ValueError, match="no layer that attends to its whole context"):
        with serving(tmp_path, settings={**SETTINGS, "retriever": "recent"}):
            pass
    monkeypatch.setattr(refusals, "num_full_layers", lambda text: 2)
    with pytest.raises(ConfigError, match="no layer that attends to its whole context"):
        with serving(tmp_path, settings={**SETTINGS, "retriever": "recent"}):
            pass


@pytest.mark.parametrize("served", DRAFTED, indirect=True)
def test_lossless_mode_drafts_through_layers_with_windows(served):
    (tokens, accepted), (with_few, accepted_with_few) = (
        served["lossless"],
        served["lossless recent"],
    )
    assert tokens == with_few == served["stock"]
    # Drafts over all pages are the model's own tokens, if its windows are what they are.
    assert accepted > 0.9 > accepted_with_few > 0
