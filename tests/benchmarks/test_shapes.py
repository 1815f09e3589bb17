"""Shapes whose layers are of several kinds: what a step must read, and what of it can be gained."""

import json
from math import prod

import pytest
from typer.testing import CliRunner

from benchmarks import steps
from benchmarks.__main__ import app
from benchmarks.engines import Cell, EngineSpec
from benchmarks.shapes import Shape


@pytest.mark.parametrize("name", ["8b", "gpt-oss-20b", "qwen3.5-9b"])
def test_a_step_reads_the_weights_of_transformers_model(name, tmp_path):
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(Shape.named(name).write(tmp_path))
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    read = {
        name: 2 * prod(weight.shape)
        for name, weight in model.named_parameters()
        if "embed_tokens" not in name
    }
    # Biases, and gates and convolutions of linear layers, are not counted.
    assert Shape.named(name).weight_bytes == pytest.approx(sum(read.values()), rel=3e-4)


def test_layers_of_other_kinds_read_the_same_under_every_budget():
    shape, dense = Shape.named("gpt-oss-20b"), Shape.named("8b")
    assert dense.other_layers_bytes(32768) == 0
    # 12 layers of 8 heads of 64, K and V in 16 bits: all tokens in some, 128 in the others.
    assert shape.kv_bytes_per_token == 12 * 8 * 64 * 2 * 2
    assert shape.other_layers_bytes(32768) == 128 * 12 * 8 * 64 * 2 * 2
    assert shape.other_layers_bytes(100) == 100 * 12 * 8 * 64 * 2 * 2
    shape = Shape.named("qwen3.5-9b")
    # A state of 32 matrices of 128 x 128 in 32 bits, and three inputs of the convolution.
    state = 32 * 128 * 128 * 4 + 3 * (2 * 16 + 32) * 128 * 2
    assert shape.other_layers_bytes(10) == shape.other_layers_bytes(32768) == 24 * 2 * state
    for shape in map(Shape.named, ("gpt-oss-20b", "qwen3.5-9b")):
        saved = shape.dense_step_bytes(6, 32768) - shape.sparse_step_bytes(6, 32768, 2048)
        keys = 32768 * shape.head_key_bytes_per_token()
        kv = (32768 - 2048) * shape.kv_bytes_per_token
        assert saved == 6 * (kv - keys) - shape.head_weight_bytes()


def test_a_head_of_our_own_has_keys_of_128():
    assert Shape.named("gpt-oss-20b").head_key_bytes_per_token() == 8 * 64
    assert Shape.named("gpt-oss-20b").head_key_bytes_per_token("specontext") == 8 * 128
    assert Shape.named("8b").head_key_bytes_per_token("specontext") == 8 * 128


def test_rows_say_what_can_be_gained():
    shape = Shape.named("gpt-oss-20b")
    step = {"median": 6.0, "p10": 6.0, "p90": 6.0}
    measured = {"requests": 24, "context_tokens": 32768, "step_ms": step}
    details = {
        "engines": {
            "stock": {"cells": {"24x32k": measured}},
            "specontext": {"cells": {"24x32k": measured | {"step_ms": step | {"median": 3.0}}}},
        },
        "stages_ms": {},
        "head_format": "specontext",
    }
    (row,) = steps.make_rows(shape, [Cell.parse("24x32k")], details, budget=2048)
    assert row["ratio"] == 2.0 and "over_limit" not in row  # without a bandwidth
    assert row["full_gb"] == pytest.approx(24 * 32768 * 24576 / 1e9)
    total = row["weights_gb"] + row["full_gb"] + row["others_gb"]
    assert row["full_share"] == pytest.approx(row["full_gb"] / total)
    (row,) = steps.make_rows(
        shape,
        [Cell.parse("24x32k")],
        details | {"copy_bandwidth_bytes_per_s": 4e12},
        budget=2048,
    )
    assert row["limit_ratio"] == pytest.approx(row["stock_limit"] / row["sparse_limit"])
    assert 2 < row["limit_ratio"] < 4


def test_linear_layers_prefill_on_triton_in_every_engine():
    def arguments(shape, name):
        spec = EngineSpec(name, "/m", False, 256, 4, 8, additional=steps.additional_config(shape))
        return spec.arguments().get("additional_config")

    linear = {"gdn_prefill_backend": "triton"}
    assert arguments(Shape.named("tiny"), "stock") is None
    assert arguments(Shape.named("tiny-qwen3.5"), "stock") == linear
    assert arguments(Shape.named("tiny-qwen3.5"), "quest") == {
        **linear,
        "specontext": {"retriever": "quest", "budget": 256},
    }


@pytest.mark.parametrize("part", ["steps", "paper"])
def test_transformers_is_no_measure_for_layers_of_other_kinds(part, tmp_path):
    options = ["--model-shape", "gpt-oss-20b", "--engines", "stock,hf-eager"]
    options += ["--cells", "1x64"] if part == "steps" else []
    done = CliRunner().invoke(app, ["speed", part, *options, "--out", str(tmp_path)])
    assert done.exit_code == 2
    assert "--engines: found hf-eager, but transformers' layers" in done.output


@pytest.mark.slow
def test_a_tiny_run_of_layers_of_other_kinds(forked_children, tmp_path):
    options = ["--cells", "2x160,2x64", "--model-shape", "tiny-gpt-oss", "--budget", "128"]
    options += ["--timed", "2", "--engines", "specontext", "--head-format", "specontext"]
    done = CliRunner(env={"VLLM_CPU_KVCACHE_SPACE": "1"}).invoke(
        app, ["speed", "steps", *options, "--out", str(tmp_path), "--work", str(tmp_path / "work")]
    )
    assert done.exit_code == 0, done.output
    (path,) = tmp_path.glob("speed-steps-tiny-gpt-oss-own_head-*.json")
    short, long = json.loads(path.read_text())["rows"]
    assert short["pages_read"] == 1.0 and 0.5 < long["pages_read"] < 0.9
    assert short["sparse"] > 0 and long["sparse_limit"] > 0 and long["limit_ratio"] > 0
    assert "What can be gained" in path.with_suffix(".md").read_text()
