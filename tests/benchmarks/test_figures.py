"""Figures in README.md and docs/ are those of the committed result files; and how markers are filled."""

import json

import pytest
from PIL import Image
from typer.testing import CliRunner

from benchmarks import figures, picture
from benchmarks.__main__ import app

RESULT = {
    "case": "decode", "title": "T", "date": "2026-01-01",
    "rows": [
        {"cell": "1 x 1k", "stock": 4.9, "sparse": 5.0, "ratio": 0.98},
        {"cell": "2 x 2k", "stock": 31.37, "sparse": 7.37, "ratio": 4.2598, "pages": None},
    ],
    "details": {"bandwidth": 4.287e12, "steady": {"a, b": [0.5, 0.25]}},
}  # fmt: skip


@pytest.fixture
def results(tmp_path):
    folder = tmp_path / "results"
    folder.mkdir()
    (folder / "decode-x.json").write_text(json.dumps(RESULT))
    return folder


def fill(tmp_path, results, text, **arguments):
    path = tmp_path / "README.md"
    path.write_text(text)
    filler = figures.Filler(path, results, **({"redraw": False} | arguments))
    return filler.fill(), filler.differences


def test_the_documents_say_what_the_result_files_say():
    done = CliRunner().invoke(app, ["figures", "--check"])
    assert done.exit_code == 0, done.output
    # README's three tables, its picture and two sentences; those of docs/.
    assert int(done.output.split()[-4]) >= 12


@pytest.mark.parametrize(
    ("expression", "value"),
    [
        ('row("2 x 2k").ratio', 4.2598),
        ("rows[1].stock - rows[1].sparse", 24.0),
        ("100 - 100 * rows[0].ratio", 2.0),
        ("details.bandwidth / 1e12", 4.287),
        ('details.steady["a, b"][1]', 0.25),
    ],
)
def test_an_expression(expression, value):
    assert figures.evaluate(expression, RESULT) == pytest.approx(value)


@pytest.mark.parametrize(
    "expression",
    ['row("3 x 3k").ratio', "rows[9].ratio", "rows[0].nothing", "open('/etc/passwd')", "rows.__class__", "1 +", "title", "-rows[0]"],
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


def test_a_table_keeps_its_heading_and_gets_the_rows(tmp_path, results):
    marker = "<!-- table decode-x cell stock:.1f pages:.1% -->\n| what | ms | pages |\n|---|---|---|\n"
    filled, differences = fill(tmp_path, results, marker + "| 1 x 1k | 4.8 | – |\n<!-- /table -->\n")
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
        ("a <!-- fig decode-x rows[0].ratio .2f -->1", "its own end"),
        ("a <!-- fig decode-x rows[0].ratio .2f -->1<!-- /table -->", "its own end"),
    ],
    ids=["no result", "no number", "begins a line", "no heading", "no end", "another's end"],
)
def test_a_marker_that_cannot_be_filled_is_named(tmp_path, results, text, told):
    with pytest.raises(figures.FigureError, match=told) as raised:
        fill(tmp_path, results, "\n" + text)
    assert "README.md" in str(raised.value)


def test_panels_are_numbers_of_requests_with_several_contexts():
    def row(cell, **times):
        return {"cell": cell} | times

    rows = [row("24 x 2k", sparse=2.0), row("24 x 1k", stock=1.0), row("6 x 1k", hf_eager=9.0), row("6 x 2k", hf_eager="out of memory")]
    ((title, group),) = picture.panels_of(rows)
    assert title == "24 requests" and [(r["requests"], r["context"]) for r in group] == [(24, 1024), (24, 2048)]
    ((title, group),) = picture.panels_of(rows[1:])
    assert title == "" and [r["cell"] for r in group] == ["24 x 1k", "6 x 1k"]


def test_a_picture_shows_every_engine_that_was_timed(tmp_path):
    times = {key: 2.0 + place for place, key in enumerate(picture.STYLES)}
    rows = [{"cell": f"2 x {n}k", "stock_limit": 1.5, "sparse_limit": 1.0, **times} for n in (1, 32)]
    rows.append({"cell": "2 x 128k", "stock_limit": 1.6, "sparse_limit": 1.1, **times, "hf_eager": "out of memory"})
    picture.draw_steps(rows, "T", tmp_path / "a.png", {"Source": "here"})
    with Image.open(tmp_path / "a.png") as drawn:
        assert drawn.info["Source"] == "here" and drawn.width > drawn.height > 300
        colours = {colour for _, colour in drawn.convert("RGB").getcolors(1 << 24)}
    assert {tuple(bytes.fromhex(colour[1:])) for _, colour, _ in picture.STYLES.values()} <= colours
