"""Changing settings between steps, without an engine."""

from dataclasses import replace

import pytest
import torch

from specontext_vllm.config import ConfigError, SpeContextConfig, pages_for
from specontext_vllm.engine import settings as settings_module
from specontext_vllm.engine.settings import LiveSettings
from specontext_vllm.retrieval.checkpoint import dummy_checkpoint
from specontext_vllm.retrieval.head import RetrievalHead
from specontext_vllm.retrieval.local import LocalRetriever
from specontext_vllm.step_data import PageTable, Selection, StepBatch
from tests.steps import bare_step


def no_selector(config):
    raise AssertionError("these tests have no layers that could take a selector")


@pytest.fixture
def retriever(device):
    """One without a head."""
    return with_table_of_512(device, SpeContextConfig(retriever="recent", budget=256))


def with_table_of_512(device, config, checkpoint=None) -> LocalRetriever:
    """A retriever whose page table holds 512 tokens of up to 1024."""
    head = None
    if checkpoint is not None:
        head = RetrievalHead(checkpoint, max_position=1024, dtype=torch.float32, device=device)
    return LocalRetriever(
        config,
        head,
        lambda ids: ids,
        num_kv_heads=2,
        max_model_len=1024,
        table_pages=32,
        device=device,
        max_rows=8,
    )


def live(retriever, *, captured=False):
    """The settings of an engine without a model."""
    table = PageTable.allocate(1, 2, 32, retriever.device)
    return LiveSettings(
        retriever.config,
        1024,
        captured=captured,
        step=bare_step(retriever, Selection.into(table)),
        selector=None,
        install_selector=no_selector,
    )


def test_what_is_not_named_stays(retriever):
    settings = live(retriever)
    settings.change(confidence_threshold=0.25, fallback_budget=512)
    found = settings.change(retriever="random", budget=128, recent_tokens=32)
    assert (found["retriever"], found["budget"], found["recent_tokens"]) == ("random", 128, 32)
    assert (found["confidence_threshold"], found["fallback_budget"], found["stickiness"]) == (
        0.25,
        512,
        1.0,
    )
    assert retriever.config.model_dump() == found
    assert settings.change(confidence_threshold=0.0)["confidence_threshold"] == 0.0


def test_a_budget_below_the_one_of_the_start_is_said_to_leave_the_prefix_cache_as_it_was(
    retriever, monkeypatch
):
    told = []
    monkeypatch.setattr(
        settings_module.logger, "warning", lambda text, *values: told.append(text % values)
    )
    settings = live(retriever)
    settings.change(budget=256)
    assert not told
    settings.change(budget=128)
    assert (
        len(told) == 1
        and "over 128 tokens are read in part now" in told[0]
        and "up to 256" in told[0]
    )


def test_requests_that_would_fall_back_to_more_than_the_page_table_holds_are_told_of(
    device, monkeypatch
):
    """The settings' own fallback fits, that of a request with the budget of the start does not."""
    told = []
    monkeypatch.setattr(
        settings_module.logger, "warning", lambda text, *values: told.append(text % values)
    )
    checkpoint = dummy_checkpoint(
        hidden_size=32,
        num_layers=12,
        num_heads=4,
        num_kv_heads=2,
        head_dim=16,
        rope_theta=1e4,
        max_position=1024,
        dtype=torch.float32,
        seed=0,
    )
    config = SpeContextConfig(retrieval_head="dummy", budget=512, cache_generated=True)
    settings = live(with_table_of_512(device, config, checkpoint))
    settings.change(budget=128, confidence_threshold=0.5, fallback_budget=512)
    settings.change(confidence_threshold=0.0)
    assert not told
    settings = live(with_table_of_512(device, config, checkpoint))
    settings.change(budget=128, confidence_threshold=0.5)
    assert (
        len(told) == 1 and "a budget of 512 tokens, and fall back to 512 instead of 1024" in told[0]
    )


def test_own_budgets_hold_what_is_always_read_after_a_change(retriever, device, monkeypatch):
    """Requests are judged by the settings of the start, where 112 tokens are enough."""
    told = []
    monkeypatch.setattr(
        settings_module.logger, "warning", lambda text, *values: told.append(text % values)
    )
    live(retriever).change(budget=512, recent_tokens=256)
    (sentence,) = told
    assert "a budget of 112 tokens; one under 304 reads 304" in sentence
    batch = replace(StepBatch.in_block_0(1024, 64, device), budgets=(112,))
    selection = Selection.into(PageTable.allocate(1, 2, 32, device), count_from_start=64)
    retriever.select_eagerly(batch, selection)
    pages = selection.pages[0, : pages_for(int(selection.lengths[0]))] // 2
    # The sink, a page to choose, and the recents: the newest page is full, so 17 are 272 tokens.
    assert pages.tolist()[0] == 0 and pages.tolist()[-17:] == list(range(47, 64))


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"confidence_threshold": 1.5}, "confidence_threshold: found 1.5"),
        ({"fallback_budget": 128}, "fallback_budget: found 128"),
        # Four budgets of 256 tokens do not fit the table.
        ({"confidence_threshold": 0.5}, "page table holds 512 tokens"),
        ({"recent_tokens": 256}, "budget: found 256"),
        ({"retriever": "dlm"}, "needs a retrieval head"),
        ({"retriever": "quest"}, "start the engine with it"),
        ({"stickines": 2.0}, "unknown key 'stickines'; did you mean 'stickiness'"),
        ({"host_kv_gib": 1.0}, "host_kv_gib: found 1.0, .* start the engine with it"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_settings_that_cannot_be_leave_the_old_ones_in_force(retriever, changes, named):
    before = retriever.config
    with pytest.raises(ConfigError, match=named):
        live(retriever).change(**changes)
    assert retriever.config is before


def test_graphs_that_hold_a_selection_hold_on_to_its_settings(retriever):
    settings = live(retriever, captured=True)
    with pytest.raises(ConfigError, match="CUDA graphs hold the selection"):
        settings.change(retriever="oracle")
    assert settings.change(retriever="random")["retriever"] == "random"
