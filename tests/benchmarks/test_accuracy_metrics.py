"""Scores of single replies against values worked out by hand."""

import pytest

from benchmarks.accuracy import metrics


@pytest.mark.parametrize(
    ("reply", "expected"),
    [
        ("The code is 482913.", 1.0),
        ("4829130", 0.0),
        ("x482913", 0.0),
        ("482913,111111", 1.0),
        ("", 0.0),
    ],
    ids=["stated", "longer number", "part of a word", "among others", "empty"],
)
def test_any_stated(reply, expected):
    assert metrics.any_stated(reply, ("482913", "777777")) == expected


def test_share_stated():
    assert metrics.share_stated("Adam, Berlin and Cora.", ("Adam", "Cora", "Denver", "Elsa")) == 0.5


@pytest.mark.parametrize(
    ("reply", "expected"),
    [
        ("The code of Adam is 111111.\nThe code of Cora is red keys.", 1.0),
        ("Adam: 111111\nCora: green keys", 0.5),
        # The right values under the wrong names.
        ("Adam: 222222\nCora: 111111", 0.0),
        ("Adam\n111111", 0.0),
        ("Adam 5 111111", 0.0),
    ],
    ids=["sentences", "one wrong", "mixed up", "other line", "another number between"],
)
def test_pairs_listed(reply, expected):
    assert metrics.pairs_listed(reply, ("Adam 111111", "Cora red keys")) == expected


def test_recited_counts_from_the_start_and_forgives_the_heading():
    assert (
        metrics.recited("Passage Adam: one two three nine", ["one two three four five six"]) == 0.5
    )
    assert metrics.recited("two three", ["one two three four"]) == 0.0


@pytest.mark.parametrize(
    ("reply", "answers", "expected"),
    [
        ("The cat!", ["cat"], 1.0),
        # Words: {in, paris, france} and {paris}: precision 1/3, recall 1.
        ("In Paris, France", ["Paris"], 0.5),
        ("no", ["yes", "no"], 1.0),
        ("no", ["yes"], 0.0),
        # A repeated word matches as often as it is wanted: precision 1/3, recall 1/2.
        ("a b b b", ["b c"], 0.4),
    ],
    ids=["articles and signs", "half", "best answer", "wrong", "repeated"],
)
def test_qa_f1(reply, answers, expected):
    assert metrics.qa_f1(reply, answers) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("reply", "answer", "expected"),
    [
        ("a b c d", "a b c d", 1.0),
        # Common subsequence a c of {a, c, x} and {a, b, c}: precision and recall 2/3.
        ("a x c", "a b c", 2 / 3),
        # w1 w2 with the first and w1 w3 w5 with the second sentence (Lin 2004): the union has 4 of
        # 5 wanted words and of 9 given ones.
        ("w1 w2 w6 w7 w8. w1 w3 w8 w9 w5", "w1 w2 w3 w4 w5", 2 * 4 / (8 + 5)),
        ("x", "a", 0.0),
        ("", "a", 0.0),
    ],
    ids=["same", "gap", "union over sentences", "nothing", "empty"],
)
def test_rouge_l(reply, answer, expected):
    assert metrics.rouge_l(reply, [answer]) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("reply", "expected"),
    [("Type: Food", 1.0), ("Food or Sport", 0.5), ("Sport", 0.0), ("Fast Food", 0.5), ("", 0.0)],
    ids=["right", "two named", "wrong", "another holds the right one", "empty"],
)
def test_classification(reply, expected):
    assert (
        metrics.classification(reply, ["Food"], ["Food", "Sport", "Fast Food", "Foo"]) == expected
    )


def test_numbers_and_code():
    assert metrics.number_share("Paragraph 3, or 4", ["Paragraph 3"]) == 0.5
    assert metrics.number_share("none", ["3"]) == 0.0
    # Comments and fences are no code; "return x" and "return y" share 7 of 8 characters.
    assert metrics.code_similarity("# so\n```\nreturn x\nreturn z", ["return y"]) == 0.88
    assert metrics.first_line("\n\nred\nQuestion: more") == "red"
