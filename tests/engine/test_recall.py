"""Does the demo model still answer when each step reads 512 of 8,000 tokens? With controls that
show the test can fail.
"""

from __future__ import annotations

import re

import pytest
import torch

from benchmarks import forcing
from specontext_vllm.retrieval.rules import find_rule, listed_rules
from specontext_vllm.synthetic.tasks import LAYOUTS, make_problem, score
from tests.engine.conftest import DEMO_MODEL, engine
from tests.engine.overflow import beside_an_overflow, check

NEEDLES, RECITATIONS, TOKENS, BUDGET = 3, 1, 8000, 512


def ask(llm, problems) -> list[float]:
    from vllm import SamplingParams

    params = [
        SamplingParams(temperature=0, max_tokens=24 + 2 * len(p.answer.split())) for p in problems
    ]
    replies = llm.chat([p.messages for p in problems], params, use_tqdm=False)
    return [score(p, r.outputs[0].text) for p, r in zip(problems, replies)]


def compute(llm, problem) -> None:
    """Fill the prefix cache with a prompt."""
    from vllm import SamplingParams

    llm.chat(problem.messages, SamplingParams(temperature=0, max_tokens=1), use_tqdm=False)


@pytest.fixture(scope="module")
def llm():
    # Started as quest, which keeps bounds from the start (the head must then be named), and with a
    # budget that makes a GPU's page table wide enough for every retriever. Selections per layer
    # that change cannot be held by captured graphs.
    settings = {
        "budget": 12288,
        "retriever": "quest",
        "retrieval_head": str(DEMO_MODEL / "retrieval_head"),
    }
    with engine(
        attention_backend="specontext",
        additional_config={"specontext": settings},
        max_model_len=12288,
        # A prompt that is computed alone is one chunk, whose attention needs no mask.
        max_num_batched_tokens=12288,
        num_gpu_blocks_override=None,
        enforce_eager=True,
        dtype="bfloat16" if torch.cuda.is_available() else "float32",
        **forcing.engine_arguments(torch.cuda.is_available()),
    ) as running:
        yield running


@pytest.fixture(scope="module")
def results(llm):
    """Scores by retriever. All ask the same prompts and decode behind their pages in the prefix
    cache.
    """
    problems = [
        make_problem("needle", seed=500 + i, approx_tokens=TOKENS, layout=LAYOUTS[i % len(LAYOUTS)])
        for i in range(NEEDLES)
    ]
    problems += [
        make_problem("recitation", seed=600 + i, approx_tokens=TOKENS) for i in range(RECITATIONS)
    ]
    for problem in problems:
        compute(llm, problem)
    out = {}
    for retriever in listed_rules():
        llm.collective_rpc("specontext_set", kwargs={"retriever": retriever, "budget": BUDGET})
        llm.collective_rpc("specontext_stats", args=(True,))
        # On a CPU a selection in every layer takes its time: one problem less.
        asked = problems[:1] + problems[2:] if find_rule(retriever).per_layer else problems
        scores = ask(llm, asked)
        stats = llm.collective_rpc("specontext_stats")[0]
        out[retriever] = {
            **{
                kind: [s for p, s in zip(asked, scores) if p.kind == kind]
                for kind in ("needle", "recitation")
            },
            "read": stats["pages_read"] / stats["pages_total"],
        }
    return out


def mean(values):
    return sum(values) / len(values)


def test_dense_answers(results):
    assert mean(results["dense"]["needle"]) >= 0.9 and mean(results["dense"]["recitation"]) >= 0.9
    assert results["dense"]["read"] == 1.0


@pytest.mark.parametrize("kind", ["needle", "recitation"])
def test_the_retrieval_head_keeps_the_answers(results, kind):
    assert mean(results["dlm"][kind]) >= 0.95 * mean(results["dense"][kind])
    assert results["dlm"]["read"] < 0.07


@pytest.mark.parametrize("retriever", ["recent", "random"])
def test_other_pages_do_not(results, retriever):
    assert mean(results[retriever]["needle"] + results[retriever]["recitation"]) <= 0.3
    # As many pages; the shares differ a little, since longer answers are measured over longer
    # contexts.
    assert results[retriever]["read"] == pytest.approx(results["dlm"]["read"], rel=0.05)


def test_the_layers_own_attention_keeps_the_answers(results):
    assert mean(results["oracle"]["needle"] + results["oracle"]["recitation"]) >= 0.95
    assert results["oracle"]["read"] < 0.07


