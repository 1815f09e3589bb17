"""Figures in README.md and docs/ are those of the committed result files; and how markers are
filled.
"""

import json
import re

import pytest
from PIL import Image
from typer.testing import CliRunner

from benchmarks import figures, picture
from benchmarks.__main__ import app

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
    filler = figures.Filler(path, results, **({"redraw": False} | arguments))
    return filler.fill(), filler.differences


def test_the_documents_say_what_the_result_files_say():
    done = CliRunner().invoke(app, ["figures", "--check"])
    assert done.exit_code == 0, done.output
    # README's three tables, its picture and its sentences; those of docs/.
    assert int(done.output.split()[-4]) >= 60


@pytest.mark.parametrize("path", figures.documents(figures.ROOT), ids=lambda path: path.name)
def test_a_difference_planted_in_any_figure_is_found(path, tmp_path):
    """The last digit of every marked figure, and of every line of a table, is made another one."""

    def spoil(found):
        kind, body = found[1], found[4]
        if kind == "picture":
            return found[0]
        heading = (
            3 if kind == "table" else 0
        )  # a line break and two lines, which are written by hand
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
    text = figures.MARKERS.sub(spoil, path.read_text())
    (tmp_path / path.name).write_text(text)
    filler = figures.Filler(tmp_path / path.name, figures.RESULTS, redraw=False)
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
    assert figures.evaluate(expression, RESULT) == pytest.approx(value)


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
    with pytest.raises(figures.FigureError):
        figures.evaluate(expression, RESULT)


def test_a_changed_figure_is_told_with_its_line_and_filled(tmp_path, results):
    text = (
        'One.\nIt is <!-- fig decode-x row("2 x 2k").ratio .2f -->4.62<!-- /fig -->x, and '
        "<!-- fig decode-x rows[0].ratio .2f -->0.98<!-- /fig -->x.\n"
    )
    filled, (difference,) = fill(tmp_path, results, text)
    assert filled == text.replace("4.62", "4.26")
    assert str(difference) == f"{tmp_path}/README.md:2: found '4.62', the result file says '4.26'"


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
    assert figures.evaluate(expression, GRID) == value


@pytest.mark.parametrize(
    ("expression", "told"),
    [
        ('row("dlm 64").recited', "'dlm 64'.: 2 rows"),
        ("row(context=8192, budget=64).recited", "context=8192, budget=64.: 2 rows"),
        ('row("dlm 64", context=16384).recited', "0 rows"),
    ],
)
def test_a_row_that_is_not_the_only_one_is_refused(expression, told):
    with pytest.raises(figures.FigureError, match=told):
        figures.evaluate(expression, GRID)


def test_a_figure_of_another_context_is_told(tmp_path, results):
    """What stood for 4k was typed for 8k: right numbers in the wrong place."""
    text = 'It falls to <!-- fig grid-x row("dlm 64", context=8192).recited .2f -->0.45<!-- /fig -->.\n'
    filled, (difference,) = fill(tmp_path, results, text)
    assert "-->0.41<!--" in filled and "found '0.45'" in str(difference)
    assert figures.evaluate("machine.gpus[0].name", RESULT) == "NVIDIA H200"


def test_a_table_is_filtered_by_name_and_context(tmp_path, results):
    marker = '<!-- table grid-x "name=dlm 64|dense" context=8192 name recited:.2f -->\n| what | recited |\n|---|---|\n'
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
        ("a <!-- fig decode-y rows[0].ratio .2f -->1<!-- /fig -->", "decode-y.json"),
        ("a <!-- fig decode-x rows[0].cell .2f -->1<!-- /fig -->", "format"),
        ("<!-- fig decode-x rows[0].ratio .2f -->1<!-- /fig -->", "begin with a marker"),
        ("<!-- table decode-x cell -->\n<!-- /table -->", "heading"),
        ('<!-- table decode-x "cell -->\n| a |\n|---|\n<!-- /table -->', "quotes"),
        ("a <!-- fig decode-x rows[0].ratio .2f -->1", "its own end"),
        ("a <!-- fig decode-x rows[0].ratio .2f -->1<!-- /table -->", "its own end"),
    ],
    ids=[
        "no result",
        "no number",
        "begins a line",
        "no heading",
        "open quotes",
        "no end",
        "another's end",
    ],
)
def test_a_marker_that_cannot_be_filled_is_named(tmp_path, results, text, told):
    with pytest.raises(figures.FigureError, match=told) as raised:
        fill(tmp_path, results, "\n" + text)
    assert "README.md" in str(raised.value)


def test_panels_are_numbers_of_requests_with_several_contexts():
    def row(cell, **times):
        return {"cell": cell} | times

    rows = [
        row("24 x 2k", sparse=2.0),
        row("24 x 1k", stock=1.0),
        row("6 x 1k", hf_eager=9.0),
        row("6 x 2k", hf_eager="out of memory"),
    ]
    ((title, group),) = picture.panels_of(rows)
    assert title == "24 requests" and [(r["requests"], r["context"]) for r in group] == [
        (24, 1024),
        (24, 2048),
    ]
    ((title, group),) = picture.panels_of(rows[1:])
    assert title == "" and [r["cell"] for r in group] == ["24 x 1k", "6 x 1k"]


def test_a_picture_shows_every_engine_that_was_timed(tmp_path):
    times = {key: 2.0 + place for place, key in enumerate(picture.STYLES)}
    rows = [
        {"cell": f"2 x {n}k", "stock_limit": 1.5, "sparse_limit": 1.0, **times} for n in (1, 32)
    ]
    rows.append(
        {
            "cell": "2 x 128k",
            "stock_limit": 1.6,
            "sparse_limit": 1.1,
            **times,
            "hf_eager": "out of memory",
        }
    )
    picture.draw_steps(rows, "T", tmp_path / "a.png", {"Source": "here"})
    with Image.open(tmp_path / "a.png") as drawn:
        assert drawn.info["Source"] == "here" and drawn.width > drawn.height > 300
        colours = {colour for _, colour in drawn.convert("RGB").getcolors(1 << 24)}
    assert {tuple(bytes.fromhex(colour[1:])) for _, colour, _ in picture.STYLES.values()} <= colours
