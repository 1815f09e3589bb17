"""Reports, intervals, byte limits and the rows of the decode table; engines are not started."""

import json

import numpy as np
import pytest
from safetensors.torch import load_file
from typer.testing import CliRunner

from benchmarks import report, steps
from benchmarks.__main__ import app
from benchmarks.children import ChildError, run_child
from benchmarks.engines import Cell
from benchmarks.intervals import bootstrap, paired, student, t_quantile, wilson
from benchmarks.machine import device_slug
from benchmarks.shapes import Shape

MACHINE = {
    "gpus": [{"name": "NVIDIA H200", "driver": "580.1", "memory": "143771 MiB"}],
    "cpu": "some CPU",
    "cores": 16,
    "packages": {"torch": "2.11", "triton": None},
    "commit": None,
}


def make_report(**fields):
    tables = {
        "Times": (
            report.Column("cell", "cell"),
            report.Column("ms", "step, ms", ".2f"),
            report.Column("share", "share", ".1%"),
        )
    }
    return report.Report(
        "decode",
        "A title",
        tables,
        machine=MACHINE,
        date="2026-01-01",
        command="python -m benchmarks decode",
        **fields,
    )


def test_a_name_with_a_dot_stays_whole(tmp_path):
    made = make_report()
    made.case = "speed-steps-qwen3.5-9b"
    assert made.write(tmp_path).name == "speed-steps-qwen3.5-9b-h200.md"
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "speed-steps-qwen3.5-9b-h200.json",
        "speed-steps-qwen3.5-9b-h200.md",
    ]


def test_the_files_hold_the_figures_and_the_command(tmp_path):
    made = make_report(
        rows=[{"cell": "a|b", "ms": 7.456, "share": 0.0625}, {"cell": "c"}],
        failures={"stock": "it died."},
    )
    path = made.write(tmp_path)
    assert path.name == "decode-h200.md"
    text = path.read_text()
    assert "| a\\|b | 7.46 | 6.2% |" in text
    assert "| c | – | – |" in text
    assert (
        "failed: stock" in text
        and "`python -m benchmarks decode`" in text
        and "driver 580.1" in text
    )
    stored = json.loads((tmp_path / "decode-h200.json").read_text())
    assert (
        stored["rows"][0]["ms"] == 7.456
        and stored["machine"] == MACHINE
        and stored["failures"] == {"stock": "it died."}
    )


def test_a_table_shows_the_rows_that_have_its_first_column(tmp_path):
    made = make_report(rows=[{"cell": "a", "ms": 1.0}, {"other": "b", "ms": 2.0}])
    made.tables["Others"] = (report.Column("other", "other"),)
    text = made.write(tmp_path).read_text()
    assert text.count("| a | 1.00 |") == 1 and text.count("| b |") == 1 and "2.00" not in text


def test_parts_of_a_table_that_several_machines_made_are_told_apart():
    monday, tuesday = (
        make_report().run() | {"date": date} for date in ("2026-01-05", "2026-01-06")
    )
    assert report.run_notes([(monday, "stock"), (monday, "quest")]) == []
    (note,) = report.run_notes([(tuesday, "quest"), (monday, "stock"), (monday, "specontext")])
    assert (
        "2026-01-05 (`python -m benchmarks decode`, commit unknown): stock, specontext; 2026-01-06 "
        in note
        and "H200" not in note
    )
    other = tuesday | {"machine": tuesday["machine"].replace("some CPU", "another CPU")}
    (note,) = report.run_notes(
        [(monday, "stock"), (other, "quest"), ({"date": "2025-12-31"}, "old")]
    )
    places = [
        note.index(word)
        for word in ("not recorded): old", "some CPU", "): stock", "another CPU", "): quest")
    ]
    assert places == sorted(places)


def test_machines_without_a_gpu_share_a_name():
    assert device_slug({"gpus": []}) == "cpu"
    assert (
        device_slug({"gpus": [{"name": "NVIDIA GeForce RTX 4060 Laptop GPU"}]})
        == "rtx-4060-laptop-gpu"
    )


@pytest.mark.parametrize(
    ("text", "requests", "tokens"),
    [("24x32k", 24, 32768), ("2x256", 2, 256), ("fitx128k", None, 131072)],
    ids=lambda v: str(v),
)
def test_cells(text, requests, tokens):
    cell = Cell.parse(text)
    assert (cell.requests, cell.tokens) == (requests, tokens)


