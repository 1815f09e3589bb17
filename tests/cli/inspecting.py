"""Runs `specontext inspect` on made-up folders."""

import json

from typer.testing import CliRunner

from specontext_vllm.cli import app

TARGET = {
    "hidden_size": 40,
    "num_hidden_layers": 12,
    "num_attention_heads": 6,
    "num_key_value_heads": 3,
    "vocab_size": 77,
}


def run(*arguments):
    return CliRunner().invoke(app, ["inspect", *map(str, arguments)], env={"COLUMNS": "200"})


def write_target(tmp_path, **changes):
    folder = tmp_path / "target"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(TARGET | changes))
    return folder
