"""Speculative decoding: drafts of every kind, verified over the selected pages."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from vllm.v1.sample import rejection_sampler

from specontext_vllm.config import PAGE_SIZE, pages_for
from specontext_vllm.engine.metadata import SpeContextMetadataBuilder
from tests.conftest import CUDA
from tests.engine.asked import asked, chance_of_pairs, expected_pairs, sampled
from tests.engine.conftest import DEMO_MODEL, engine
from tests.engine.own_budgets import mixed
from tests.engine.poison import poison_stale, poison_unread, poisoned_drafts
from tests.engine.scenarios import SCENARIOS, ids, preemptions, sampling, scenarios
from tests.engine.shared_runs import CHOSEN, KINDS, SETTINGS, SHAPE, SMALL, WHOLE
from tests.poison import poisoned_tiers, times_poisoned

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
        self.kept: Counter[int] = Counter()
        after, self.keep_all = self.step.after_model, False

        def after_model(batch: Any, aux: Any) -> None:
            starts = batch.query_starts.tolist()
            for row in range(batch.num_rows):
                kept = batch.query_lens[row] if batch.kept is None else int(batch.kept[row])
                tokens = slice(starts[row], starts[row] + kept)
                positions = batch.positions[tokens].tolist()
                self.slots.update(zip(positions, batch.slots[tokens].tolist(), strict=True))
                if row < batch.num_decodes:
                    self.kept[kept] += batch.query_lens[row] == batch.max_queries > 1
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

    def counting(self, ask: Callable[[], Any]) -> tuple[Any, dict[str, float]]:
        """What ``ask`` returns, and what ``counts`` gains by it."""
        before = self.counts()
        answer = ask()
        return answer, {name: value - before[name] for name, value in self.counts().items()}

    def set(self, **changes: Any) -> None:
        self.llm.collective_rpc("specontext_set", kwargs=changes)


def crowd(llm: Any, prompts: list[list[int]]) -> dict[str, list[list[int]]]:
    """More requests than the engine has pages for; a prefix hit, and a turn behind it. Requests
    have the budget ``SMALL`` of their own: the scheduler knows no other, and would take what they
    generated for exact when it caches it.
    """

    def answer(*chosen: list[int], count: int = 20) -> list[list[int]]:
        asked = [{"prompt_token_ids": prompt} for prompt in chosen]
        own = sampling(max_tokens=count, extra_args={"specontext_budget": SMALL})
        return ids(llm.generate(asked, own, use_tqdm=False))

    llm.reset_prefix_cache()
    out = {"crowd": answer(*prompts[::-1], count=90)}
    answer(prompts[-1], count=1)
    out["prefix hit"] = answer(prompts[-1])
    out["next turn"] = answer(prompts[-1] + out["prefix hit"][0] + prompts[4][:40])
    return out


def densely(builder: Any, common: Any, draft_index: int) -> Any:
    """A drafter's metadata as it is without lists."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(builder, "draft_lists", None)
        return builder.build(0, common)


def keep_all_drafts(
    drafts: torch.Tensor,
    counts: list[int],
    most: int,
    ends: Any,
    probs: Any,
    logits: Any,
    bonus: torch.Tensor,
    *args: Any,
    **kwargs: Any,
) -> torch.Tensor:
    """A verification that verifies nothing."""
    tokens = torch.full((len(counts), most + 1), -1, dtype=torch.int32)
    for row, of_row in enumerate(drafts.split(counts)):
        tokens[row, : len(of_row)] = of_row
        tokens[row, len(of_row)] = bonus[row, 0]
    return tokens


