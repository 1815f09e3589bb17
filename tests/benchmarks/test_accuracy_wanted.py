"""Comparisons prompt by prompt: with dense attention, with quest, and with another result."""

import json

import pytest

from benchmarks.accuracy import summary, wanted
from benchmarks.accuracy.cells import DENSE, Cell, Setting
from benchmarks.accuracy.tasks import TASKS
from benchmarks.report import RESULTS

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


def test_fewer_recent_tokens_are_compared_with_the_most_at_the_same_budget():
    settings = [Setting("dlm", b, recents=n) for b, n in ((64, 16), (128, 16), (128, 64))]
    settings += [Setting(DENSE), Setting("dlm", 128), Setting("oracle", 128, recents=32)]
    found = wanted.comparisons(Cell("single", 4096, s) for s in settings)
    assert [(c.kind, c.name, c.mark) for c in found] == [
        (wanted.NEAR_DENSE, "dlm 128 – dense", -0.01),
        (wanted.FEWER_RECENTS, "dlm 128 recents 16 – dlm 128 recents 64", 0.0),
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


def cell_of(row, task):
    """The cell of a committed row; older results have no recent tokens of their own."""
    setting = Setting(row["retriever"], row["budget"], row["threshold"], row.get("recents"))
    return Cell(task, row["context"], setting)


def test_the_committed_verdicts_follow_from_the_committed_scores():
    for path in RESULTS.glob("accuracy*.json"):
        result = json.loads(path.read_text())
        scores, rows = (
            result["details"]["scores"],
            [row for row in result["rows"] if "retriever" in row],
        )
        known = {cell.name: cell for row in rows for task in TASKS for cell in [cell_of(row, task)]}
        cells = {known[name]: values for name, values in scores.items()}
        # Another machine's sums may differ in their last bits.
        for found, made in zip(
            [row for row in result["rows"] if "compared" in row],
            wanted.rows(cells, {cell.task: TASKS[cell.task] for cell in cells}),
            strict=True,
        ):
            assert found.keys() == made.keys()
            for key, value in made.items():
                assert found[key] == (
                    pytest.approx(value, abs=1e-9) if isinstance(value, float) else value
                )
        for row in rows:
            for task in TASKS:
                name = cell_of(row, task).name
                assert row.get(task) == (
                    pytest.approx(summary.value(TASKS[task], scores[name]), abs=1e-9)
                    if name in scores
                    else None
                )
