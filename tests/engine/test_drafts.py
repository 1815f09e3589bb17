"""Speculative decoding: drafts of every kind, verified over the selected pages."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from specontext_vllm.config import PAGE_SIZE, pages_for
from tests.conftest import CUDA
from tests.engine.conftest import DEMO_MODEL, engine
from tests.engine.poison import poison_stale, poison_unread
from tests.engine.scenarios import SCENARIOS, ids, sampling, scenarios
from tests.engine.shared_runs import SETTINGS, SHAPE, SMALL, WHOLE

HEAD = str(DEMO_MODEL / "retrieval_head")
DRAFTS = {
    "eagle3": {"method": "eagle3", "model": HEAD, "num_speculative_tokens": 3},
    "ngram": {
        "method": "ngram",
        "num_speculative_tokens": 5,
        "prompt_lookup_max": 4,
        "prompt_lookup_min": 2,
    },
}
CLOSE = 5e-2 if CUDA else 1e-4
"""A GPU multiplies float32 on tf32 units."""
cpu_only = pytest.mark.skipif(CUDA, reason="a GPU's float32 products are rounded")


class Watched:
    """An engine with drafts, what its steps have kept, and what the head knows of it."""

    def __init__(self, llm: Any) -> None:
        self.llm = llm
        self.runner = llm.llm_engine.model_executor.driver_worker.worker.model_runner
        self.step = self.runner.runtime.step
        self.slots: dict[int, int] = {}
        self.firsts: dict[int, int] = {}
        after, self.keep_all = self.step.after_model, False

        def after_model(batch: Any, aux: Any) -> None:
            starts = batch.query_starts.tolist()
            for row in range(batch.num_rows):
                kept = batch.query_lens[row] if batch.kept is None else int(batch.kept[row])
                tokens = slice(starts[row], starts[row] + kept)
                positions = batch.positions[tokens].tolist()
                self.slots.update(zip(positions, batch.slots[tokens].tolist(), strict=True))
                if row < batch.num_decodes:
                    self.firsts |= dict.fromkeys(positions, positions[0])
            after(replace(batch, kept=None) if self.keep_all else batch, aux)

        self.step.after_model = after_model

    def answer(self, prompt: list[int], count: int) -> list[int]:
        """Alone, with a cold prefix cache."""
        self.llm.reset_prefix_cache()
        self.slots.clear()
        self.firsts.clear()
        outputs = self.llm.generate(
            [{"prompt_token_ids": prompt}], sampling(max_tokens=count), use_tqdm=False
        )
        return ids(outputs)[0]

    def learned(self) -> tuple[torch.Tensor, torch.Tensor]:
        """The head's keys of the last answer's tokens, and the fused states of its pages."""
        cache = self.runner.runtime.retriever.cache
        device = self.runner.runtime.device
        slots = torch.tensor([slot for _, slot in sorted(self.slots.items())], device=device)
        return cache.keys_at(slots).cpu(), cache.fused[slots[::PAGE_SIZE] // PAGE_SIZE].cpu()

    def counts(self) -> dict[str, float]:
        """Drafted and accepted tokens so far, as vLLM counts them."""
        return {
            metric.name.removeprefix("vllm:spec_decode_num_"): metric.value
            for metric in self.llm.get_metrics()
            if metric.name.startswith("vllm:spec_decode_num_") and hasattr(metric, "value")
        }

    def set(self, **changes: Any) -> None:
        self.llm.collective_rpc("specontext_set", kwargs=changes)


@pytest.fixture(scope="module", params=DRAFTS)
def drafted(request, prompts) -> dict[str, Any]:
    settings = {**SETTINGS, "budget": WHOLE, "head_key_dtype": "model"}
    with engine(
        **SHAPE,
        speculative_config=DRAFTS[request.param],
        additional_config={"specontext": settings},
    ) as llm:
        watched = Watched(llm)
        out: dict[str, Any] = scenarios(llm, prompts)
        out["counts"] = watched.counts()
        # What the head learns, and what it would learn if all drafts were taken for kept.
        for name in ("with drafts", "all kept"):
            watched.keep_all = name == "all kept"
            out["answer"] = watched.answer(prompts[-1], 60)
            out[name] = watched.learned()
        watched.keep_all = False
        watched.answer(prompts[-1] + out["answer"][:-1], 1)
        out["as a prompt"] = watched.learned()
        watched.set(budget=SMALL)
        llm.collective_rpc("specontext_stats", args=(True,))
        out["small budget"] = watched.answer(prompts[-1], 60)
        out["stats"] = llm.collective_rpc("specontext_stats")[0]
        if CUDA:
            return out
        watched.set(retriever="recent")
        out["recent"] = [(p, watched.answer(p, 40), dict(watched.firsts)) for p in prompts[-2:]]
        watched.set(retriever="random")
        out["random"] = watched.answer(prompts[-1], 40)
        watched.set(retriever="dlm")
        poison_stale(watched.runner, out)
        poison_unread(watched.runner, out)
        out["poisoned"] = watched.answer(prompts[-1], 60)
        return out


@pytest.mark.parametrize("scenario", SCENARIOS)
def test_tokens_equal_stock_without_drafts(stock, drafted, scenario):
    assert drafted[scenario] == stock[scenario]


def test_drafts_were_accepted_and_rejected_and_requests_preempted(drafted):
    counts = drafted["counts"]
    assert 0 < counts["accepted_tokens"] < counts["draft_tokens"]
    assert drafted["preempted"] > 0 and drafted["cached tokens"] >= 256


def test_the_head_learns_what_was_kept(drafted):
    keys, fused = drafted["as a prompt"]
    found_keys, found_fused = drafted["with drafts"]
    count = len(keys)
    assert len(found_keys) >= count
    # Token 0 has no pair.
    torch.testing.assert_close(found_keys[1:count], keys[1:], atol=CLOSE, rtol=CLOSE)
    pages = count // PAGE_SIZE
    torch.testing.assert_close(found_fused[:pages], fused[:pages], atol=CLOSE, rtol=CLOSE)
    # Without the count of what was kept it would not.
    assert (drafted["all kept"][0][1:count] - keys[1:]).abs().max() > 0.1


def test_a_small_budget_reads_less(drafted):
    assert drafted["stats"]["pages_read"] < 0.6 * drafted["stats"]["pages_total"]
    assert 0 < drafted["stats"]["kept_mass_mean"] < 1


@cpu_only
def test_neither_rejected_drafts_nor_unread_pages_are_read(drafted):
    assert drafted["stale places"] > 0 and drafted["poisoned pages"] > 0
    assert drafted["poisoned"] == drafted["small budget"]
    assert len(drafted["random"]) == 40


@cpu_only
def test_each_token_reads_the_pages_of_its_row_s_first_token_and_those_after_it(drafted):
    """Against transformers' model with masks that say what each token may read."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(DEMO_MODEL, dtype=torch.float32).eval()
    crossed = 0
    for prompt, reply, firsts in drafted["recent"]:
        sequence = prompt + reply[:-1]
        read = torch.ones(len(sequence), len(sequence), dtype=torch.bool).tril()
        for position in range(len(prompt), len(sequence)):
            first = firsts[position]
            oldest = pages_for(first + 1) - SMALL // PAGE_SIZE + 1
            read[position, PAGE_SIZE : max(PAGE_SIZE, oldest * PAGE_SIZE)] = False
            crossed += first // PAGE_SIZE != position // PAGE_SIZE
        mask = torch.zeros(read.shape).masked_fill(~read, torch.finfo(torch.float32).min)
        with torch.no_grad():
            logits = model(torch.tensor([sequence]), attention_mask=mask[None, None]).logits
        assert logits[0, len(prompt) - 1 :].argmax(-1).tolist() == reply
    assert crossed > 0