@pytest.mark.parametrize("text", ["", "x", "0x1k", "2x0", "2 x 1k", "-1x1k", "2x1m"])
def test_a_wrong_cell_is_named(text):
    with pytest.raises(ValueError, match="--cells"):
        Cell.parse(text)


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["decode", "--cells", "1x8k", "--model-shape", "tiny"], "--cells"),
        (["decode", "--cells", "64x1k", "--model-shape", "tiny"], "--max-num-seqs"),
        (["decode", "--model-shape", "9b"], "--model-shape"),
        (["decode", "--backends", "fast"], "--backends"),
        (["accuracy", "--model", "/nowhere"], "--model"),
        (["speed", "steps", "--cells", "1x8k", "--model-shape", "tiny"], "--cells"),
        (["speed", "steps", "--engines", "stock,flashy"], "--engines"),
        (["speed", "serve", "--lengths", "8k", "--model-shape", "8b"], "--lengths"),
        (["speed", "serve", "--lengths", "4k/64", "--model-shape", "tiny"], "--lengths"),
        (["speed", "serve", "--concurrency", "0"], "--concurrency"),
        (["speed", "serve", "--engines", "quest"], "--engines"),
        (["speed", "paper", "--model-shape", "tiny"], "--scale"),
        (["speed", "paper", "--engines", "hf-sdpa"], "--engines"),
        (["speed", "edge", "--model-shape", "9b"], "--model-shape"),
    ],
    ids=lambda v: v if isinstance(v, str) else "",
)
def test_a_wrong_option_ends_with_its_name(arguments, named):
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 2
    assert named in result.stderr


def test_byte_limits_of_the_8b_shape():
    shape = Shape.named("8b")
    # 8.03 B parameters, less the input embedding's 0.53 B.
    assert shape.weight_bytes == pytest.approx(2 * 7.50e9, rel=0.01)
    assert shape.kv_bytes_per_token == 131072
    dense = shape.dense_step_bytes(24, 32768) - shape.weight_bytes
    assert dense == 24 * 32768 * 131072
    extra = (
        shape.sparse_step_bytes(24, 32768, 2048) - shape.weight_bytes - shape.head_weight_bytes()
    )
    # The head's keys are 8-bit floats.
    assert extra == 24 * (2048 * 131072 + 32768 * 1024)
    # Within the budget nothing is scored.
    assert (
        shape.sparse_step_bytes(1, 1024, 2048)
        == shape.dense_step_bytes(1, 1024) + shape.head_weight_bytes()
    )


def engine_cell(median, stats=None):
    step = {"median": median, "p10": median, "p90": median, "mean": median, "max": median}
    return {
        "requests": 6,
        "prompt_tokens": 1000,
        "context_tokens": 1064,
        "prefill_s": 2.0,
        "step_ms": step,
        "stats": stats,
    }


def test_rows_hold_ratio_limits_and_rest():
    cells = [Cell.parse("fitx1k"), Cell.parse("1x256")]
    details = {
        "engines": {
            "stock": {"cells": {"fitx1k": engine_cell(30.0)}},
            "specontext": {
                "cells": {"fitx1k": engine_cell(7.5, {"pages_read": 1, "pages_total": 16})}
            },
        },
        "stages_ms": {"fitx1k": {"head": 0.5, "scoring": 1.0, "selection": 0.25, "attention": 2.0}},
        "copy_bandwidth_bytes_per_s": 4e12,
    }
    first, second = steps.make_rows(Shape.named("tiny"), cells, details, budget=256)
    assert first["cell"] == "6 x 1k" and first["ratio"] == 4.0 and first["pages_read"] == 1 / 16
    assert first["rest"] == 3.75
    assert 0 < first["sparse_limit"] < first["stock_limit"]
    assert first["over_limit"] == pytest.approx(7.5 / first["sparse_limit"])
    assert second == {"cell": "1 x 256"}


def test_wilson():
    # Newcombe (1998), table I: 81 of 263, 15 of 148, 0 of 20, 1 of 29.
    for right, count, low, high in (
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0, 0.1611),
        (1, 29, 0.0061, 0.1718),
    ):
        assert wilson(right, count) == pytest.approx((low, high), abs=6e-5)
    assert wilson(0, 0) == (0.0, 1.0)


