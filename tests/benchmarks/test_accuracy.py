"""The grid: its cells survive a stop and are never mixed, its figures, table, CSV and pictures;
engines are not started.
"""

import csv
import math
from dataclasses import replace

import pytest
from typer.testing import CliRunner

from benchmarks import report
from benchmarks.__main__ import app
from benchmarks.accuracy import plots, summary
from benchmarks.accuracy.cells import DENSE, Cell, CellError, CellStore, Group, Setting
from benchmarks.accuracy.grid import Grid
from benchmarks.accuracy.run import Run
from benchmarks.accuracy.tasks import TASKS
from benchmarks.accuracy.writer import Example
from benchmarks.shapes import DEMO_MODEL
from specontext_vllm.config import ConfigError

SETTINGS = {"model": "demo", "dtype": "float32"}
STATS = {
    "pages_read": 10,
    "pages_total": 100,
    "decode_rows": 40,
    "fallback_rows": 10,
    "kept_mass_mean": 0.3,
}


def result(scores, **fields):
    return {
        "scores": scores,
        "replies": [""] * len(scores),
        "tokens": 100,
        "seconds": 2.0,
        "cached": 0.99,
        "stats": STATS,
        **fields,
    }


def group(task="single", context=4096, reply_tokens=9):
    return Group(task, context, [Example([1, 2, 3], ("x",), reply_tokens)] * 4)


def make_run(folder, groups=None, thresholds=(), tasks=("single", "variables"), contexts=(4096,)):
    asked = Grid(
        model=folder / "demo",
        head="head",
        tasks={name: TASKS[name] for name in tasks},
        retrievers=["dlm", DENSE],
        budgets=[64, 256],
        contexts=list(contexts),
        prompts=4,
        thresholds=list(thresholds),
        threshold_budget=64,
    )
    groups = groups or [group(name, context) for context in contexts for name in tasks]
    return Run(
        asked,
        groups,
        CellStore(folder / "work", SETTINGS),
        report.Report("accuracy", "A title", {}),
        folder / "out",
    )


def test_a_setting_keeps_pages_to_choose():
    assert Setting("dlm", 64).changes() == {
        "retriever": "dlm",
        "confidence_threshold": 0.0,
        "budget": 64,
        "recent_tokens": 16,
    }
    assert Setting("dlm", 112).recent_tokens == Setting("dlm", 512).recent_tokens == 64
    assert Setting("dlm", 512, recents=16).changes()["recent_tokens"] == 16
    assert Setting(DENSE).changes() == {"retriever": DENSE, "confidence_threshold": 0.0}
    with pytest.raises(ConfigError, match="budget"):
        Setting("dlm", 32).changes()


def test_a_run_goes_on_where_it_stopped(tmp_path):
    run = make_run(tmp_path)
    first, second = run.groups
    assert [(g.task, len(settings)) for g, settings in run.missing()] == [
        ("single", 3),
        ("variables", 3),
    ]
    run.add(first, Setting(DENSE), result([1.0] * 4))
    run.add(first, Setting("dlm", 256), result([1.0, 1.0, 1.0, 0.0]))
    # What a killed writer leaves behind is no cell.
    (tmp_path / "work" / "single-4096-dlm-64.partial").write_text('{"dig')
    again = make_run(tmp_path)
    assert [(g.task, settings) for g, settings in again.missing()] == [
        ("single", [Setting("dlm", 64)]),
        ("variables", [Setting(DENSE), Setting("dlm", 64), Setting("dlm", 256)]),
    ]
    assert list(again.ordered().values()) == [
        again.cells[first.cell(s)] for s in (Setting(DENSE), Setting("dlm", 256))
    ]


def test_recent_tokens_are_tried_where_they_leave_a_page_to_choose(tmp_path):
    grid = replace(make_run(tmp_path).grid, recents=[16, 32])
    assert grid.settings(4096) == [
        Setting(DENSE),
        Setting("dlm", 64, recents=16),
        Setting("dlm", 256, recents=16),
        Setting("dlm", 256, recents=32),
    ]
    options = ["accuracy", "--model", str(DEMO_MODEL), "--retrievers", "dlm", "--thresholds", "0"]
    for given, sentence in {
        "0": "recent_tokens: found 0",
        "16,64": "--recent-tokens: found 64, but no budget of 64 leaves a page to choose beside "
        "them; give a budget of 112, or fewer",
    }.items():
        asked = [*options, "--budgets", "64", "--recent-tokens", given, "--work", str(tmp_path)]
        done = CliRunner().invoke(app, asked)
        assert done.exit_code == 2 and sentence in done.output


def test_where_dense_fails_the_rest_and_longer_contexts_are_left_out(tmp_path):
    run = make_run(tmp_path, contexts=(4096, 8192))
    assert len(run.missing()) == 4
    run.add(run.groups[1], Setting(DENSE), result([0.0, 0.25, 0.0, 0.25]))
    assert [(g.task, g.context) for g, _ in run.missing()] == [("single", 4096), ("single", 8192)]


def test_cells_of_other_settings_or_prompts_are_refused(tmp_path, monkeypatch):
    run = make_run(tmp_path)
    run.add(run.groups[0], Setting(DENSE), result([1.0] * 4))
    with pytest.raises(CellError, match="another dtype .'float32', now 'bfloat16'"):
        CellStore(tmp_path / "work", {**SETTINGS, "dtype": "bfloat16"})
    with pytest.raises(CellError, match="other prompts"):
        make_run(tmp_path, groups=[group(reply_tokens=10)])
    monkeypatch.setattr(
        Setting, "changes", lambda self: {"retriever": self.retriever, "recent_tokens": 32}
    )
    with pytest.raises(CellError, match="other settings"):
        make_run(tmp_path)


