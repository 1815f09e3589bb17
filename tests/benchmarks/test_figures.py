"""Figures in README.md and docs/ are those of the committed result files; and how markers are
filled.
"""

import json
import re

import pytest
from typer.testing import CliRunner

from benchmarks.__main__ import app
from benchmarks.figures.command import ROOT, SENTENCES, documents
from benchmarks.figures.expressions import FigureError, evaluate
from benchmarks.figures.markers import MARKERS, Filler
from benchmarks.figures.prose import Sentence, fill_sentence, read_sentences
from benchmarks.report import RESULTS

RESULT = {
    "case": "decode",
    "title": "T",
    "date": "2026-01-01",
    "rows": [
        {"cell": "1 x 1k", "stock": 4.9, "sparse": 5.0, "ratio": 0.98},
        {"cell": "2 x 2k", "stock": 31.37, "sparse": 7.37, "ratio": 4.2598, "pages": None},
    ],
    "details": {
        "bandwidth": 4.287e12,
        "steady": {"a, b": [0.5, 0.25]},
        "timeline": {
            "e": [["_a_kernel", 7, 0.0, 1.5], ["_b", 7, 2.0, 4.0], ["_a_kernel", 8, 9.0, 2.0]]
        },
    },
    "machine": {"gpus": [{"name": "NVIDIA H200"}]},
}
GRID = {
    "rows": [
        {"name": "dlm 64", "context": 4096, "budget": 64, "threshold": 0.0, "recited": 0.45},
        {"name": "dlm 64", "context": 8192, "budget": 64, "threshold": 0.0, "recited": 0.41},
        {"name": "dense", "context": 8192, "budget": None, "threshold": 0.0, "recited": 1.0},
        {"fallback_name": "dlm", "context": 8192, "budget": 64, "threshold": 0.3, "recited": 0.65},
    ],
}


@pytest.fixture
def results(tmp_path):
    folder = tmp_path / "results"
    folder.mkdir()
    (folder / "decode-x.json").write_text(json.dumps(RESULT))
    (folder / "grid-x.json").write_text(json.dumps(GRID))
    return folder


def fill(tmp_path, results, text, **arguments):
    path = tmp_path / "README.md"
    path.write_text(text)
    filler = Filler(path, results, **({"redraw": False} | arguments))
    return filler.fill(), filler.differences


def test_the_documents_say_what_the_result_files_say():
    done = CliRunner().invoke(app, ["figures", "--check"])
    assert done.exit_code == 0, done.output
    # README's table and picture, the tables of docs/, and the sentences of both.
    assert int(done.output.splitlines()[-1].split()[0]) >= 60


@pytest.mark.parametrize("path", documents(ROOT), ids=lambda path: path.name)
def test_no_comment_stands_in_a_sentence(path):
    for line in path.read_text().splitlines():
        assert "<!--" not in line or re.fullmatch(r"<!-- .* -->", line), line


@pytest.mark.parametrize("path", documents(ROOT), ids=lambda path: path.name)
def test_a_difference_planted_in_any_table_is_found(path, tmp_path):
    """The last digit of every line of a table is made another one."""

    def spoil(found):
        kind, body = found[1], found[4]
        if kind == "picture":
            return found[0]
        heading = 3  # a line break and two lines, which are written by hand
        lines = body.split("\n")
        rows = [
            re.sub(r"\d(?=\D*$)", lambda digit: str((int(digit[0]) + 1) % 10), line)
            for line in lines[heading:]
        ]
        wrong = "\n".join([*lines[:heading], *rows])
        assert wrong != body, f"{body} has no digit"
        planted.append(body)
        begin, end = (place - found.start() for place in found.span(4))
        return found[0][:begin] + wrong + found[0][end:]

    planted = []
    text = MARKERS.sub(spoil, path.read_text())
    (tmp_path / path.name).write_text(text)
    filler = Filler(tmp_path / path.name, RESULTS, redraw=False)
    assert filler.fill() == path.read_text()
    pictures = text.count("<!-- picture ")  # there are none beside this copy, which is a difference
    assert len(filler.differences) == len(planted) + pictures


@pytest.mark.parametrize(
    ("expression", "value"),
    [
        ('row("2 x 2k").ratio', 4.2598),
        ("rows[1].stock - rows[1].sparse", 24.0),
        ("100 - 100 * rows[0].ratio", 2.0),
        ("details.bandwidth / 1e12", 4.287),
        ('details.steady["a, b"][1]', 0.25),
        ('above(details.steady["a, b"], 0.3) + 10 * len(details.steady["a, b"])', 21),
        ('row("2 x 2k", stock=31.37).sparse', 7.37),
        ('kernel("e", "_a_")', 3.5),
    ],
)
def test_an_expression(expression, value):
    assert evaluate(expression, RESULT) == pytest.approx(value)


