"""The grid: its cells survive a stop and are never mixed, its figures, table, CSV and pictures;
engines are not started.
"""

import csv
import json
import math
import shutil

import pytest
from typer.testing import CliRunner

from benchmarks import report
from benchmarks.__main__ import app
from benchmarks.accuracy import command, plots, summary, wanted
from benchmarks.accuracy.cells import DENSE, Cell, CellError, CellStore, Group, Setting
from benchmarks.accuracy.tasks import TASKS, Example
from benchmarks.report import RESULTS
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
    grid = command.Grid(
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
    return command.Run(
        grid,
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
    ran = CliRunner().invoke(
        app, ["accuracy", *arguments, "--work", str(tmp_path), "--out", str(tmp_path)]
    )
    assert ran.exit_code == 2 and named in ran.stderr


def test_dlm_without_a_head(tmp_path):
    (tmp_path / "model").mkdir()
    assert command._find_head(tmp_path / "model", None, None) == (
        None,
        [r for r in command.get_args(command.Retriever) if r != "dlm"],
    )
    with pytest.raises(command.OptionError, match="--head"):
        command._find_head(tmp_path / "model", None, "dlm,recent")


def test_another_head_has_a_result_of_its_own(tmp_path):
    """Heads and models by the files that a run without cells writes."""
    heads = [DEMO_MODEL / "retrieval_head", tmp_path / "a" / "align only", tmp_path / "distilled"]
    for folder in heads[1:]:
        shutil.copytree(DEMO_MODEL / "retrieval_head", folder)
    other = shutil.copytree(DEMO_MODEL, tmp_path / "other")
    out = tmp_path / "out"
    runs = [
        [],
        *(["--head", str(head)] for head in heads),
        ["--model", str(other)],
        ["--model", str(other), "--head", str(heads[2])],
    ]
    for number, more in enumerate(runs):
        options = [
            "--tasks",
            "single",
            "--contexts",
            "1024",
            "--prompts",
            "2",
            "--no-measure",
            "--work",
            str(tmp_path / f"work{number}"),
        ]
        done = CliRunner().invoke(app, ["accuracy", *options, "--out", str(out), *more])
        assert done.exit_code == 0, done.output
    found = {
        path.stem.rsplit("-", 1)[0]: json.loads(path.read_text())["title"].partition(":")[0]
        for path in out.glob("*.json")
    }
    assert found == {
        "accuracy": "demo",
        "accuracy-head-align-only": "demo head align-only",
        "accuracy-head-distilled": "demo head distilled",
        "accuracy-other": "other",
        "accuracy-other-head-distilled": "other head distilled",
    }


# -- what was wanted
# ----------------------------------------------------------------------------------------------------

NAMES = {
    task: TASKS[task] for task in ("single", "multi_key", "recitation", "perplexity", "variables")
}


def cells_of(context=4096, **scores):
    """``task__retriever_budget=scores`` as cells."""
    found = {}
    for name, values in scores.items():
        task, _, setting = name.partition("__")
        retriever, _, budget = setting.partition("_")
        found[Cell(task, context, Setting(retriever, int(budget) if budget else None))] = values
    return found


def test_the_budget_nearest_to_three_percent_is_compared_with_dense():
    settings = [
        Setting(DENSE),
        *(Setting("dlm", b) for b in (64, 128, 256, 512)),
        Setting("quest", 256),
        Setting("quest", 1024),
    ]
    settings.append(Setting("dlm", 256, 0.3))
    found = wanted.comparisons(
        Cell("single", context, s) for context in (8192, 4096, 32768, 65536) for s in settings
    )
    # 3 % of 32k is 983, which 512 misses by more than half.
    near = {4096: "dlm 128 – dense", 8192: "dlm 256 – dense"}
    assert [(c.context, c.name, c.mark) for c in found] == [
        row
        for context in (4096, 8192, 32768, 65536)
        for row in [
            *([(context, near[context], -0.01)] if context in near else []),
            (context, "dlm 64 – quest 256", 0.0),
            (context, "dlm 256 – quest 1024", 0.0),
        ]
    ]


def test_differences_are_those_of_the_same_prompts():
    """The means are equal; which prompts are lost decides."""
    right = [1.0] * 6 + [0.0] * 6
    same = cells_of(single__dense=right, single__dlm_64=right, single__quest_256=right)
    turned = {**same, Cell("single", 4096, Setting("quest", 256)): right[::-1]}
    (one,), (two,) = wanted.rows(same, NAMES), wanted.rows(turned, NAMES)
    assert (one["better"], one["equal"], one["worse"]) == (0, 12, 0) and (
        two["better"],
        two["equal"],
        two["worse"],
    ) == (6, 0, 6)
    assert one["difference"] == two["difference"] == 0.0 and two["high"] > 2 * one["high"]


def test_verdicts():
    lost = [0.0] * 12
    cells = cells_of(
        single__dense=[1.0] * 12,
        single__dlm_128=[1.0] * 12,
        single__quest_512=lost,
        multi_key__dense=[1.0] * 12,
        multi_key__dlm_128=lost,
        multi_key__quest_512=[1.0] * 12,
        perplexity__dense=[0.001] * 12,
        perplexity__dlm_128=[0.002, 0.003] * 6,
        perplexity__quest_512=[0.5, 0.6] * 6,
        variables__dense=lost,
        variables__dlm_128=lost,
        variables__quest_512=lost,
    )
    found = {(row["kind"], row["task"]): row for row in wanted.rows(cells, NAMES)}
    assert {key: row["verdict"] for key, row in found.items()} == {
        ("near_dense", "single"): "open",
        ("near_dense", "multi_key"): "not met",
        ("near_dense", "perplexity"): "met",
        ("near_dense", wanted.ALL): "not met",
        ("like_quest", "single"): "met",
        ("like_quest", "multi_key"): "not met",
        ("like_quest", "perplexity"): "met",
        ("like_quest", wanted.ALL): "open",
    }
    # Log-probabilities: less perplexity is more.
    assert found["near_dense", "perplexity"]["difference"] == pytest.approx(-0.0015)
    assert found["like_quest", wanted.ALL]["prompts"] == 24
    assert wanted.counts(list(found.values())) == {
        "near_dense": {"met": 1, "not_met": 1, "open": 1, "all": 3},
        "like_quest": {"met": 2, "not_met": 1, "open": 0, "all": 3},
    }


def test_the_same_cells_of_another_result_are_compared_prompt_by_prompt():
    mine = cells_of(
        single__dense=[1.0] * 4,
        single__dlm_128=[1.0, 1.0, 0.0, 1.0],
        multi_key__dlm_128=[1.0] * 4,
        perplexity__dlm_128=[0.1, 0.2, 0.3, 0.4],
        recitation__dlm_128=[1.0] * 4,
    )
    other = {
        "single, 4096, dense": [1.0] * 4,
        "single, 4096, dlm 128": [1.0, 0.0, 1.0, 0.0],
        "multi_key, 4096, dlm 128": [0.5] * 4,
        "perplexity, 4096, dlm 128": [0.2, 0.2, 0.2, 0.2],
        "single, 8192, dense": [0.0],
    }
    found = {(row["against"], row["task"]): row for row in wanted.rows_against(mine, other, NAMES)}
    assert {
        key: (row["better"], row["equal"], row["worse"], round(row["difference"], 6))
        for key, row in found.items()
    } == {
        ("dense", "single"): (0, 4, 0, 0.0),
        ("dlm 128", "single"): (2, 1, 1, 0.25),
        ("dlm 128", "multi_key"): (4, 0, 0, 0.5),
        ("dlm 128", "perplexity"): (1, 1, 2, -0.05),
        ("dlm 128", wanted.ALL): (6, 1, 1, 0.375),
    }
    assert all("verdict" not in row and "compared" not in row for row in found.values())


def test_only_a_result_over_the_same_prompts_is_compared_with(tmp_path):
    options = [
        "accuracy",
        "--tasks",
        "single",
        "--contexts",
        "4096",
        "--no-measure",
        "--work",
        str(tmp_path / "w"),
        "--out",
        str(tmp_path / "o"),
    ]
    path = RESULTS / "accuracy-cpu.json"
    for more, named in (
        (
            ["--prompts", "3", "--against", str(path)],
            "has 12 prompts of single at 4096 tokens, this grid has 3",
        ),
        (["--prompts", "12", "--against", str(tmp_path / "absent")], "is no result of this case"),
    ):
        done = CliRunner().invoke(app, [*options, *more])
        assert done.exit_code == 2 and named in done.stderr, done.output
    assert (
        CliRunner().invoke(app, [*options, "--prompts", "12", "--against", str(path)]).exit_code
        == 0
    )


def test_the_committed_verdicts_follow_from_the_committed_scores():
    for path in RESULTS.glob("accuracy*.json"):
        result = json.loads(path.read_text())
        scores, rows = (
            result["details"]["scores"],
            [row for row in result["rows"] if "retriever" in row],
        )
        known = {
            cell.name: cell
            for row in rows
            for task in TASKS
            for cell in [
                Cell(
                    task, row["context"], Setting(row["retriever"], row["budget"], row["threshold"])
                )
            ]
        }
        cells = {known[name]: values for name, values in scores.items()}
        # Another machine's sums may differ in their last bits.
        for found, made in zip(
            [row for row in result["rows"] if "compared" in row],
            wanted.rows(cells, TASKS),
            strict=True,
        ):
            assert found.keys() == made.keys()
            for key, value in made.items():
                assert found[key] == (
                    pytest.approx(value, abs=1e-9) if isinstance(value, float) else value
                )
        for row in rows:
            for task in TASKS:
                name = Cell(
                    task, row["context"], Setting(row["retriever"], row["budget"], row["threshold"])
                ).name
                assert row.get(task) == (
                    pytest.approx(summary.value(TASKS[task], scores[name]), abs=1e-9)
                    if name in scores
                    else None
                )


def test_portions_fit_the_cache_and_hold_every_prompt_once():
    from benchmarks.accuracy.engine import portions

    assert portions([4, 4, 4, 4, 4], 12) == [range(0, 3), range(3, 5)]
    assert portions([4, 20, 4], 12) == [range(0, 1), range(1, 2), range(2, 3)]
    assert portions([4, 4], 100) == [range(0, 2)]


def test_figures_of_portions_add_up():
    from benchmarks.accuracy.engine import Answers

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
