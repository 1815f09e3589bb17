"""The case `cpu`: rows from recorded figures, and one tiny run that is gone on with."""

import json
from types import SimpleNamespace

import pytest
import torch
from typer.testing import CliRunner

from benchmarks.__main__ import app
from benchmarks.cpu import engine
from benchmarks.cpu.command import make_rows
from benchmarks.cpu.engine import fill_caches, without_model
from benchmarks.engines import Cell
from benchmarks.shapes import Shape
from tests.conftest import CUDA


def timed(*medians):
    rounds = [[ms - 0.1, ms, ms + 3] for ms in medians]
    return {
        "rounds_ms": rounds,
        "step_ms": {"median": sorted(medians)[len(medians) // 2]},
        "stats": {"pages_read": 1, "pages_total": 8},
    }


def test_a_machine_that_slows_down_for_both_does_not_change_the_ratio():
    shape, cell = Shape.named("smollm2"), Cell.parse("4x8k")
    details = {
        "budget": 1024,
        "read_bytes_per_s": 20e9,
        "cells": {
            "decode 4x8k": {"stock": timed(60, 120, 240), "specontext": timed(30, 60, 160)},
            "prefill 4x8k": {
                "stock": {"prefills_s": [10, 20, 40]},
                "specontext": {"prefills_s": [20, 20, 20]},
            },
        },
    }
    prefill, decode = make_rows(shape, [("prefill", cell), ("decode", cell)], details)
    assert (decode["stock"], decode["sparse"], decode["pages_read"]) == (120, 60, 0.125)
    assert decode["ratio"] == pytest.approx(2) and decode["ratios"] == "1.50 to 2.00"
    # 135 M weights and 23 KiB a token in 16 bits; the head's keys are 384 bytes a token.
    dense = 2 * 134.5e6 + 4 * 8192 * 23040
    sparse = 2 * (134.5e6 + 3 * 576**2 + 2 * 576 * 64 * 12) + 4 * (1024 * 23040 + 8192 * 384)
    assert decode["stock_limit"] == pytest.approx(1e3 * dense / 20e9, rel=1e-3)
    assert decode["sparse_limit"] == pytest.approx(1e3 * sparse / 20e9, rel=1e-3)
    assert decode["over_limit"] == pytest.approx(60 / decode["sparse_limit"])
    assert (prefill["stock_prefill"], prefill["prefill_ratio"]) == (20, 1)
    assert prefill["prefill_ratios"] == "0.50 to 2.00" and "cell" not in prefill


def test_all_of_the_caches_is_filled_and_a_storage_once(monkeypatch):
    monkeypatch.setattr(engine, "PATTERN", 7)
    whole = torch.zeros(2, 50)
    keys, fused = torch.zeros(3, 4), torch.zeros(5)
    cache = SimpleNamespace(keys=keys, fused=fused)
    runtime = SimpleNamespace(retriever=SimpleNamespace(cache=cache))
    runner = SimpleNamespace(kv_caches=[whole[0], whole[1]], runtime=runtime)
    fill_caches(SimpleNamespace(model_runner=runner))
    for tensor in (whole, keys, fused):
        assert (tensor != 0).all()
    assert torch.equal(whole.view(-1)[:7], whole.view(-1)[7:14])


def test_the_model_is_back_after_the_prompts():
    class Runner:
        use_aux_hidden_state_outputs = False
        model_config = SimpleNamespace(get_hidden_size=lambda: 8, dtype=torch.float16)

        def _model_forward(self, **kwargs):
            return "model"

    runner = Runner()
    with without_model(runner):
        assert runner._model_forward(positions=torch.zeros(3)).shape == (3, 8)
    assert runner._model_forward() == "model"


def test_cells_beyond_the_shapes_positions_are_refused(tmp_path):
    options = ["--model-shape", "tiny", "--cells", "1x4k", "--prefills", ""]
    done = CliRunner().invoke(app, ["cpu", *options, "--out", str(tmp_path)])
    assert done.exit_code == 2 and "4096 positions" in done.output


@pytest.mark.slow
@pytest.mark.skipif(CUDA, reason="is about engines on a CPU")
def test_a_tiny_run_goes_on_where_one_has_ended(forked_children, tmp_path, monkeypatch):
    monkeypatch.setattr(engine, "READ_BYTES", 2**20)
    options = ["--model-shape", "tiny", "--budget", "128", "--timed", "4", "--eager"]
    folders = ["--out", str(tmp_path), "--work", str(tmp_path / "work")]

    def run(cells, prefills):
        command = ["cpu", *options, "--cells", cells, "--prefills", prefills, *folders]
        done = CliRunner().invoke(app, command)
        assert done.exit_code == 0, done.output
        (path,) = tmp_path.glob("cpu-tiny-*.json")
        assert path.with_suffix(".md").exists() and path.with_suffix(".png").exists()
        return json.loads(path.read_text()), done.output

    result, _ = run("2x320", "2x64")
    prefill, decode = sorted(result["rows"], key=lambda row: "step_cell" in row)
    assert prefill["stock_prefill"] > 0 and prefill["sparse_prefill"] > 0
    assert decode["stock"] > 0 and decode["sparse"] > 0 and decode["sparse_limit"] > 0
    assert 0.3 < decode["pages_read"] < 0.5
    figures = result["details"]["cells"]["decode 2x320"]
    assert [len(part) for part in figures["stock"]["rounds_ms"]] == [1, 1, 1, 1]
    # Nothing is left, so no engine starts.
    again, output = run("2x320", "2x64")
    assert again["rows"] == result["rows"] and "starting" not in output
