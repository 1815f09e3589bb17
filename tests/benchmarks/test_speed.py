"""The case `speed`: tables from recorded figures, merging of runs, the tokenizer, and one tiny run
of `steps`.
"""

import json

import numpy as np
import pytest
from typer.testing import CliRunner

from benchmarks import report, serving, steps, workloads
from benchmarks.__main__ import app
from benchmarks.children import ChildError
from benchmarks.engines import Cell, EngineSpec
from benchmarks.shapes import Shape


def timed(context, ms, requests=4, prefill=None, cached=0):
    step = dict.fromkeys(("median", "p10", "p90", "mean", "max"), ms)
    figures = {
        "requests": requests,
        "context_tokens": context,
        "step_ms": step,
        "steps": 8,
        "cached_tokens": cached,
        "run": "monday",
    }
    return figures | ({} if prefill is None else {"prefill_s": prefill})


def make_result(tmp_path, **details):
    details = {"shape": "s", "engines": {}, "stages_ms": {}} | details
    tables = {"Times": (steps.CELL,)}
    return report.Report(
        "speed-steps",
        "T",
        tables,
        details=details,
        date="tuesday",
        command="python -m benchmarks speed steps",
    )


def test_every_engine_has_its_columns_and_what_does_not_fit_is_told():
    details = {
        "engines": {
            "stock": {"cells": {"2x1k": timed(1024, 30.0, prefill=2.0, cached=512)}},
            "specontext": {"cells": {"2x1k": timed(1024, 6.0, prefill=3.0)}},
            "quest": {"cells": {"2x1k": timed(1024, 10.0)}},
            "hf-sdpa": {"cells": {"2x1k": timed(1024, 45.0)}},
            "hf-eager": {
                "cells": {
                    "2x1k": {
                        "requests": 2,
                        "out_of_memory": "the prefill does not fit",
                        "run": "monday",
                    }
                }
            },
        },
        "stages_ms": {},
    }
    (row,) = steps.make_rows(Shape.named("tiny"), [Cell.parse("2x1k")], details, 256)
    assert (row["stock"], row["sparse"], row["quest"], row["hf_sdpa"], row["hf_eager"]) == (
        30.0,
        6.0,
        10.0,
        45.0,
        "out of memory",
    )
    assert (row["ratio"], row["quest_ratio"]) == (5.0, 3.0) and "eager_ratio" not in row
    assert (
        "stock_prefill" not in row and row["sparse_prefill"] == 3.0
    )  # stock's began in the prefix cache


def test_a_run_replaces_its_own_cells_and_keeps_the_others(tmp_path):
    earlier = make_result(
        tmp_path, engines={"stock": {"cells": {"1x1k": timed(1024, 5.0), "2x1k": timed(1024, 6.0)}}}
    )
    earlier.failures = {"stock, 2x1k": "it broke.", "stock": "it died.", "quest": "it died."}
    earlier.write(tmp_path)
    result = make_result(tmp_path)
    result.take_over(tmp_path, ("shape",))

    def events():
        yield "ready", {"start_s": 1.0}
        yield "cell", ("2x1k", timed(1024, 7.0))
        yield "failed", ("4x1k", "too much.")
        raise ChildError("it was stopped.")

    for _ in steps.collect(result, "stock", ["2x1k", "4x1k"], events()):
        result.write(tmp_path)
    stored = json.loads(next(tmp_path.glob("speed-steps-*.json")).read_text())
    cells = stored["details"]["engines"]["stock"]["cells"]
    assert {
        name: (figures["step_ms"]["median"], figures["run"]) for name, figures in cells.items()
    } == {"1x1k": (5.0, "monday"), "2x1k": (7.0, "tuesday")}
    assert stored["failures"] == {
        "quest": "it died.",
        "stock, 4x1k": "too much.",
        "stock": "it was stopped.",
    }
    result.details["runs"]["monday"] = {**result.run(), "date": "monday", "command": "first"}
    (note,) = steps.run_notes(result.details)
    commit = result.machine["commit"] or "unknown"
    assert (
        f"monday (`first`, commit {commit}): stock; tuesday (`python -m benchmarks speed steps`, "
        f"commit {commit}): stock" in note
    )


