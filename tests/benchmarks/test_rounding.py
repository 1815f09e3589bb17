"""What the case makes of the engines' answers."""

import pytest

from benchmarks.rounding.answers import Answer, engine_row, parting


def answer(tokens, prompt=(-1.0, -2.0), forced=(-3.0,)):
    near = [{5: -0.5, 6: -0.52, 2: -0.6, 9: -4.0} for _ in tokens]
    return Answer(list(tokens), near, list(prompt), list(forced))


def test_a_parting_is_the_first_token_that_differs_and_how_near_stock_had_the_two():
    assert parting(answer([5, 6]), answer([5, 6]), None) is None
    assert parting(answer([5, 5, 2]), answer([5, 6, 9]), None) == pytest.approx(0.02)
    # A token that is not among the likeliest is at least as far as the last of them.
    assert parting(answer([5]), answer([7]), None) == pytest.approx(3.5)


def test_what_comes_behind_an_answers_end_does_not_count():
    assert parting(answer([5, 2, 5]), answer([5, 2, 6]), 2) is None
    assert parting(answer([5, 2, 5]), answer([5, 6, 5]), 2) == pytest.approx(-0.08)


def test_a_row_counts_answers_and_texts_apart():
    stock = [answer([5, 5, 2, 5]), answer([5, 2, 5, 5]), answer([5, 2, 5, 5])]
    other = [
        answer([5, 6, 2, 5]),
        answer([5, 2, 6, 5]),
        answer([5, 2, 6, 5], prompt=(-1.5, -2.0), forced=(-3.3,)),
    ]
    exactly = [([-1.0, -2.0], [-3.0])] * 3
    row = engine_row("other", "bfloat16", other, stock, exactly, [2, 2, None])
    assert (row["answers"], row["texts"], row["prompts"]) == (1, 1, "2, 1")
    assert row["prompt_rms"] == pytest.approx((0.25 / 6) ** 0.5) and row[
        "decode_rms"
    ] == pytest.approx(0.3 / 3**0.5)
    own = engine_row("stock", "bfloat16", stock, stock, exactly, [2, 2, None])
    assert own["answers"] is None and own["texts"] is None and own["prompt_rms"] == 0
