import json

import pytest
from typer.testing import CliRunner

from specontext_vllm.cli import app
from tests.retrieval.eagle3_files import Layout, write_checkpoint

TARGET = {"hidden_size": 40, "num_hidden_layers": 12, "num_attention_heads": 6, "num_key_value_heads": 3, "vocab_size": 77}


def run(*arguments):
    return CliRunner().invoke(app, ["inspect", *map(str, arguments)], env={"COLUMNS": "200"})


@pytest.fixture
def head(tmp_path):
    folder = tmp_path / "head"
    folder.mkdir()
    return write_checkpoint(folder, Layout(own_embedding=True))


def write_target(tmp_path, **changes):
    folder = tmp_path / "target"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(TARGET | changes))
    return folder


def test_report(head):
    result = run(head)
    assert result.exit_code == 0, result.output
    kept = 40 * 120 + 2 * 40 + (60 + 30) * 80
    pruned = 30 * 80 + 40 * 60 + 3 * 56 * 40 + 2 * 40
    embedding, lm_head = 77 * 40, 33 * 40
    total = kept + pruned + embedding + lm_head
    for text in (
        "safeailab",
        "midlayer.self_attn.q_proj.weight",
        "60 x 80",
        f"{kept + embedding:,} of {total:,}: {100 * (pruned + lm_head) / total:.1f} % pruned",
        f"{kept:,} of {kept + pruned:,}: {100 * pruned / (kept + pruned):.1f} % pruned",
        f"{4 * kept:,}",
        "2, L//2, L-3",
        "6, 3, 10",
        "theta 10000, scaling none (YaRN beyond the trained length), trained length 64",
    ):
        assert text in result.output


def test_target_that_fits(head, tmp_path):
    result = run(head, "--target", write_target(tmp_path))
    assert result.exit_code == 0, result.output
    assert result.output.endswith("target: reads its layers 2, 6, 9 (default, its config.json names none).\n") and "Fits " in result.output


def test_target_with_nested_text_config(head, tmp_path):
    folder = write_target(tmp_path)
    (folder / "config.json").write_text(json.dumps({"text_config": TARGET}))
    assert run(head, "--target", folder).exit_code == 0


def test_target_that_does_not_fit(head, tmp_path):
    result = run(head, "--target", write_target(tmp_path, num_key_value_heads=2))
    assert result.exit_code == 1
    assert "Does not fit" in result.output and "The head has 3 KV heads" in result.output


@pytest.mark.parametrize("missing", ["hidden_size", "vocab_size"])
def test_target_without_shape(head, tmp_path, missing):
    folder = write_target(tmp_path)
    (folder / "config.json").write_text(json.dumps({k: v for k, v in TARGET.items() if k != missing}))
    result = run(head, "--target", folder)
    assert result.exit_code == 2 and missing in result.stderr


def test_unusable_checkpoint_is_one_line_on_stderr(tmp_path):
    result = run(tmp_path)
    assert result.exit_code == 2
    assert result.stdout == "" and result.stderr.count("\n") == 1 and "holds no config.json" in result.stderr


def test_unknown_hub_id(monkeypatch):
    def offline(*args, **kwargs):
        raise OSError("no route to host")

    monkeypatch.setattr("huggingface_hub.snapshot_download", offline)
    result = run("some/head")
    assert result.exit_code == 2 and "did not provide it" in result.stderr