def test_results_of_another_shape_are_not_added_to(tmp_path):
    make_result(tmp_path).write(tmp_path)
    with pytest.raises(ValueError, match="--out: .*another shape"):
        make_result(tmp_path, shape="another").take_over(tmp_path, ("shape",))


def test_fit_cells_have_the_same_requests_in_all_engines_but_rooms_have_not():
    cells = [Cell.parse("fitx1k"), Cell.parse("2x1k"), Cell(None, 1024, "1024 of 4096", room=4096)]
    measured = {cell.name: timed(1024, 5.0, requests=3) for cell in cells}
    assert steps.fits_of(
        {"engines": {"specontext": {"cells": measured}, "stock": {"cells": {}}}}, cells
    ) == {"fitx1k": 3}


def test_workload_cells_cover_the_way_of_each_workload():
    scenes = workloads.scaled(1)
    cells = workloads.make_cells(scenes, "stock", 4, 1)
    assert [cell.tokens // 1024 for cell in cells if cell.room == 18 * 1024] == [
        2,
        4,
        8,
        12,
        16,
        18,
    ]
    assert [cell.tokens // 1024 for cell in cells if cell.room == 34 * 1024] == [
        2,
        4,
        8,
        12,
        24,
        32,
        34,
    ]
    assert all(cell.requests is None for cell in cells)
    eager = workloads.make_cells(scenes, "hf-eager", 4, 1)
    assert [cell.name for cell in eager if cell.prefill] == [scene.prefill_cell for scene in scenes]
    assert all(cell.requests == 4 for cell in eager)


def test_the_mean_step_is_that_of_a_loop():
    steps_by_length = {100: 1.0, 200: 3.0, 300: 3.5}
    by_hand = [np.interp(n, [100, 200, 300], [1.0, 3.0, 3.5]) for n in range(50, 321)]
    assert workloads.mean_step(steps_by_length, 50, 320) == pytest.approx(
        sum(by_hand) / len(by_hand)
    )


def test_workload_rows_follow_from_the_sampled_steps():
    scenes = [workloads.Workload("[1k,3k]", 1000, 3000), workloads.Workload("[3k,1k]", 3000, 1000)]
    names = ("1000 of 4000", "3000 of 4000", "4000 of 4000")
    lengths = (1000, 3000, 4000)
    sampled = [
        Cell(None, tokens, cell, 4000, prefill=False)
        for cell, tokens in zip(names, lengths, strict=True)
    ]
    cells = {name: list(sampled) for name in workloads.ENGINES}
    prefills = [Cell(4, scene.prompt, scene.prefill_cell, 4000) for scene in scenes]
    cells["hf-eager"] += prefills
    flat = {
        name: timed(tokens, ms=10.0, requests=20, prefill=1.0)
        for name, tokens in zip(names, lengths, strict=True)
    }
    rising = {
        name: timed(tokens, ms=tokens / 100, requests=10, prefill=2.0)
        for name, tokens in zip(names, lengths, strict=True)
    }
    eager = {
        name: timed(tokens, ms=100.0, requests=4)
        for name, tokens in zip(names, lengths, strict=True)
    }
    eager[prefills[0].name] = timed(1000, 100.0, prefill=5.0)
    eager[prefills[1].name] = {"requests": 4, "out_of_memory": "the prefill does not fit"}
    details = {
        "engines": {
            "specontext": {"cells": flat},
            "stock": {"cells": rising},
            "hf-eager": {"cells": eager},
        }
    }
    first, second = workloads.make_rows(scenes, cells, details)
    # 20 requests at 10 ms; 10 requests at 25 ms on average; 4 at 100 ms.
    assert (first["sparse_rate"], first["stock_rate"], first["hf_eager_rate"]) == pytest.approx(
        (2000, 400, 40)
    )
    assert (first["times_eager"], first["times_stock"]) == pytest.approx((50, 5))
    # 3000 tokens each: 1 s + 30 s; 2 s + 75 s.
    assert first["sparse_whole"] == pytest.approx(20 * 3000 / 31) and first[
        "stock_whole"
    ] == pytest.approx(10 * 3000 / 77)
    assert first["hf_eager_whole"] == pytest.approx(4 * 3000 / 305)
    # The second one's prompt is prefilled in two pieces.
    assert second["stock_prefill"] == 4.0 and second["stock_step"] == pytest.approx(35)
    # Its decode steps were timed on a filled cache; only what needs the prefill is missing.
    assert second["hf_eager_rate"] == pytest.approx(40) and "times_eager" in second
    assert (
        second["hf_eager_prefill"] == second["hf_eager_whole"] == "out of memory"
        and "times_eager_whole" not in second
    )
    details["engines"]["stock"]["cells"] = {}
    assert "stock_rate" not in workloads.make_rows(scenes, cells, details)[0]


