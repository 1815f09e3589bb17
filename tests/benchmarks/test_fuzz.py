"""The case `fuzz`: mixes hang on their seed alone, and whatever differs is found. Engines are not
started.
"""

from __future__ import annotations

from dataclasses import replace

import pytest

from benchmarks.fuzz.engines import Answer
from benchmarks.fuzz.mixes import MAX_MODEL_LEN, Mix, Request
from benchmarks.fuzz.verdicts import compare

BASES = [list(range(100 + i, 700 + i)) for i in range(4)]
GREEDY, SAMPLED = (
    {"temperature": 0.0, "max_tokens": 3, "logprobs": 1},
    {"temperature": 1.0, "seed": 1, "max_tokens": 3},
)


def answer(tokens=(7, 8, 9), gap=2.0, end=("length", None), prompt=()) -> Answer:
    return Answer(
        list(tokens), [{token: -0.1, 99: -0.1 - gap} for token in tokens], list(prompt), end
    )


def verdict(
    ours: Answer, theirs: Answer, params=GREEDY, leaves_after=None, near_tie: float | None = 1e-4
):
    mix = Mix((Request((1, 2), 0, leaves_after, params),), 64, True, True, 3)
    return compare("seed", mix, [{0: ours}], [{0: theirs}], near_tie).counts


def test_a_seed_is_a_mix():
    assert (
        Mix.draw("1/0", BASES, False)
        == Mix.draw("1/0", BASES, False)
        != Mix.draw("1/1", BASES, False)
    )
    mixes = [Mix.draw(f"1/{i}", BASES, False) for i in range(60)]
    requests = [request for mix in mixes for request in mix.requests]
    assert all(
        1 <= len(request.prompt)
        and len(request.prompt) + request.params["max_tokens"] <= MAX_MODEL_LEN
        for request in requests
    )
    for what in ("seed", "n", "logprobs", "prompt_logprobs", "stop_token_ids", "top_p"):
        assert any(what in request.params for request in requests), what
    assert (
        {mix.chunked for mix in mixes}
        == {mix.cold for mix in mixes}
        == {mix.storm == 3 for mix in mixes}
        == {True, False}
    )
    assert not any(
        "seed" in request.params for mix in mixes if mix.chunked for request in mix.requests
    )
    assert not any(
        "seed" in request.params
        for i in range(60)
        for request in Mix.draw(f"1/{i}", BASES, True).requests
    )


@pytest.mark.parametrize("near_tie", [1e-4, None], ids=["rounding", "bits"])
def test_the_same_answers_are_right(near_tie):
    assert verdict(
        answer(prompt=[None, {2: -1.0}]), answer(prompt=[None, {2: -1.0}]), near_tie=near_tie
    ) == {"requests": 1, "tokens": 3}


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        (answer((7, 8, 6)), answer()),
        (answer((7, 8)), answer()),
        (answer(end=("stop", 9)), answer()),
        (answer(prompt=[None, {2: -1.5}]), answer(prompt=[None, {2: -1.0}])),
        (answer(gap=2.5), answer()),
    ],
    ids=["token", "length", "end", "prompt", "log-probability"],
)
def test_what_differs_is_wrong(ours, theirs):
    assert verdict(ours, theirs)["wrong"] == verdict(ours, theirs, near_tie=None)["wrong"] == 1


def test_a_greedy_token_may_be_another_at_a_near_tie_only_and_a_sampled_one_never():
    ours, tie = answer((7, 8, 6)), answer()
    tie.logprobs[2] = {9: -0.69, 6: -0.69001}
    assert verdict(ours, tie)["near ties"] == 1 and "wrong" not in verdict(ours, tie)
    assert verdict(ours, tie, SAMPLED)["wrong"] == 1
    assert verdict(ours, tie, near_tie=None)["wrong"] == 1


def test_an_aborted_answer_is_compared_as_far_as_both_came():
    cut = answer((7, 8), end=None)
    assert "wrong" not in verdict(cut, answer((7,), end=None), leaves_after=1)
    assert (
        verdict(replace(cut, tokens=[6, 8]), answer((7,), end=None), leaves_after=1)["wrong"] == 1
    )
    # Two tiers go the way of one, step by step.
    assert verdict(cut, answer((7,), end=None), leaves_after=1, near_tie=None)["wrong"] == 1


def test_a_completion_that_is_missing_is_wrong():
    mix = Mix((Request((1, 2), 0, None, {**SAMPLED, "n": 2}),), 64, True, True, 3)
    assert (
        compare("seed", mix, [{0: answer()}], [{0: answer(), 1: answer()}], 1e-4).counts["wrong"]
        == 1
    )