@pytest.mark.parametrize(
    "expression",
    [
        'row("3 x 3k").ratio',
        "rows[9].ratio",
        "rows[0].nothing",
        "open('/etc/passwd')",
        "rows.__class__",
        "1 +",
        "title",
        "-rows[0]",
        "row().ratio",
        "row(ratio=5).stock",
        "row(nothing=5).stock",
        "open(rows, 3)",
        'kernel("f", "_a_")',
    ],
)
def test_any_other_expression_is_refused(expression):
    with pytest.raises(FigureError):
        evaluate(expression, RESULT)


@pytest.mark.parametrize(
    ("expression", "value"),
    [
        ('row("dlm 64", context=8192).recited', 0.41),
        ('row("dlm 64", context=4096, budget=64).recited', 0.45),
        ("row(budget=64, context=8192, threshold=0.3).recited", 0.65),
        ('row("dense").recited', 1.0),
    ],
)
def test_a_row_by_name_context_and_budget(expression, value):
    assert evaluate(expression, GRID) == value


@pytest.mark.parametrize(
    ("expression", "told"),
    [
        ('row("dlm 64").recited', "'dlm 64'.: 2 rows"),
        ("row(context=8192, budget=64).recited", "context=8192, budget=64.: 2 rows"),
        ('row("dlm 64", context=16384).recited', "0 rows"),
    ],
)
def test_a_row_that_is_not_the_only_one_is_refused(expression, told):
    with pytest.raises(FigureError, match=told):
        evaluate(expression, GRID)


def test_a_table_is_filtered_by_name_and_context(tmp_path, results):
    marker = (
        '<!-- table grid-x "name=dlm 64|dense" context=8192 name recited:.2f -->\n'
        "| what | recited |\n|---|---|\n"
    )
    filled, _ = fill(tmp_path, results, marker + "<!-- /table -->\n")
    assert filled == marker + "| dlm 64 | 0.41 |\n| dense | 1.00 |\n<!-- /table -->\n"


def test_a_table_keeps_its_heading_and_gets_the_rows(tmp_path, results):
    marker = (
        "<!-- table decode-x cell stock:.1f pages:.1% -->\n| what | ms | pages |\n|---|---|---|\n"
    )
    filled, differences = fill(
        tmp_path, results, marker + "| 1 x 1k | 4.8 | – |\n<!-- /table -->\n"
    )
    assert filled == marker + "| 1 x 1k | 4.9 | – |\n| 2 x 2k | 31.4 | – |\n<!-- /table -->\n"
    assert len(differences) == 1
    assert fill(tmp_path, results, filled) == (filled, [])


def test_a_picture_is_redrawn_when_its_result_has_changed(tmp_path, results):
    text = "<!-- picture decode-x -->\n![Steps](steps.png)\n<!-- /picture -->\n"
    assert len(fill(tmp_path, results, text)[1]) == 1  # none yet
    assert not (tmp_path / "steps.png").exists()
    assert len(fill(tmp_path, results, text, redraw=True)[1]) == 1
    assert fill(tmp_path, results, text) == (text, [])
    changed = RESULT | {"rows": [row | {"sparse": 1.0} for row in RESULT["rows"]]}
    (results / "decode-x.json").write_text(json.dumps(changed))
    assert len(fill(tmp_path, results, text)[1]) == 1


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("<!-- table decode-y cell -->\n| a |\n|---|\n<!-- /table -->", "decode-y.json"),
        ("<!-- table decode-x cell -->\n<!-- /table -->", "heading"),
        ("See <!-- table decode-x cell -->\n| a |\n|---|\n<!-- /table -->", "of their own"),
        ('<!-- table decode-x "cell -->\n| a |\n|---|\n<!-- /table -->', "quotes"),
        ("<!-- table decode-x cell -->\n| a |\n|---|\n", "its own end"),
        ("<!-- table decode-x cell -->\n| a |\n|---|\n<!-- /picture -->", "its own end"),
    ],
    ids=[
        "no result",
        "no heading",
        "in a line",
        "open quotes",
        "no end",
        "another's end",
    ],
)
def test_a_marker_that_cannot_be_filled_is_named(tmp_path, results, text, told):
    with pytest.raises(FigureError, match=told) as raised:
        fill(tmp_path, results, "\n" + text)
    assert "README.md" in str(raised.value)