@pytest.fixture(scope="module", params=DRAFTS)
def drafted(request, prompts) -> dict[str, Any]:
    settings = {**SETTINGS, "budget": WHOLE, "max_budget": "full", "head_key_dtype": "model"}
    with engine(
        **SHAPE,
        speculative_config=DRAFTS[request.param],
        additional_config={"specontext": settings},
    ) as llm:
        watched = Watched(llm)
        out: dict[str, Any] = scenarios(llm, prompts)
        out["counts"] = watched.counts()
        cut = sampling(temperature=1, top_k=3, max_tokens=4)
        out["top k"] = llm.generate([{"prompt_token_ids": prompts[3]}], cut, use_tqdm=False)[0]
        head = watched.runner.runtime.retriever.head.head
        out["head bytes"] = head.shared_bytes, head.num_bytes
        if not CUDA:
            out["asked"] = asked(llm, prompts)
        if not CUDA and request.param == "ngram":
            out["sampled"], out["sampled counts"] = watched.counting(lambda: sampled(llm, 120))
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(rejection_sampler, "rejection_sample", keep_all_drafts)
                out["sampled unverified"] = sampled(llm, 40)
        # What the head learns, and what it would learn if all drafts were taken for kept.
        for name in ("with drafts", "all kept"):
            watched.keep_all = name == "all kept"
            out["answer"] = watched.answer(prompts[-1], 60)
            out[name] = watched.learned()
        watched.keep_all = False
        watched.answer(prompts[-1] + out["answer"][:-1], 1)
        out["as a prompt"] = watched.learned()
        if not CUDA and request.param == "eagle3":
            _, out["over lists"] = watched.counting(lambda: watched.answer(prompts[-1], 60))
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(SpeContextMetadataBuilder, "build_for_drafting", densely)
                _, out["over all"] = watched.counting(lambda: watched.answer(prompts[-1], 60))
        watched.set(budget=SMALL)
        llm.collective_rpc("specontext_stats", args=(True,))
        out["small budget"], out["over few"] = watched.counting(
            lambda: watched.answer(prompts[-1], 60)
        )
        out["stats"] = llm.collective_rpc("specontext_stats")[0]
        kinds = {"none": None, "128": KINDS["128"], "dense": KINDS["dense"]}
        out["own budgets"] = mixed(llm, [prompts[i] for i in CHOSEN], kinds)
        if request.param == "eagle3":
            out |= {f"small {name}": tokens for name, tokens in crowd(llm, prompts).items()}
        if CUDA:
            return out
        if request.param == "eagle3":
            with poisoned_drafts(watched.runner) as out["draft pages"]:
                _, out["the rest NaN"] = watched.counting(lambda: watched.answer(prompts[-1], 60))
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


def test_a_step_without_drafts_samples_from_the_likeliest(drafted):
    assert len(drafted["top k"].outputs[0].token_ids) == 4


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
    assert 0 < drafted["over few"]["accepted_tokens"] < drafted["over few"]["draft_tokens"]
    assert drafted["stats"]["pages_read"] < 0.6 * drafted["stats"]["pages_total"]
    assert 0 < drafted["stats"]["kept_mass_mean"] < 1


def test_a_dense_request_beside_sparse_ones_has_the_tokens_of_stock(stock, drafted):
    own = drafted["own budgets"]
    assert [tokens[:16] for tokens in own["dense"]] == [stock["plain"][i][:16] for i in CHOSEN]
    assert own["none"] != own["dense"]


@cpu_only
@pytest.mark.parametrize("what", ["tokens", "several", "stopped", "within a grammar"])
def test_what_requests_ask_for_is_stock_s(stock, drafted, what):
    assert drafted["asked"][what] == stock["asked"][what]
    if what == "stopped":
        assert len({len(tokens) for _, tokens, _ in drafted["asked"][what]}) > 5


@cpu_only
def test_log_probabilities_are_stock_s(stock, drafted):
    for found, wanted in zip(drafted["asked"]["logprobs"], stock["asked"]["logprobs"], strict=True):
        assert found == pytest.approx(wanted, abs=1e-3)


@cpu_only
@pytest.mark.parametrize("drafted", ["ngram"], indirect=True)
def test_what_is_drawn_is_drawn_from_the_target_s_distribution(drafted):
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(DEMO_MODEL, dtype=torch.float32).eval()
    expected = expected_pairs(model)
    counts = drafted["sampled counts"]
    assert 20 < counts["accepted_tokens"] < counts["draft_tokens"] - 20
    assert chance_of_pairs(drafted["sampled"], expected) > 0.01
    # The test would see it if drafts were not verified.
    assert chance_of_pairs(drafted["sampled unverified"], expected) < 1e-6


@cpu_only
@pytest.mark.parametrize("drafted", ["eagle3"], indirect=True)
def test_the_drafter_reads_the_target_s_pages(drafted):
    """At the whole budget it drafts what it drafts densely, at a small one it reads no other."""
    assert drafted["over lists"] == drafted["over all"]
    assert drafted["the rest NaN"] == drafted["over few"]
    assert 0 < drafted["draft pages"]["read"] < 0.3 * drafted["draft pages"]["held"]


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


@pytest.mark.gpu
@pytest.mark.parametrize("drafted", ["eagle3"], indirect=True)
def test_the_head_s_matrices_are_the_drafter_s(drafted):
    """On a CPU vLLM packs a drafter's weights, and keeps none that could be shared."""
    shared, all_of_it = drafted["head bytes"]
    assert shared > 0.95 * all_of_it


