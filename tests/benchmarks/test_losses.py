"""Variants of the distillation loss: which layers a target is taken from, any model folder, what
decodes the needles.
"""

import json
import shutil

import pytest
import torch
from typer.testing import CliRunner

from benchmarks.__main__ import app
from benchmarks.losses import command
from benchmarks.losses.variants import VARIANTS, Target, collectors_of
from benchmarks.plain_model import plain_model
from specontext_vllm.distillation.losses import AttentionTarget
from specontext_vllm.distillation.shape import DraftShape
from specontext_vllm.distillation.teacher import Teacher, load_teacher, read_config
from tests.distillation.tiny_models import make_config, write_model
from tests.engine.conftest import DEMO_MODEL

LAYERS = 5


def test_layers_by_name():
    chosen = {
        name: list(Target.of(96, "max", name, LAYERS).layers)
        for name in ("all", "first half", "last half", "every second")
    }
    assert chosen == {
        "all": [0, 1, 2, 3, 4],
        "first half": [0, 1],
        "last half": [2, 3, 4],
        "every second": [1, 3],
    }


@pytest.mark.parametrize("over", ["max", "mean"])
def test_a_target_is_that_of_its_layers_alone(over):
    generator = torch.Generator().manual_seed(0)
    shown = [
        (
            torch.randn(1, 4, 24, 8, generator=generator),
            torch.randn(1, 2, 24, 8, generator=generator),
            torch.tensor([[9, 22]]),
        )
        for _ in range(LAYERS)
    ]
    targets = [
        Target.of(5, over, name, LAYERS)
        for name in ("all", "first half", "last half", "every second")
    ]
    collectors = collectors_of(targets)
    for arguments in shown:
        collectors.observe(*arguments)
    found = []
    for target in targets:
        alone = AttentionTarget(5, over)
        for number in target.layers:
            alone.observe(*shown[number])
        for mine, theirs in zip(collectors.each[target].result(), alone.result(), strict=True):
            torch.testing.assert_close(mine, theirs)
        found.append(alone.result()[0])
    assert all(not torch.allclose(found[0], other) for other in found[1:])


def teacher_of(folder):
    shape = DraftShape.for_target(read_config(folder), max_position=64)
    return Teacher(load_teacher(folder, torch.device("cpu"), torch.float32), shape.aux_layers)


def test_the_model_that_decodes_is_the_teacher(tmp_path):
    teacher = teacher_of(
        write_model(tmp_path, make_config("llama", num_key_value_heads=1, rope_theta=777.0))
    )
    ids = torch.randint(0, 97, (1, 40), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        torch.testing.assert_close(
            plain_model(teacher)(ids), teacher.model(ids).logits, rtol=1e-4, atol=1e-4
        )


@pytest.mark.parametrize(
    ("family", "changes"),
    [
        ("qwen2", {}),
        ("qwen3", {}),
        ("llama", {"attention_bias": True}),
        ("llama", {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}}),
    ],
    ids=["qwen2", "qwen3", "bias", "stretched"],
)
def test_other_models_decode_no_needles(tmp_path, family, changes):
    assert plain_model(teacher_of(write_model(tmp_path, make_config(family, **changes)))) is None


def test_another_model_has_a_result_of_its_own(tmp_path, monkeypatch):
    """A Qwen with a head that drafts a part of the vocabulary: every variant in one step."""
    vocabulary = read_config(DEMO_MODEL).vocab_size
    model = write_model(
        tmp_path / "small",
        make_config("qwen2", vocab_size=vocabulary, max_position_embeddings=1024),
    )
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copy(DEMO_MODEL / name, model)
    monkeypatch.setattr(command, "DRAFT_VOCABULARY", 500)
    arguments = [
        "--model",
        str(model),
        "--steps",
        "1",
        "--context",
        "512",
        "--held-out",
        "2",
        "--out",
        str(tmp_path / "out"),
    ]
    done = CliRunner().invoke(app, ["losses", *arguments])
    assert done.exit_code == 0, done.output
    (path,) = (tmp_path / "out").glob("*.json")
    assert path.name.startswith("losses-small-")
    result = json.loads(path.read_text())
    assert result["title"].endswith("on small")
    assert [row["name"] for row in result["rows"]] == [*VARIANTS, "the best choice there is"]
    aligned = {name: result["details"]["last_losses"][name].get("align") for name in VARIANTS}
    layers = [
        "as `specontext distill` does",
        "first half of the layers",
        "last half of the layers",
        "every second layer",
    ]
    assert len({aligned[name] for name in layers}) == 4
    assert not any(
        "needle" in row for row in result["rows"]
    ) and "Needles: not decoded" in " ".join(result["notes"])


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--model", "/nowhere"], "--model: /nowhere has no config.json"),
        (["--context", "20000"], "--context: found 20000"),
    ],
    ids=["model", "context"],
)
def test_a_wrong_option_ends_with_its_name(arguments, told, tmp_path):
    done = CliRunner().invoke(app, ["losses", *arguments, "--out", str(tmp_path)])
    assert done.exit_code == 2 and told in done.stderr