WORDS = "it is {} times faster, at 1k {} times"
VALUES = ('row("2 x 2k").ratio .2f', "rows[0].ratio .2f")


def sentence(text=WORDS, values=VALUES, result="decode-x"):
    return Sentence("README.md", text, result, values)


def check(tmp_path, results, text, asked):
    return fill_sentence(asked, text, tmp_path / "README.md", results)


def test_a_sentence_with_its_figures_is_left_as_it_is(tmp_path, results):
    text = "At 2k it is\n4.26 times faster, at 1k 0.98\ntimes.\n"
    assert check(tmp_path, results, text, sentence()) == (text, [])


def test_a_changed_figure_of_a_sentence_is_told_with_its_line_and_filled(tmp_path, results):
    text = "At 2k it is\n4.62 times faster, at 1k\n0.97 times.\n"
    filled, differences = check(tmp_path, results, text, sentence())
    assert filled == "At 2k it is\n4.26 times faster, at 1k\n0.98 times.\n"
    assert list(map(str, differences)) == [
        f"{tmp_path}/README.md:2: found '4.62', the result file says '4.26'",
        f"{tmp_path}/README.md:3: found '0.97', the result file says '0.98'",
    ]


def test_a_figure_of_another_context_is_told(tmp_path, results):
    """What stood for 4k was typed for 8k: right numbers in the wrong place."""
    asked = sentence("falls to {} at 8k", ('row("dlm 64", context=8192).recited .2f',), "grid-x")
    filled, (difference,) = check(tmp_path, results, "It falls to 0.45 at 8k.", asked)
    assert filled == "It falls to 0.41 at 8k." and "found '0.45'" in str(difference)


def test_a_figure_may_be_a_name_or_an_interval(tmp_path, results):
    asked = sentence("on an {}, by", ("machine.gpus[0].name s",))
    assert check(tmp_path, results, "on an NVIDIA H200, by", asked)[1] == []
    (difference,) = check(tmp_path, results, "on an -1 to +1, by", asked)[1]
    assert difference.found == "-1 to +1"


@pytest.mark.parametrize(
    ("text", "asked", "told"),
    [
        ("Nothing.", sentence(), "occur 0 times"),
        ("is 4.26 times, is 4.26 times", sentence("is {} times", VALUES[:1]), "occur 2 times"),
        ("is 1 times, is 2 times", sentence("is {} times", VALUES[:1]), "occur 2 times"),
        ("it is 4.26", sentence("it is {}", VALUES[:1]), "words on both sides"),
        ("it is 4.26 x", sentence("it is {} x"), "1 times {} and 2 values"),
        ("it is 4.26 x", sentence("it is {} x", ("rows[0].cell .2f",)), "no format"),
        ("it is 4.26 x", sentence("it is {} x", VALUES[:1], "decode-y"), "decode-y.json"),
    ],
    ids=["absent", "twice", "twice, wrong", "ends it", "values", "format", "no result"],
)
def test_a_sentence_that_cannot_be_checked_is_named(tmp_path, results, text, asked, told):
    with pytest.raises(FigureError, match=re.escape(told)) as raised:
        check(tmp_path, results, text, asked)
    assert "README.md" in str(raised.value)


def test_a_wrong_list_of_sentences_is_named(tmp_path):
    path = tmp_path / "figures.toml"
    assert read_sentences(path) == []
    path.write_text('[["README.md"]]\ntext = "is {} x"\n')
    with pytest.raises(FigureError, match="figures.toml: KeyError: 'result'"):
        read_sentences(path)


@pytest.mark.parametrize(
    "asked", read_sentences(SENTENCES), ids=lambda asked: f"{asked.document}: {asked.text[:40]}"
)
def test_a_difference_planted_in_any_sentence_is_found(asked):
    path = ROOT / asked.document
    text = path.read_text()
    (place,) = asked.pattern(asked.figures(RESULTS)).finditer(text)
    for group in range(1, len(asked.values) + 1):
        begin, end = place.span(group)
        wrong = re.sub(r"\d(?=\D*$)", lambda digit: str((int(digit[0]) + 1) % 10), text[begin:end])
        spoilt = text[:begin] + wrong + text[end:]
        filled, differences = fill_sentence(asked, spoilt, path, RESULTS)
        assert filled == text and len(differences) == 1