def test_quest_finds_more_than_chance_and_everything_with_more_pages(llm, results):
    assert mean(results["quest"]["needle"]) > mean(results["random"]["needle"])
    assert results["quest"]["read"] < 0.07
    problem = make_problem("needle", seed=800, approx_tokens=3000)
    llm.collective_rpc("specontext_set", kwargs={"retriever": "quest", "budget": 2048})
    assert ask(llm, [problem]) == [1.0]


def test_the_fallback_reads_four_budgets_where_the_head_is_not_sure(llm):
    problem = make_problem(
        "needle", seed=500, approx_tokens=TOKENS, layout=LAYOUTS[0]
    )  # its pages are in the prefix cache
    read = {}
    for threshold in (0.0, 1.0):
        settings = {
            "retriever": "dlm",
            "budget": 128,
            "recent_tokens": 32,
            "confidence_threshold": threshold,
        }
        assert settings.items() <= llm.collective_rpc("specontext_set", kwargs=settings)[0].items()
        llm.collective_rpc("specontext_stats", args=(True,))
        ask(llm, [problem])
        stats = llm.collective_rpc("specontext_stats")[0]
        read[threshold] = stats["pages_read"] / stats["decode_rows"] / 2
        assert stats["fallback_rows"] == (stats["decode_rows"] if threshold else 0)
    assert read == {0.0: 128 / 16, 1.0: 4 * 128 / 16}
    llm.collective_rpc("specontext_set", kwargs={"confidence_threshold": 0.0})


def test_forced_tokens_have_the_probabilities_of_decode_steps(llm):
    """Forcing what the model says anyway changes nothing; a retriever that misses the passage gives
    its tokens less.
    """
    from vllm import SamplingParams

    on_gpu = torch.cuda.is_available()
    messages = make_problem("recitation", seed=600, approx_tokens=TOKENS).messages
    means = {}
    llm.collective_rpc(
        "specontext_set", kwargs={"retriever": "dlm", "budget": BUDGET, "recent_tokens": 64}
    )
    free = llm.chat(
        messages,
        SamplingParams(temperature=0, max_tokens=24, ignore_eos=True, logprobs=0),
        use_tqdm=False,
    )[0].outputs[0]
    tokens = list(free.token_ids)
    for retriever in ("dlm", "recent"):
        llm.collective_rpc("specontext_set", kwargs={"retriever": retriever})
        output = llm.chat(messages, forcing.forced_params(tokens, on_gpu), use_tqdm=False)[
            0
        ].outputs[0]
        found = forcing.log_probabilities(output, tokens)
        means[retriever] = sum(found) / len(found)
        if retriever == "dlm":
            assert found == pytest.approx(
                forcing.log_probabilities(free, tokens), abs=1e-4 if not on_gpu else 0.05
            )
    assert means["recent"] < means["dlm"] - 1
    with pytest.raises(RuntimeError, match="number 3 on"):
        forcing.log_probabilities(free, [*tokens[:3], tokens[3] + 1, *tokens[4:]])


# This test and the next empty the prefix cache, which all others read.
def test_a_second_turn_behind_a_prefix_hit_answers_as_without_it(llm):
    from vllm import SamplingParams

    llm.collective_rpc("specontext_set", kwargs={"retriever": "dlm", "budget": BUDGET})
    first = make_problem("needle", seed=700, approx_tokens=3000, layout="question_last")
    facts = re.findall(r"The (?:code|number) of (\w+) is (\d{6})", first.messages[0]["content"])
    name, value = next((n, v) for n, v in facts if v != first.answer)
    params = SamplingParams(temperature=0, max_tokens=40)
    turn = llm.chat(first.messages, params, use_tqdm=False)[0]
    said = {"role": "assistant", "content": turn.outputs[0].text}
    chat = [*first.messages, said, {"role": "user", "content": f"What is the code of {name}?"}]
    warm = llm.chat(chat, params, use_tqdm=False)[0]
    llm.reset_prefix_cache()
    cold = llm.chat(chat, params, use_tqdm=False)[0]
    assert warm.num_cached_tokens > 2500 and cold.num_cached_tokens == 0
    assert warm.outputs[0].text == cold.outputs[0].text
    assert score(first, turn.outputs[0].text) == 1.0 and value in warm.outputs[0].text


@pytest.mark.parametrize(
    "retriever", [name for name in listed_rules() if find_rule(name).per_layer]
)
def test_a_request_of_nan_changes_no_other(llm, prompts, retriever):
    llm.collective_rpc("specontext_set", kwargs={"retriever": retriever, "budget": 160})
    check(beside_an_overflow(llm, prompts[4:7]))