def test_figures():
    cell = Cell("multi_key", 4096, Setting("dlm", 64, 0.2))
    line = summary.figures(
        cell, TASKS["multi_key"], result([1.0, 1.0, 0.0, 0.0]), result([1.0] * 4)
    )
    assert (line["value"], line["of_dense"], line["pages_read"], line["fallback_share"]) == (
        0.5,
        0.5,
        0.1,
        0.25,
    )
    # Wilson, 2 of 4.
    assert (line["low"], line["high"]) == pytest.approx((0.150, 0.850), abs=1e-3)
    assert line["says_nothing"] is False
    assert (
        summary.figures(cell, TASKS["multi_key"], result([0.0] * 4, cached=0.5), result([0.0] * 4))[
            "seconds"
        ]
        is None
    )
    perplexity = summary.figures(
        Cell("perplexity", 4096, Setting(DENSE)),
        TASKS["perplexity"],
        result([0.0, math.log(4)]),
        None,
    )
    assert perplexity["value"] == pytest.approx(2.0) and (
        perplexity["low"],
        perplexity["high"],
    ) == pytest.approx((1.0, 4.0))


def test_perplexity_is_that_of_the_forced_tokens():
    forced = Example([1], ("x",), 3, [5, 6, 7])
    assert summary.score(
        TASKS["perplexity"], forced, [math.log(0.5), math.log(0.125)]
    ) == pytest.approx(math.log(4))


def test_table_csv_and_pictures(tmp_path):
    run = make_run(
        tmp_path, thresholds=[0.2, 0.4], tasks=("single", "recitation", "perplexity", "variables")
    )
    for number, g in enumerate(run.groups):
        failed = g.task == "variables"
        for setting in run.grid.settings(g.context)[: 1 if failed else None]:
            run.add(
                g, setting, result([0.0] * 4 if failed else [1.0, 1.0, 0.5 * (number > 0), 0.0])
            )
    run.write()
    text = next((tmp_path / "out").glob("*.md")).read_text()
    assert "| dlm 64 | 4,096 | 0.50 (0.15–0.85) | 0.62 (" in text
    assert "| dlm | 4,096 | 64 | 0.2 | 25.0% |" in text
    grid, fallback, failed = text.split("\n## ")[1:]
    assert (
        "variables" not in grid.splitlines()[2]
        and "variables" in failed.splitlines()[2]
        and "0.00 (0.00–0.00) †" in failed
    )
    assert fallback.count("| dlm |") == 2 and "| dense |" not in fallback
    with next((tmp_path / "out").glob("*.csv")).open() as file:
        lines = list(csv.DictReader(file))
    assert len(lines) == len(run.cells) == 3 * 5 + 1
    assert (
        lines[0]["task"] == "single"
        and float(lines[0]["value"]) == 0.5
        and lines[-1]["says_nothing"] == "True"
    )
    pictures = {
        path.name.rsplit("-", 1)[1]: path.read_bytes() for path in (tmp_path / "out").glob("*.png")
    }
    assert set(pictures) == {"budget.png", "pareto.png", "fallback.png"} and all(
        data.startswith(b"\x89PNG") for data in pictures.values()
    )


def test_cells_of_several_machines_are_told_apart(tmp_path):
    first = make_run(tmp_path)
    first.add(first.groups[0], Setting(DENSE), result([1.0] * 4))
    second = make_run(tmp_path)
    second.result.date, second.result.machine = (
        "later",
        second.result.machine | {"cpu": "another CPU"},
    )
    for setting in second.missing()[0][1]:
        second.add(second.groups[0], setting, result([1.0] * 4))
    second.write()
    second.write()  # notes are made anew
    (note,) = [note for note in second.result.notes if note.startswith("Several runs")]
    assert (
        f"{first.result.machine['cpu']}, " in note
        and "another CPU" in note
        and note.count("single at 4096") == 2
    )
    assert [note for note in second.result.notes if "3 cells of this grid" in note]


def test_no_figures_no_pictures(tmp_path):
    assert plots.draw([], [], tmp_path / "x", "demo") == [] and summary.rows([]) == []


def test_portions_fit_the_cache_and_hold_every_prompt_once():
    from benchmarks.prefilled import portions

    assert portions([4, 4, 4, 4, 4], 12) == [range(0, 3), range(3, 5)]
    assert portions([4, 20, 4], 12) == [range(0, 1), range(1, 2), range(2, 3)]
    assert portions([4, 4], 100) == [range(0, 2)]


def test_figures_of_portions_add_up():
    from benchmarks.prefilled import Answers

    answers = Answers(scores=[1.0], replies=["a"], tokens=3, cached=9, asked=10, seconds=1.0)
    for rows, mass, pages in ((30, 0.5, 3), (10, 0.1, 5)):
        answers.stats.append(
            {
                "decode_rows": rows,
                "fallback_rows": 1,
                "pages_read": pages,
                "pages_total": 10,
                "kept_mass_mean": mass,
                "steps": 7,
            }
        )
    assert answers.result() == {
        "replies": ["a"],
        "scores": [1.0],
        "seconds": 1.0,
        "tokens": 3,
        "cached": 0.9,
        "stats": {
            "decode_rows": 40,
            "fallback_rows": 2,
            "pages_read": 8,
            "pages_total": 20,
            "kept_mass_mean": pytest.approx(0.4),
        },
    }
    answers = Answers(asked=1)
    answers.stats.append(
        {
            "decode_rows": 3,
            "fallback_rows": 0,
            "pages_read": 3,
            "pages_total": 3,
            "kept_mass_mean": None,
        }
    )
    assert answers.result()["stats"]["kept_mass_mean"] is None, "retrievers without a head"
