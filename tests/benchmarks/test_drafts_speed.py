"""The case `drafts`: its rows, its head, contexts that nobody computed, and one tiny run."""

import json
from types import SimpleNamespace

import pytest
import torch
from typer.testing import CliRunner

from benchmarks.__main__ import app
from benchmarks.drafts import command
from benchmarks.drafts.engine import DraftSpec, accept
from benchmarks.drafts.head import write_eagle3
from benchmarks.drafts.tables import make_rows
from benchmarks.engines import Cell
from benchmarks.shapes import Shape
from tests.conftest import CUDA


def figures(tokens, drafts=0.0, rows=1.0):
    step = dict.fromkeys(("median", "p10", "p90", "mean"), 5.0)
    return {
        "tokens_per_s": tokens,
        "step_ms": step,
        "drafts": drafts,
        "tokens_per_row": rows,
        "graph": "FULL",
    }


def test_each_row_compares_with_stock_without_and_with_as_many_drafts():
    full = {"requests": 2, "out_of_memory": "it does not fit"}
    details = {
        "engines": {
            "stock": {"cells": {"2x1k": figures(100.0)}},
            "specontext": {"cells": {"2x1k": figures(300.0)}},
            "stock, 3 drafts": {"cells": {"2x1k at 0.8": figures(200.0, 3, 2.9)}},
            "specontext, 3 drafts": {"cells": {"2x1k at 0.8": figures(800.0, 3, 2.9)}},
            "specontext, 1 drafts": {"cells": {"2x1k at 0.8": figures(500.0, 1, 1.8)}},
            "lossless": {"cells": {"2x1k at 0.8": figures(180.0, 4.5, 3.6), "2x1k at 0.9": full}},
        }
    }
    rows = make_rows([Cell.parse("2x1k")], [1, 3], [0.8, 0.9], details)
    one, three = [row for row in rows if "drafts_cell" in row]
    assert one["drafts"] == 1 and one["over_stock"] == 5.0 and "over_stock_drafts" not in one
    assert three["over_stock"] == 8.0 and three["over_stock_drafts"] == 4.0
    (lossless,) = [row for row in rows if "lossless_cell" in row]
    assert lossless["lossless_over_stock"] == 1.8 and lossless["lossless_drafts"] == 4.5
    steps = {(row["engine"], row["acceptance"]): row for row in rows if "step_cell" in row}
    assert len(steps) == 7
    assert steps["lossless", 0.9]["step"] == "out of memory"
    assert steps["stock", None]["graph"] == "FULL"


def test_the_first_number_of_drafts_comes_first_for_every_engine():
    chosen = ["stock", "specontext-drafts", "lossless", "stock-drafts"]
    assert command._runs(chosen, [3, 1]) == [
        ("stock", 0),
        ("specontext-drafts", 3),
        ("lossless", 0),
        ("stock-drafts", 3),
        ("specontext-drafts", 1),
        ("stock-drafts", 1),
    ]


@pytest.mark.parametrize(
    ("option", "value", "sentence"),
    [
        ("--drafts", "0", "--drafts: found '0'; give numbers from 1 to 16"),
        ("--acceptance", "80", "--acceptance: found '80'; give numbers from 0 to 1"),
        ("--engines", "ours", "--engines: found 'ours'; use stock, specontext-drafts"),
        ("--cells", "fitx1k", "--cells: found fit; name the number of requests"),
    ],
)
def test_other_options_are_refused(tmp_path, option, value, sentence):
    done = CliRunner().invoke(app, ["drafts", option, value, "--out", str(tmp_path)])
    assert done.exit_code == 2 and sentence in done.output


def test_graphs_are_asked_for_every_batch_with_every_number_of_tokens_a_row():
    def sizes(engine, drafts):
        cells = (Cell.parse("24x1k"), Cell.parse("6x1k"))
        spec = DraftSpec(engine, drafts, "/m", "/h", True, 2048, 8, cells, (0.8,), "/go")
        arguments = spec.arguments()
        return arguments["compilation_config"]["cudagraph_capture_sizes"], arguments

    plain, arguments = sizes("stock", 0)
    assert plain == [6, 24] and "speculative_config" not in arguments
    drafted, arguments = sizes("specontext", 3)
    assert {6, 24, 24 * 4, 6 * 4} <= set(drafted)
    assert arguments["additional_config"]["specontext"]["retrieval_head"] == "/h"
    assert arguments["speculative_config"]["model"] == "/h"
    lossless, arguments = sizes("lossless", 0)
    assert {24 * (1 + k) for k in range(7)} <= set(lossless)
    assert arguments["additional_config"]["specontext"]["mode"] == "lossless"
    assert "speculative_config" not in arguments


def test_the_checkpoint_is_a_head_and_a_drafter_of_the_shape(tmp_path):
    from specontext_vllm.retrieval.checkpoint import read_checkpoint

    shape = Shape.named("tiny")
    folder = write_eagle3(shape, tmp_path)
    checkpoint = read_checkpoint(folder)
    assert checkpoint.spec.num_heads == shape.num_attention_heads
    assert checkpoint.spec.aux_layer_ids == (1, 2, 3)
    names = {info.name for info in checkpoint.pruned}
    assert {
        "lm_head.weight",
        "midlayer.mlp.up_proj.weight",
        "midlayer.self_attn.v_proj.weight",
    } <= names
    config = json.loads((folder / "config.json").read_text())
    assert config["draft_vocab_size"] == shape.vocab_size  # all of a small one


def test_vllm_makes_the_same_rates_of_its_own_settings():
    from vllm.v1.worker.gpu.spec_decode import rejection_sampler

    sampler = SimpleNamespace(synthetic_conditional_rates=None)
    runner = SimpleNamespace(rejection_sampler=sampler, device=torch.device("cpu"))
    accept(SimpleNamespace(model_runner=runner), 0.8, 3)
    configured = rejection_sampler.unconditional_to_conditional_rates([0.8, 0.8**2, 0.8**3])
    torch.testing.assert_close(sampler.synthetic_conditional_rates, torch.tensor(configured))


@pytest.mark.slow
def test_a_tiny_run(forked_children, tmp_path):
    options = "--model-shape tiny --cells 2x512 --budget 128 --timed 4 --drafts 2 --acceptance 0.5"
    engines = "specontext-drafts,lossless"
    done = CliRunner(env={"VLLM_CPU_KVCACHE_SPACE": "1"}).invoke(
        app,
        ["drafts", *options.split(), "--engines", engines]
        + ["--out", str(tmp_path), "--work", str(tmp_path / "work")],
    )
    assert done.exit_code == 0, done.output
    (path,) = tmp_path.glob("drafts-tiny-*.json")
    result = json.loads(path.read_text())
    for name in ("specontext, 2 drafts", "lossless"):
        engine = result["details"]["engines"][name]
        (found,) = engine["cells"].values()
        # Nothing was prefilled, and each step answers each row once or more.
        assert found["context_tokens"] > 512 and found["tokens_per_row"] >= 1
        assert found["tokens_per_s"] > 0
        if CUDA:
            assert found["graph"] == "FULL"
            if name != "lossless":
                # 1 + a + a^2 in the mean, of 384 rows.
                assert found["tokens_per_row"] == pytest.approx(1.75, abs=0.15)
    assert result["failures"] == {}