MIDDLE = 256
"""A budget over the context of some prompts, with which hot buffers are smaller than contexts."""


@pytest.fixture(scope="module")
def tiered(prompts) -> dict[str, Any]:
    """Two tiers with frames for six tenths of the tokens; given-up places are NaN."""
    settings = {**SETTINGS, "budget": MIDDLE, "head_key_dtype": "model"}
    settings |= {"host_kv_gib": 0.25, "gpu_kv_gib": 0.009}
    with (
        poisoned_tiers(),
        engine(
            **SHAPE,
            speculative_config=DRAFTS["eagle3"],
            additional_config={"specontext": settings},
        ) as llm,
    ):
        watched = Watched(llm)
        tiers, decoding = watched.runner.runtime.tiers, set()
        follow, before = tiers.follow, watched.step.before_model

        def note(step: Any) -> None:
            decoding.clear()
            decoding.update(step.decoding)
            follow(step)

        def compare(batch: Any) -> None:
            # What the scheduler's output was read as, and what the rows are.
            assert decoding == set(batch.names[: batch.num_decodes])
            before(batch)

        tiers.follow, watched.step.before_model = note, compare
        within = [prompt for prompt in prompts if len(prompt) + 16 <= MIDDLE]
        out: dict[str, Any] = {"within the budget": [watched.answer(p, 16) for p in within]}
        watched.set(budget=SMALL)
        before_crowd = preemptions(llm)
        out |= crowd(llm, prompts)
        out["preempted"] = preemptions(llm) - before_crowd
        out["kept"], out["counts"] = watched.kept, watched.counts()
        out["stats"] = llm.collective_rpc("specontext_stats")[0]
        out["poisoned"] = llm.collective_rpc(times_poisoned)[0]
        out["plan"], out["held"] = tiers.plan, llm.collective_rpc("specontext_audit")[0]
        names = watched.runner.runtime.attention_groups[0].layer_names
        layers = llm.llm_engine.vllm_config.compilation_config.static_forward_context
        out["caches"] = {name: layers[name].kv_cache.data_ptr() for name in names}
        return out


def test_two_tiers_give_the_tokens_of_stock_within_the_budget(stock, tiered):
    answers = tiered["within the budget"]
    assert len(answers) >= 5 and answers == stock["plain"][: len(answers)]


@pytest.mark.parametrize("drafted", ["eagle3"], indirect=True)
@pytest.mark.parametrize("scenario", ["crowd", "prefix hit", "next turn"])
def test_two_tiers_give_the_tokens_of_one(drafted, tiered, scenario):
    assert tiered[scenario] == drafted[f"small {scenario}"]


def test_the_two_tiers_were_used(tiered):
    """Drafts were kept and rejected at every place, layers were offloaded, requests preempted."""
    assert all(tiered["kept"][count] > 0 for count in range(1, 5))
    stats, plan = tiered["stats"], tiered["plan"]
    assert stats["layer_moves"] > 0 and stats["missed_head_pages"] > 0 and tiered["preempted"] > 0
    assert plan.frames < 0.65 * plan.num_pages * 6 and tiered["poisoned"] > 100
    # The drafter's layer keeps its KV on the GPU, beside the frames that all others share.
    assert plan.parts["drafter's KV"] == plan.num_pages * 2 * PAGE_SIZE * 2 * 64 * 4
    assert len(tiered["caches"]) == 7 and len(set(tiered["caches"].values())) == 2


@cpu_only
def test_a_draft_model_keeps_all_of_its_layers_outside_of_the_two_tiers(stock, prompts):
    """The target drafts for itself: where all is read nearly every draft stays."""
    drafter = {"method": "draft_model", "model": str(DEMO_MODEL), "num_speculative_tokens": 3}
    settings = {**SETTINGS, "budget": MIDDLE, "host_kv_gib": 0.25, "gpu_kv_gib": 0.0175}
    with (
        poisoned_tiers(),
        engine(
            **SHAPE, speculative_config=drafter, additional_config={"specontext": settings}
        ) as llm,
    ):
        watched = Watched(llm)
        within = [prompt for prompt in prompts if len(prompt) + 16 <= MIDDLE]
        answers = [watched.answer(prompt, 16) for prompt in within]
        assert answers == stock["plain"][: len(within)]
        assert watched.counts()["accepted_tokens"] > 0.7 * watched.counts()["draft_tokens"]
        tiers = watched.runner.runtime.tiers
        assert tiers.plan.parts["drafter's KV"] == 6 * tiers.plan.num_pages * tiers.arena[0].nbytes
        assert tiers.plan.host_layers > 0
        tiers.audit()
