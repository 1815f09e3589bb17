"""Settings of single requests: each row of a batch reads its own pages, with the tokens of an
engine that was started so; and what is refused.
"""

from __future__ import annotations

import pytest
import torch

from specontext_vllm.config import ConfigError, SpeContextConfig
from specontext_vllm.engine.request_settings import RequestError, read_budget
from specontext_vllm.step_data import WHOLE
from tests.engine.conftest import engine
from tests.engine.own_budgets import counted, mixed, pages_read, scattered, with_own
from tests.engine.scenarios import ids
from tests.engine.shared_runs import KINDS, SETTINGS, SHAPE, SMALL
from tests.engine.test_tiers import SAVED_GIB
from tests.poison import poisoned_tiers, times_poisoned

LARGE = 128


@pytest.fixture(scope="module")
def started_with_128(prompts):
    """An engine with two tiers and the larger budget, of which requests ask for less; generated
    pages enter its prefix cache where they are exact.
    """
    settings = {**SETTINGS, "budget": LARGE, "host_kv_gib": 0.25, "gpu_kv_gib": 0.0046 - SAVED_GIB}
    with poisoned_tiers(), engine(**SHAPE, additional_config={"specontext": settings}) as llm:
        kinds = {"none": None, "64": KINDS["64"]}
        out = mixed(llm, scattered(), kinds)
        out["metrics"] = counted(llm)
        out["poisoned"] = llm.collective_rpc(times_poisoned)[0]
        out["stats"] = llm.collective_rpc("specontext_stats")[0]
        out["audit"] = llm.collective_rpc("specontext_audit")[0]
        out["hits"] = {name: hit_of_the_next_turn(llm, prompts[3], kinds[name]) for name in kinds}
        out["refused"] = refusal(llm, prompts[3], {"specontext_budget": LARGE + 16})
        return out


def hit_of_the_next_turn(llm, prompt, own) -> int:
    """Cached tokens of a prompt that goes on behind the answer to another one."""
    llm.reset_prefix_cache()

    def reply(tokens, count):
        return llm.generate(
            [{"prompt_token_ids": tokens}], with_own(own, max_tokens=count), use_tqdm=False
        )[0]

    first = reply(prompt, 200)
    return reply(prompt + list(first.outputs[0].token_ids), 1).num_cached_tokens


def refusal(llm, prompt, own) -> str:
    """Why a request is refused; the engine goes on."""
    with pytest.raises(Exception) as caught:  # noqa: PT011 - vLLM's own class
        llm.generate([{"prompt_token_ids": prompt}], with_own(own), use_tqdm=False)
    assert not llm.llm_engine.has_unfinished_requests()
    assert ids(llm.generate([{"prompt_token_ids": prompt}], with_own(None), use_tqdm=False))[0]
    return f"{type(caught.value).__name__}: {caught.value}"


@pytest.mark.parametrize("kind", ["64", "128"])
def test_tokens_are_those_of_an_engine_with_that_budget(both_budgets, started_with_128, kind):
    """Each engine's own budget is the other one's requests', one with two tiers."""
    one, two = both_budgets["small budget"]["own budgets"], started_with_128
    by_default = {"64": one["none"], "128": two["none"]}[kind]
    assert one[kind] == by_default
    assert two.get(kind, two["none"]) == by_default
    # Else the comparison would say nothing.
    assert one["64"] != one["128"]


def test_mode_dense_has_the_tokens_of_stock(stock, both_budgets):
    own = both_budgets["small budget"]["own budgets"]
    assert [tokens[:16] for tokens in own["dense"]] == [
        tokens[:16] for tokens in stock["scattered"]
    ]
    assert own["dense"] != own["none"]


def test_the_metrics_count_what_each_kind_read(both_budgets, started_with_128):
    chosen = scattered()
    own = both_budgets["small budget"]["own budgets"]["metrics"]
    rows = len(chosen) * 19
    assert own["own_budget_rows"] == 2 * rows and own["dense_rows"] == rows
    assert own["own_budget_pages_read"] == pages_read(chosen, 64) + pages_read(chosen, 128)
    assert own["dense_pages_read"] == pages_read(chosen, None)
    two = started_with_128["metrics"]
    assert two["own_budget_pages_read"] == pages_read(chosen, 64) and two["dense_rows"] == 0


def test_the_two_tiers_were_used(started_with_128):
    assert started_with_128["stats"]["layer_moves"] > 0 and started_with_128["poisoned"] > 0
    assert started_with_128["audit"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="no graph may hold the poisoned steps")
def test_a_row_reads_no_page_outside_of_its_own_selection(both_budgets):
    own = both_budgets["small budget"]["own budgets"]
    assert own["poisoned"]["poisoned pages"] > 1000
    assert own["poisoned"]["tokens"] == own["unpoisoned"]


def test_generated_pages_are_cached_up_to_the_request_s_own_budget(started_with_128):
    assert started_with_128["hits"] == {"none": LARGE, "64": SMALL}


def test_a_wrong_request_ends_with_its_sentence_and_the_engine_goes_on(started_with_128):
    assert started_with_128["refused"] == (
        "VLLMValidationError: specontext_budget: found 144, but requests of this engine may have "
        "128 tokens; give less, or start it with a larger additional_config.specontext.max_budget."
    )


