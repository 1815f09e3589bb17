"""The grid: its cells survive a stop and are never mixed, its figures, table, CSV and pictures; engines are not started."""

import csv
import math

import pytest
from typer.testing import CliRunner

from benchmarks import report
from benchmarks.__main__ import app
from benchmarks.accuracy import command, plots, summary
from benchmarks.accuracy.cells import DENSE, Cell, CellError, CellStore, Group, Setting
from benchmarks.accuracy.tasks import TASKS, Example
from specontext_vllm.config import ConfigError

SETTINGS = {"model": "demo", "dtype": "float32"}
STATS = {"pages_read": 10, "pages_total": 100, "decode_rows": 40, "fallback_rows": 10, "kept_mass_mean": 0.3}


def result(scores, **fields):
    return {"scores": scores, "replies": [""] * len(scores), "tokens": 100, "seconds": 2.0, "cached": 0.99, "stats": STATS, **fields}


def group(task="single", context=4096, reply_tokens=9):
    return Group(task, context, [Example([1, 2, 3], ("x",), reply_tokens)] * 4)


def make_run(folder, groups=None, thresholds=(), tasks=("single", "variables"), contexts=(4096,)):
    grid = command.Grid(
        model=folder / "demo", head="head", tasks={name: TASKS[name] for name in tasks}, retrievers=["dlm", DENSE], budgets=[64, 256],
        contexts=list(contexts), prompts=4, thresholds=list(thresholds), threshold_budget=64,
    )  # fmt: skip
    groups = groups or [group(name, context) for context in contexts for name in tasks]
    return command.Run(grid, groups, CellStore(folder / "work", SETTINGS), report.Report("accuracy", "A title", {}), folder / "out")


def test_a_setting_keeps_pages_to_choose():
    assert Setting("dlm", 64).changes() == {"retriever": "dlm", "confidence_threshold": 0.0, "budget": 64, "recent_tokens": 16}
    assert Setting("dlm", 112).recent_tokens == Setting("dlm", 512).recent_tokens == 64
    assert Setting(DENSE).changes() == {"retriever": DENSE, "confidence_threshold": 0.0}
    with pytest.raises(ConfigError, match="budget"):
        Setting("dlm", 32).changes()


def test_a_run_goes_on_where_it_stopped(tmp_path):
    run = make_run(tmp_path)
    first, second = run.groups
    assert [(g.task, len(settings)) for g, settings in run.missing()] == [("single", 3), ("variables", 3)]
    run.add(first, Setting(DENSE), result([1.0] * 4))
    run.add(first, Setting("dlm", 256), result([1.0, 1.0, 1.0, 0.0]))
    # What a killed writer leaves behind is no cell.
    (tmp_path / "work" / "single-4096-dlm-64.partial").write_text('{"dig')
    again = make_run(tmp_path)
    assert [(g.task, settings) for g, settings in again.missing()] == [
        ("single", [Setting("dlm", 64)]), ("variables", [Setting(DENSE), Setting("dlm", 64), Setting("dlm", 256)]),
    ]  # fmt: skip
    assert list(again.ordered().values()) == [again.cells[first.cell(s)] for s in (Setting(DENSE), Setting("dlm", 256))]


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
    monkeypatch.setattr(Setting, "changes", lambda self: {"retriever": self.retriever, "recent_tokens": 32})
    with pytest.raises(CellError, match="other settings"):
        make_run(tmp_path)


def test_figures():
    cell = Cell("multi_key", 4096, Setting("dlm", 64, 0.2))
    line = summary.figures(cell, TASKS["multi_key"], result([1.0, 1.0, 0.0, 0.0]), result([1.0] * 4))
    assert (line["value"], line["of_dense"], line["pages_read"], line["fallback_share"]) == (0.5, 0.5, 0.1, 0.25)
    # Wilson, 2 of 4.
    assert (line["low"], line["high"]) == pytest.approx((0.150, 0.850), abs=1e-3)
    assert line["says_nothing"] is False
    assert summary.figures(cell, TASKS["multi_key"], result([0.0] * 4, cached=0.5), result([0.0] * 4))["seconds"] is None
    perplexity = summary.figures(Cell("perplexity", 4096, Setting(DENSE)), TASKS["perplexity"], result([0.0, math.log(4)]), None)
    assert perplexity["value"] == pytest.approx(2.0) and (perplexity["low"], perplexity["high"]) == pytest.approx((1.0, 4.0))


def test_perplexity_is_that_of_the_forced_tokens():
    forced = Example([1], ("x",), 3, [5, 6, 7])
    assert summary.score(TASKS["perplexity"], forced, [math.log(0.5), math.log(0.125)]) == pytest.approx(math.log(4))


def test_table_csv_and_pictures(tmp_path):
    run = make_run(tmp_path, thresholds=[0.2, 0.4], tasks=("single", "recitation", "perplexity", "variables"))
    for number, g in enumerate(run.groups):
        failed = g.task == "variables"
        for setting in run.grid.settings(g.context)[: 1 if failed else None]:
            run.add(g, setting, result([0.0] * 4 if failed else [1.0, 1.0, 0.5 * (number > 0), 0.0]))
    run.write()
    text = next((tmp_path / "out").glob("*.md")).read_text()
    assert "| dlm 64 | 4,096 | 0.50 (0.15–0.85) | 0.62 (" in text
    assert "| dlm | 4,096 | 64 | 0.2 | 25.0% |" in text
    grid, fallback, failed = text.split("\n## ")[1:]
    assert "variables" not in grid.splitlines()[2] and "variables" in failed.splitlines()[2] and "0.00 (0.00–0.00) †" in failed
    assert fallback.count("| dlm |") == 2 and "| dense |" not in fallback
    with next((tmp_path / "out").glob("*.csv")).open() as file:
        lines = list(csv.DictReader(file))
    assert len(lines) == len(run.cells) == 3 * 5 + 1
    assert lines[0]["task"] == "single" and float(lines[0]["value"]) == 0.5 and lines[-1]["says_nothing"] == "True"
    pictures = {path.name.rsplit("-", 1)[1]: path.read_bytes() for path in (tmp_path / "out").glob("*.png")}
    assert set(pictures) == {"budget.png", "pareto.png", "fallback.png"} and all(data.startswith(b"\x89PNG") for data in pictures.values())


def test_no_figures_no_pictures(tmp_path):
    assert plots.draw([], [], tmp_path / "x", "demo") == [] and summary.rows([]) == []


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--tasks", "needle"], "--tasks: found 'needle'"),
        (["--retrievers", "best"], "--retrievers: found 'best'"),
        (["--budgets", "many"], "--budgets: found 'many'"),
        (["--budgets", "32", "--contexts", "1024"], "budget: found 32"),
        (["--contexts", "16384", "--tasks", "single", "--prompts", "2"], "--contexts: found 16384"),
        (["--longbench", "."], "--longbench"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_a_wrong_option_ends_with_its_name(arguments, named, tmp_path):
    ran = CliRunner().invoke(app, ["accuracy", *arguments, "--work", str(tmp_path), "--out", str(tmp_path)])
    assert ran.exit_code == 2 and named in ran.stderr


def test_dlm_without_a_head(tmp_path):
    (tmp_path / "model").mkdir()
    assert command._find_head(tmp_path / "model", None, None) == (None, [r for r in command.get_args(command.Retriever) if r != "dlm"])
    with pytest.raises(command.OptionError, match="--head"):
        command._find_head(tmp_path / "model", None, "dlm,recent")