def test_served_rows_compare_throughput_and_tpot():
    load = serving.parse_loads("8k/1k", "24", Shape.named("8b"), 32)[0]
    assert (load.prompt, load.output, load.cell) == (8192, 1024, "8k/1k@24")
    figures = dict.fromkeys(serving.COLUMNS, 1.0)
    faster = figures | {"output_throughput": 3.0, "median_tpot_ms": 0.5}
    details = {
        "engines": {
            "stock": {"cells": {load.cell: figures}},
            "specontext": {"cells": {load.cell: faster}},
        }
    }
    (row,) = serving.make_rows([load], details)
    assert (row["times_throughput"], row["times_tpot"]) == (3.0, 2.0)
    assert serving.make_rows([load], {"engines": {}}) == [{"lengths": "8k/1k", "concurrency": 24}]


def test_the_shapes_tokenizer_gives_back_every_token(tmp_path):
    from transformers import AutoTokenizer

    shape = Shape.named("tiny")
    serving.write_tokenizer(shape, shape.write(tmp_path))
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    tokens = np.random.default_rng(0).integers(0, shape.vocab_size, 500).tolist()
    assert len(tokenizer) == shape.vocab_size
    assert tokenizer.encode(tokenizer.decode(tokens)) == tokens
    assert tokenizer.eos_token_id == shape.eos_token_id


def test_engines_differ_in_the_backend_alone():
    def arguments(name, **settings):
        return EngineSpec(
            name, "/m", on_gpu=False, budget=256, max_num_seqs=4, steps=8, **settings
        ).arguments()

    stock = arguments("stock")
    for name, retriever in (
        ("specontext", {"retrieval_head": "dummy"}),
        ("quest", {"retriever": "quest"}),
    ):
        ours = arguments(name)
        assert ours.pop("additional_config") == {"specontext": retriever | {"budget": 256}}
        assert ours.pop("attention_backend") == "specontext"
        assert ours == stock
    tiered = arguments("specontext", gpu_gib=1.0, host_gib=2.0)["additional_config"]["specontext"]
    assert tiered == {
        "retrieval_head": "dummy",
        "budget": 256,
        "host_kv_gib": 2.0,
        "stickiness": 0,
        "retriever": "driven",
        "rule_settings": {"shares": [0.05]},
        "gpu_kv_gib": 1.0,
    }