# What is judged, without an engine.

READ = {
    "nothing": ({}, {}, None),
    "of others": ({}, {"ngram_size": 3}, None),
    "less": ({}, {"specontext_budget": 128}, 128),
    "more, within max_budget": ({"max_budget": 1000}, {"specontext_budget": 1000}, 1000),
    "any": ({"max_budget": "full"}, {"specontext_budget": 3999}, 3999),
    "sparse": ({}, {"specontext_mode": "sparse"}, None),
    "both": ({}, {"specontext_mode": "sparse", "specontext_budget": 112}, 112),
    "dense": ({"max_budget": "full"}, {"specontext_mode": "dense"}, WHOLE),
    "dense, all is within the budget": ({"budget": 4000}, {"specontext_mode": "dense"}, WHOLE),
    "dense everywhere": ({"retriever": "dense"}, {"specontext_mode": "dense"}, WHOLE),
    "lossless": ({"mode": "lossless"}, {"specontext_mode": "lossless"}, None),
}


@pytest.mark.parametrize("name", READ)
def test_settings_of_requests_are_read(name):
    settings, asked, budget = READ[name]
    config = SpeContextConfig(**{"budget": 512, **settings})
    assert read_budget(asked, config, 4000) == budget
    assert read_budget(None, config, 4000) is None


REFUSED = {
    "too much": ({}, {"specontext_budget": 513}, "found 513, but requests of this engine may have"),
    "beyond max_budget": ({"max_budget": 600}, {"specontext_budget": 601}, "may have 600 tokens"),
    "longer than any context": ({"max_budget": "full"}, {"specontext_budget": 4001}, "4000 tokens"),
    "too little": ({}, {"specontext_budget": 111}, "found 111, but sinks, recents and one page"),
    "no number": ({}, {"specontext_budget": "512"}, "found '512'; give a whole number of tokens."),
    "none": ({}, {"specontext_budget": None}, "found None; give a whole number of tokens."),
    "half": ({}, {"specontext_budget": 128.5}, "found 128.5; give a whole number of tokens."),
    "yes": ({}, {"specontext_budget": True}, "found True; give a whole number of tokens."),
    "no mode": ({}, {"specontext_mode": "fast"}, "found 'fast'; use sparse or dense."),
    "a list": ({}, {"specontext_mode": ["dense"]}, "found ['dense']; use sparse or dense."),
    "dense": ({}, {"specontext_mode": "dense"}, "hold 512 tokens a request; start it with"),
    "dense, almost": ({"max_budget": 3999}, {"specontext_mode": "dense"}, "hold 3999 tokens"),
    "lossless": ({}, {"specontext_mode": "lossless"}, "which is a mode of whole engines"),
    "sparse in a lossless engine": (
        {"mode": "lossless"},
        {"specontext_mode": "sparse"},
        "this engine is in mode lossless",
    ),
    "budget in a lossless engine": (
        {"mode": "lossless"},
        {"specontext_budget": 128},
        "this engine is in mode lossless",
    ),
    "budget of a retriever that reads all": (
        {"retriever": "dense"},
        {"specontext_budget": 128},
        "this engine's retriever reads all pages",
    ),
    "sparse with a retriever that reads all": (
        {"retriever": "dense"},
        {"specontext_mode": "sparse"},
        "this engine's retriever reads all pages",
    ),
    "two at once": (
        {"max_budget": "full"},
        {"specontext_mode": "dense", "specontext_budget": 128},
        "found 128 with specontext_mode dense, which reads all",
    ),
    "a slip": ({}, {"specontext_buget": 128}, "nothing reads it; did you mean specontext_budget?"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_a_request_cannot_have_is_refused_in_one_sentence(name):
    settings, asked, sentence = REFUSED[name]
    config = SpeContextConfig(**{"budget": 512, **settings})
    with pytest.raises(RequestError) as caught:
        read_budget(asked, config, 4000)
    said = str(caught.value)
    assert sentence in said and said.startswith("specontext_") and said.endswith((".", "?"))


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"max_budget": 511}, "max_budget: found 511, less than budget (512)"),
        ({"max_budget": "all"}, "max_budget: found 'all'; give tokens"),
        ({"max_budget": 0}, "max_budget: found 0; give tokens"),
        ({"max_budget": "full", "host_kv_gib": 1}, "whose hot buffers would have to hold whole"),
        ({"max_budget": 512, "mode": "lossless"}, "max_budget: found 512 with mode lossless"),
    ],
)
def test_a_wrong_max_budget_is_refused(settings, sentence):
    with pytest.raises(ConfigError) as caught:
        SpeContextConfig.from_settings({"budget": 512, **settings})
    assert sentence in str(caught.value)


def test_tables_are_as_wide_as_the_largest_budget():
    def wide(**settings):
        return SpeContextConfig(**settings).table_pages(131072)

    assert wide(max_budget=4096) == 256 and wide(max_budget="full") == 8192
    assert wide(max_budget=4096, confidence_threshold=0.5) == 1024
    assert wide(max_budget=4096, confidence_threshold=0.5, fallback_budget=2048) == 256