def test_bootstrap_covers_the_mean():
    scores = [0.0, 0.2, 0.9, 1.0, 1.0, 1.0, 0.5, 1.0, 1.0, 0.7]
    low, high = bootstrap(scores)
    assert 0.4 < low < sum(scores) / 10 < high < 1.0
    assert bootstrap(scores) == (low, high)
    assert bootstrap([]) == (0.0, 1.0)


def test_paired_differences():
    # Agresti and Min (2005): n = 100, 8 and 16 discordant pairs, each cell of the 2 x 2 table with
    # a half more.
    centre, half = (16 - 8) / 102, 1.959964 * ((16 + 8 + 1) - (16 - 8) ** 2 / 102) ** 0.5 / 102
    assert paired([1.0] * 16 + [-1.0] * 8 + [0.0] * 76) == pytest.approx(
        (centre - half, centre + half)
    )
    assert paired([]) == (-1.0, 1.0) and paired([-1.0] * 12)[0] == -1.0
    # How many prompts, all equal, show that no more than a point is lost: some 200
    # (docs/results/accuracy.md).
    assert paired([0.0] * 194)[0] >= -0.01 > paired([0.0] * 193)[0]


def test_student():
    assert [t_quantile(n) for n in (1, 2, 11, 23)] == pytest.approx(
        [12.7062, 4.3027, 2.2010, 2.0687], abs=1e-4
    )
    # Mean 3, deviation 2 of 5.
    half = 2.7764 * 2.5**0.5 / 5**0.5
    assert student([1.0, 2.0, 3.0, 4.0, 5.0]) == pytest.approx((3 - half, 3 + half), abs=1e-4)
    assert student([0.5])[0] == -float("inf")


@pytest.mark.parametrize("shares", [False, True], ids=["right or wrong", "shares"])
@pytest.mark.parametrize(
    ("better", "worse"), [(0, 0.02), (0, 0.2), (0.05, 0.05), (0, 0.5), (0.9, 0)]
)
def test_a_dozen_pairs_hold_the_truth_by_the_interval_that_is_used(better, worse, shares):
    """Coverage over 5,000 draws of 12 prompts; Student's t falls to a quarter where losses are
    rare.
    """
    rng = np.random.default_rng(0)
    chance = rng.random((5000, 12))
    size = rng.beta(0.7, 0.7, chance.shape) if shares else np.ones(chance.shape)
    draws = size * ((chance < better) * 1.0 - (chance > 1 - worse))
    truth = (better - worse) * (0.5 if shares else 1.0)

    def covered(interval):
        return sum(
            low - 1e-9 <= truth <= high + 1e-9 for low, high in map(interval, draws.tolist())
        ) / len(draws)

    assert covered(paired) > 0.91
    if (better, worse) == (0, 0.02):
        assert covered(student) < 0.25


def events(*values):
    yield from values


def events_then_failure(value):
    yield value
    raise ValueError("too small")


def sleeper():
    import time

    yield "begun", 1
    time.sleep(600)


def test_a_child_reports_its_events(tmp_path):
    assert list(run_child(events, ("a", 1), ("b", 2), log=tmp_path / "log", seconds=60)) == [
        ("a", 1),
        ("b", 2),
    ]


def test_a_failing_child_keeps_its_events_and_says_why(tmp_path, capsys):
    seen = []
    with pytest.raises(ChildError, match="ValueError: too small"):
        for event in run_child(events_then_failure, ("a", 1), log=tmp_path / "log", seconds=60):
            seen.append(event)
    assert seen == [("a", 1)]
    assert "too small" in capsys.readouterr().out  # the log's tail


def test_a_child_over_its_time_is_stopped(tmp_path):
    with pytest.raises(ChildError, match="time limit"):
        list(run_child(sleeper, log=tmp_path / "log", seconds=8))


@pytest.mark.parametrize("groups", [1, 3])
def test_a_distilled_heads_bytes_are_those_of_its_file(tmp_path, groups):
    shape = Shape.named("demo")
    folder = shape.write_head(tmp_path / "head", groups)
    stored = sum(t.numel() for t in load_file(folder / "model.safetensors").values())
    weights = shape.head_weight_bytes("specontext", groups)
    assert weights == 2 * stored
    step = shape.sparse_step_bytes(1, 1024, 512, "specontext", groups=groups)
    more = step - shape.sparse_step_bytes(1, 1024, 512)
    keys = shape.head_key_bytes_per_token("specontext") - shape.head_key_bytes_per_token()
    assert keys == shape.num_key_value_heads * (128 - shape.head_dim)
    assert more == weights - shape.head_weight_bytes() + 1024 * keys