def test_several_workers_share_what_a_step_reads():
    arguments = EngineSpec("stock", "/m", False, 256, 4, 8, workers=4).arguments()
    assert (arguments["tensor_parallel_size"], arguments["distributed_executor_backend"]) == (
        4,
        "mp",
    )
    assert "tensor_parallel_size" not in EngineSpec("stock", "/m", False, 256, 4, 8).arguments()
    figures = {
        "requests": 24,
        "context_tokens": 32768,
        "step_ms": {"median": 9.0, "p10": 1, "p90": 1},
    }
    details = {
        "engines": {"stock": {"cells": {"24x32k": figures}}},
        "stages_ms": {},
        "copy_bandwidth_bytes_per_s": 4e12,
    }
    shape, cells = Shape.named("70b"), [Cell.parse("24x32k")]
    (alone,) = steps.make_rows(shape, cells, details, 2048)
    (shared,) = steps.make_rows(shape, cells, details | {"workers": 4}, 2048)
    for limit in ("stock_limit", "sparse_limit"):
        assert shared[limit] == pytest.approx(alone[limit] / 4)
    assert shared["limit_ratio"] == alone["limit_ratio"]


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (
            ["speed", "steps", "--tensor-parallel-size", "4"],
            "--tensor-parallel-size: found 4, but this machine has 2 GPU(s)",
        ),
        (
            ["capacity", "--tensor-parallel-size", "4"],
            "--tensor-parallel-size: found 4, but this machine has 2 GPU(s)",
        ),
        (
            ["speed", "steps", "--tensor-parallel-size", "2", "--engines", "hf-sdpa"],
            "--engines: found hf-sdpa, which run on one GPU, but --tensor-parallel-size is 2",
        ),
        (["link", "--at-once", "1,4"], "found 4, but this machine has 2 GPU(s)"),
    ],
)
def test_more_workers_than_gpus_are_refused(monkeypatch, tmp_path, arguments, sentence):
    two = [{"name": "NVIDIA H200", "driver": "1", "memory": "143771 MiB"}] * 2
    for module in ("workers", "link"):
        monkeypatch.setattr(f"benchmarks.{module}.gpus", lambda: two)
    done = CliRunner().invoke(app, [*arguments, "--out", str(tmp_path)])
    assert done.exit_code == 2 and sentence in " ".join(done.output.replace("│", "").split())
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["link", "--at-once", "two"], "--at-once: found 'two'; give numbers separated by commas."),
        (
            ["speed", "serve", "--server-options", "'--swap 1"],
            '--server-options: found "\'--swap 1" (No closing quotation); close the quotes.',
        ),
    ],
)
def test_options_that_cannot_be_read_are_refused(tmp_path, arguments, sentence):
    done = CliRunner().invoke(app, [*arguments, "--out", str(tmp_path)])
    assert done.exit_code == 2 and done.output.strip() == sentence
    assert not list(tmp_path.iterdir())


def test_servers_take_more_options():
    loads = serving.parse_loads("64/8", "1", Shape.named("tiny"), 4)
    for engine in ("specontext", "stock"):
        options = serving.server_arguments(engine, loads, 256, 4, False, ["--swap", "1"])
        assert options[options.index("--swap") + 1] == "1"


@pytest.mark.slow
def test_a_tiny_run_of_the_steps(forked_children, tmp_path):
    options = [
        "--cells",
        "2x160,2x64",
        "--model-shape",
        "tiny",
        "--budget",
        "128",
        "--timed",
        "2",
        "--engines",
        "specontext,hf-eager",
    ]
    done = CliRunner(env={"VLLM_CPU_KVCACHE_SPACE": "1"}).invoke(
        app, ["speed", "steps", *options, "--out", str(tmp_path), "--work", str(tmp_path / "work")]
    )
    assert done.exit_code == 0, done.output
    (path,) = tmp_path.glob("speed-steps-*.json")
    assert path.with_suffix(".md").exists() and path.with_suffix(".png").exists()
    result = json.loads(path.read_text())
    short, long = result["rows"]
    assert (short["cell"], long["cell"]) == ("2 x 64", "2 x 160")
    for row in result["rows"]:
        assert (
            row["sparse"] > 0
            and row["hf_eager"] > 0
            and row["sparse_limit"] > 0
            and row["attention"] > 0
        )
    # Within the budget all pages are read, beyond it the budget's share; the longer prompts began
    # in the prefix cache.
    assert short["pages_read"] == 1.0 and 0.5 < long["pages_read"] < 0.9
    cells = result["details"]["engines"]["specontext"]["cells"]
    assert (cells["2x64"]["cached_tokens"], cells["2x160"]["cached_tokens"]) == (0, 2 * 64)
    assert "sparse_prefill" in short and "sparse_prefill" not in long
