"""Lossless mode: the target drafts over selected pages, and the answers and the KV that stays are
those of dense attention, whatever is selected.
"""

from __future__ import annotations

import math
from itertools import cycle
from typing import Any

import pytest
import torch

from specontext_vllm.config import PAGE_SIZE
from specontext_vllm.engine.draft_length import MAX_DRAFTS
from specontext_vllm.engine.lossless import slots_of
from specontext_vllm.observability.catalog import PREFIX
from tests.conftest import CUDA
from tests.engine.conftest import engine
from tests.engine.poison import poison_stale, poison_unread
from tests.engine.scenarios import SCENARIOS, sampling, scenarios
from tests.engine.shared_runs import SETTINGS, SHAPE

pytestmark = pytest.mark.skipif(CUDA, reason="of the V1 runner; test_lossless_v2.py has a GPU's")
RULES = ("dlm", "quest", "recent", "random")
CLOSE = 1e-4


class Drafting:
    """A lossless engine, how many tokens it drafts, and where its last answer's KV lies."""

    def __init__(self, llm: Any) -> None:
        self.llm = llm
        self.scheduler = llm.llm_engine.engine_core.engine_core.scheduler
        self.runner = llm.llm_engine.model_executor.driver_worker.worker.model_runner
        self.runtime, self.step = self.runner.runtime, self.runner.runtime.step
        self.slots: dict[int, tuple[int, ...]] = {}
        self.accepted: list[int] = []
        self.crossed = 0
        self.spoilt: int | None = None
        after, drafts = self.step.after_model, self.runner._self_drafts
        draft = drafts.draft

        def after_model(batch: Any, aux: Any) -> None:
            if batch.dense and batch.num_rows == 1:
                kept = batch.query_lens[0] if batch.kept is None else int(batch.kept[0])
                positions = batch.positions[:kept]
                places = [
                    slots_of(table.expand(kept, -1), positions, PAGE_SIZE).tolist()
                    for table in (batch.block_table[:1], *(t[:1] for t in batch.other_block_tables))
                ]
                self.slots.update(zip(positions.tolist(), zip(*places), strict=True))
                if batch.max_queries > 1:
                    self.accepted.append(kept - 1)
            after(batch, aux)

        def spoil(length: int, tokens: Any, known: Any, *others: Any) -> Any:
            made = draft(length, tokens, known, *others)
            self.crossed += int((known // PAGE_SIZE != (known + length) // PAGE_SIZE).sum())
            if self.spoilt is not None and self.spoilt < length:
                made[:, self.spoilt] = (made[:, self.spoilt] + 1) % 100 + 10
            return made

        self.step.after_model, drafts.draft = after_model, spoil

    def draft(self, *lengths: int) -> None:
        """From now on steps draft as many tokens, in turn."""
        turn = cycle(lengths)
        self.scheduler.draft_length.choose = lambda contexts: next(turn)

    def set(self, **changes: Any) -> None:
        self.llm.collective_rpc("specontext_set", kwargs=changes)

    def ask(self, prompt: list[int], **changes: Any) -> Any:
        """Alone, with a cold prefix cache."""
        self.llm.reset_prefix_cache()
        self.slots.clear()
        self.accepted.clear()
        outputs = self.llm.generate(
            [{"prompt_token_ids": prompt}], sampling(**changes), use_tqdm=False
        )
        return outputs[0]

    def answer(self, prompt: list[int], tokens: int) -> list[int]:
        return list(self.ask(prompt, max_tokens=tokens).outputs[0].token_ids)

    def kv(self, length: int) -> torch.Tensor:
        """``[layers, length, H, 2 * D]`` of the last answer."""
        context = self.runtime.vllm_config.compilation_config.static_forward_context
        return torch.stack(
            [
                context[name].kv_cache[slots // PAGE_SIZE, :, slots % PAGE_SIZE]
                for group, slots in zip(self.runtime.kv_groups, self._slots(length), strict=True)
                for name in group.layer_names
            ]
        )

    def head_keys(self, length: int) -> torch.Tensor:
        return self.runtime.retriever.cache.keys_at(self._slots(length)[0])

    def _slots(self, length: int) -> torch.Tensor:
        """``[KV groups, length]`` of the last answer."""
        return torch.tensor([self.slots[position] for position in range(length)]).T


@pytest.fixture(scope="module")
def lossless():
    # What Quest keeps of pages is kept from the start.
    settings = {**SETTINGS, "mode": "lossless", "retriever": "quest", "head_key_dtype": "model"}
    with engine(**SHAPE, additional_config={"specontext": settings}) as llm:
        drafting = Drafting(llm)
        drafting.set(retriever="dlm")
        yield drafting


@pytest.fixture(scope="module")
def went(lossless, prompts) -> dict[str, Any]:
    """All scenarios, with another number of drafts in each step."""
    lossless.draft(3, 1, MAX_DRAFTS, 0, 2, 4)
    return scenarios(lossless.llm, prompts)


@pytest.fixture(scope="module")
def dense(lossless, prompts) -> tuple[list[int], torch.Tensor, torch.Tensor]:
    """An answer without drafts, and the KV and the head's keys of its tokens as a prompt's."""
    lossless.draft(0)
    tokens = lossless.answer(prompts[-1], 60)
    lossless.answer(prompts[-1] + tokens[:-1], 1)
    length = len(prompts[-1]) + 59
    return tokens, lossless.kv(length).clone(), lossless.head_keys(length).clone()


@pytest.mark.parametrize("scenario", SCENARIOS)
def test_tokens_equal_stock(stock, went, scenario):
    assert went[scenario] == stock[scenario]


def test_requests_were_preempted_and_hit(went):
    assert went["preempted"] > 0 and went["cached tokens"] >= 256


@pytest.mark.parametrize(
    ("rule", "length"),
    [
        ("dlm", 1),
        ("dlm", 4),
        ("dlm", MAX_DRAFTS),
        ("quest", 4),
        ("recent", MAX_DRAFTS),
        ("random", 1),
        ("random", MAX_DRAFTS),
    ],
)
def test_tokens_kv_and_head_are_those_of_dense_steps(lossless, dense, prompts, rule, length):
    tokens, kv, keys = dense
    lossless.set(retriever=rule)
    lossless.draft(length)
    lossless.crossed = 0
    assert lossless.answer(prompts[-1], 60) == tokens
    assert lossless.crossed > 0
    torch.testing.assert_close(lossless.kv(kv.shape[1]), kv, atol=CLOSE, rtol=CLOSE)
    # Token 0 has no pair.
    found = lossless.head_keys(len(keys))[1:]
    torch.testing.assert_close(found, keys[1:], atol=CLOSE, rtol=CLOSE)


def test_bad_pages_cost_acceptance_alone(lossless, prompts):
    shares, answers = {}, []
    lossless.draft(4)
    for rule in RULES:
        lossless.set(retriever=rule)
        # A recitation: each of its words must be found.
        answers.append(lossless.answer(prompts[-2], 40))
        shares[rule] = sum(lossless.accepted) / (4 * len(lossless.accepted))
    assert all(answer == answers[0] for answer in answers)
    assert shares["dlm"] > 0.4 and shares["dlm"] > shares["random"] + 0.3, shares


@pytest.mark.parametrize("position", range(MAX_DRAFTS))
def test_a_rejection_at_every_position(lossless, dense, prompts, position):
    tokens, kv, keys = dense
    lossless.set(retriever="dlm")
    lossless.draft(MAX_DRAFTS)
    lossless.spoilt = position
    try:
        assert lossless.answer(prompts[-1], 60) == tokens
    finally:
        lossless.spoilt = None
    assert max(lossless.accepted) == position
    torch.testing.assert_close(lossless.kv(kv.shape[1]), kv, atol=CLOSE, rtol=CLOSE)
    found = lossless.head_keys(len(keys))[1:]
    torch.testing.assert_close(found, keys[1:], atol=CLOSE, rtol=CLOSE)


def test_without_what_the_page_remembered_the_head_forgets(lossless, dense, prompts, monkeypatch):
    """The control of the tests above."""
    _, _, keys = dense
    lossless.draft(4)
    monkeypatch.setattr(lossless.runner._self_drafts, "head_cache", None)
    lossless.answer(prompts[-1], 60)
    assert (lossless.head_keys(len(keys))[1:] - keys[1:]).abs().max() > 0.1


def test_a_stop_string_among_the_drafts(lossless, dense, prompts):
    tokenizer = lossless.llm.get_tokenizer()
    text = tokenizer.decode(dense[0])
    stop = text[len(text) // 2 :][:6]
    changes = {"max_tokens": 60, "stop": [stop], "detokenize": True}
    lossless.draft(0)
    plain = lossless.ask(prompts[-1], **changes).outputs[0]
    assert plain.finish_reason == "stop" and len(plain.token_ids) < 60
    for length in (1, 4, MAX_DRAFTS):
        lossless.draft(length)
        found = lossless.ask(prompts[-1], **changes).outputs[0]
        assert (found.text, found.finish_reason) == (plain.text, "stop")


def test_log_probabilities(lossless, prompts):
    def values(output: Any) -> torch.Tensor:
        return torch.tensor(
            [[entry.logprob for entry in at.values()] for at in output.outputs[0].logprobs]
        )

    lossless.draft(0)
    plain = values(lossless.ask(prompts[-1], logprobs=4, max_tokens=30))
    lossless.draft(4)
    torch.testing.assert_close(
        values(lossless.ask(prompts[-1], logprobs=4, max_tokens=30)), plain, atol=1e-3, rtol=1e-3
    )
    assert max(lossless.accepted) == 4


def test_structured_output(lossless, prompts):
    from vllm.sampling_params import StructuredOutputsParams

    found = []
    for length in (0, 4):
        lossless.draft(length)
        rules = StructuredOutputsParams(regex="[a-z]{2,9}( [a-z]{2,9}){6}")
        answer = lossless.ask(
            prompts[-1], structured_outputs=rules, max_tokens=60, detokenize=True, ignore_eos=False
        ).outputs[0]
        found.append((answer.text, list(answer.token_ids)))
    assert found[0] == found[1] and len(found[0][1]) > 4 and lossless.accepted


@pytest.mark.parametrize("given", [{"min_p": 0.1}, {"logit_bias": {17: 2.0}}], ids=str)
def test_what_vllm_does_not_apply_to_drafts_is_refused_by_the_name_of_the_mode(
    lossless, prompts, given
):
    """Named regression: vLLM's sentence spoke of speculative decoding, which nobody had set."""
    (key,) = given
    with pytest.raises(Exception, match=f"^{key}: found .* this engine is in mode lossless"):  # noqa: PT011 - vLLM's own class
        lossless.ask(prompts[3], temperature=1.0, **given)
    assert not lossless.llm.llm_engine.has_unfinished_requests()


TEMPERATURE, TOP, SAMPLES = 1.5, 4, 300


def test_samples_have_the_distribution_of_dense_steps(lossless, prompts, monkeypatch):
    """By a chi-square test, which fails where every draft is accepted."""
    prompt = prompts[3]
    lossless.draft(0)

    def weights(after: list[int]) -> dict[int, float]:
        top = lossless.ask(prompt + after, logprobs=TOP, max_tokens=1).outputs[0].logprobs[0]
        ranked = sorted(top, key=lambda token: -top[token].logprob)[:TOP]
        raw = {token: math.exp(top[token].logprob / TEMPERATURE) for token in ranked}
        return {token: weight / sum(raw.values()) for token, weight in raw.items()}

    expected = {
        (first, second): p * q
        for first, p in weights([]).items()
        for second, q in weights([first]).items()
    }

    def distance() -> float:
        changes = {"temperature": TEMPERATURE, "top_k": TOP, "n": SAMPLES, "max_tokens": 3}
        outputs = lossless.ask(prompt, **changes).outputs
        pairs = [tuple(output.token_ids[:2]) for output in outputs]
        assert set(pairs) <= set(expected)
        return sum(
            (pairs.count(pair) - SAMPLES * p) ** 2 / (SAMPLES * p) for pair, p in expected.items()
        )

    # 15 degrees of freedom: one in a thousand is above 37.7.
    lossless.draft(2)
    assert distance() < 37.7
    monkeypatch.setattr(
        "vllm.v1.sample.rejection_sampler.generate_uniform_probs",
        lambda tokens, *_, **__: torch.zeros(tokens, dtype=torch.float64),
    )
    assert distance() > 60


def test_the_engine_chooses_how_many_to_draft(lossless, prompts):
    """By acceptance: with pages at random it makes fewer drafts than with the head's."""
    length, chosen = lossless.scheduler.draft_length, {}
    vars(length).pop("choose", None)
    choose = length.choose
    for rule in ("dlm", "random"):
        lossless.set(retriever=rule)
        made = chosen.setdefault(rule, [])
        length.choose = lambda contexts, made=made: made.append(choose(contexts)) or made[-1]
        for _ in range(2):
            lossless.answer(prompts[-2], 40)
    vars(length).pop("choose")
    assert sum(chosen["dlm"]) / len(chosen["dlm"]) > sum(chosen["random"]) / len(chosen["random"])


def test_the_v2_runner_s_drafter_has_nothing_of_its_own(lossless):
    from specontext_vllm.engine.self_speculator import SelfSpeculator

    runner = lossless.runner
    drafter = SelfSpeculator(runner.vllm_config, torch.device("cpu"), None)
    drafter.load_model(runner.model)
    assert drafter.model is runner.model and not drafter.draft_attn_layer_names
    assert drafter.num_extra_query_per_req == 0
    assert drafter.draft_tokens.shape == (SHAPE["max_num_seqs"], MAX_DRAFTS)


def test_the_metrics_count_drafts_and_steps(lossless, prompts):
    def shown() -> dict[str, float]:
        return {m.name: m.value for m in lossless.llm.get_metrics() if hasattr(m, "value")}

    lossless.set(retriever="dlm")
    lossless.draft(4, 0)
    before = shown()
    lossless.answer(prompts[-1], 30)
    counted = {
        name.removeprefix(f"{PREFIX}lossless_"): value - before[name]
        for name, value in shown().items()
        if "lossless" in name
    }
    rounds = lossless.accepted
    # Every other step makes drafts for the next one; the first token is the prompt's.
    assert counted["verified_steps"] == len(rounds) > 5
    # The last step may say more than was asked for, and have fewer drafts.
    assert 29 <= counted["steps"] + sum(rounds) < 29 + 4
    assert 4 * len(rounds) - 4 < counted["drafts"] <= 4 * len(rounds)


def test_nothing_reads_what_drafts_left(lossless, dense, prompts):
    """The last test of this engine: from now on what is not to be read is poisoned."""
    seen: dict[str, Any] = {}
    lossless.set(retriever="dlm")
    lossless.draft(4, 2, 0)
    poison_stale(lossless.runner, seen)
    poison_unread(lossless.runner, seen)
    assert lossless.answer(prompts[-1], 60) == dense[0]
    assert seen["stale places"] > 0 and seen["poisoned pages"] > 0
