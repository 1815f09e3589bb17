"""What every command does with arguments that cannot be used: exit code 2 and one sentence that
names them.
"""

import shutil

import pytest
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from benchmarks.shapes import Shape
from specontext_vllm import __version__
from specontext_vllm.cli import app
from specontext_vllm.versions import SUPPORTED_VLLM
from tests.distillation.tiny_models import make_config, write_model
from tests.engine.conftest import DEMO_MODEL

TOO_LONG = "x" * 300


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    """Folders and files that the arguments of ``BAD`` name."""
    root = tmp_path_factory.mktemp("places")
    (root / "file").write_text("text")
    (root / "folder").mkdir()
    Shape.named("8b").write(root / "shape")
    for name in ("whole", "truncated", "lacking"):
        write_model(root / name, make_config("llama", vocab_size=3136))
        for path in DEMO_MODEL.glob("tokenizer*"):
            shutil.copy(path, root / name)
    weights = root / "truncated" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    weights = root / "lacking" / "model.safetensors"
    tensors = load_file(weights)
    del tensors["model.layers.2.mlp.up_proj.weight"]
    save_file(tensors, weights, {"format": "pt"})
    for name, damaged in (("note", "run.json"), ("state", "state.pt")):
        folder = root / f"damaged-{name}" / "training"
        folder.mkdir(parents=True)
        (folder / damaged).write_text("{")
    return root


def plan(*options, model="shape", gpu=80):
    return ["plan", "--model", f"@{model}", "--gpu-gib", gpu, *options]


def distill(*options, model="whole", out="@new", data="synthetic"):
    return [
        "distill",
        "--model",
        f"@{model}",
        "--data",
        data,
        "--out",
        out,
        "--context",
        256,
        "--steps",
        1,
        "--loaders",
        0,
        *options,
    ]


BAD = {
    "plan, a picture below a file": (plan("--out", "@file/plan.png"), "--out: "),
    "plan, a picture that is a folder": (plan("--out", "@folder.png"), "--out: "),
    "plan, a picture of another kind": (plan("--out", "@plan.pdf"), "--out: found"),
    "plan, a picture with a name too long": (plan("--out", f"@{TOO_LONG}.png"), "--out: "),
    "plan, no model": (plan(model="none"), "--model: "),
    "plan, a model that is a file": (plan(model="file"), "--model: "),
    "plan, a model with a name too long": (plan(model=TOO_LONG), "File name too long"),
    "plan, a host pool in lossless mode": (
        plan("--mode", "lossless", "--host-gib", 4),
        "--host-gib: found 4 with --mode lossless",
    ),
    "plan, a drafter in lossless mode": (
        plan("--mode", "lossless", "--drafter", "@shape"),
        "--drafter: ",
    ),
    "plan, no drafter": (plan("--drafter", "@none"), "--drafter: "),
    "plan, no number of GiB": (plan(gpu="nan"), "--gpu-gib: found nan"),
    "plan, endless GiB": (plan(gpu="inf"), "--gpu-gib: found inf"),
    "plan, negative GiB": (plan(gpu=-1), "--gpu-gib: found -1"),
    "plan, too few GiB": (plan(gpu=1), "--gpu-gib: "),
    "plan, no number of host GiB": (plan("--host-gib", "nan"), "--host-gib: found nan"),
    "plan, huge host memory": (plan("--host-gib", 1e300), "--host-gib: found 1e+300"),
    "plan, no requests": (plan("--requests", 0), "--requests: found 0"),
    "plan, endless requests": (plan("--requests", 10**30), "--requests: found 1000"),
    "plan, no length": (plan("--length", 0), "--length: found 0; give 16 to 131072"),
    "plan, a length beyond the model's": (
        plan("--length", 131073),
        "--length: found 131073; give 16 to 131072",
    ),
    "plan, no number of misses": (plan("--miss-rate", "nan"), "--miss-rate: found nan"),
    "plan, more misses than pages": (
        plan("--miss-rate", 1.5),
        "--miss-rate: found 1.5; give 0 to 1.",
    ),
    "plan, no link": (plan("--link-gbps", 0), "--link-gbps: found 0"),
    "plan, an endless link": (plan("--link-gbps", "inf"), "--link-gbps: found inf"),
    "plan, no budget": (plan("--budget", 0), "budget: found 0"),
    "plan, a budget beyond the context": (
        plan("--budget", 2_000_000, "--host-gib", 256),
        "--budget: found 2000000, which holds the longest context",
    ),
    "plan, hardly any host memory": (
        plan("--host-gib", 0.2),
        "0.20 GiB of host memory add less than 2% to what",
    ),
    "plan, a budget that leaves no room": (
        plan("--budget", 100_000, "--host-gib", 256, gpu=28),
        "lower the budget (a buffer holds 100000 tokens)",
    ),
    "top, no address": (["top", "http://[::1", "--once"], "http://[::1: no address"),
    "top, an empty address": (["top", "", "--once"], "no metrics there"),
    "top, another protocol": (["top", "ftp://127.0.0.1:1", "--once"], "no metrics there"),
    "top, no port": (["top", "127.0.0.1:x", "--once"], "no metrics there"),
    "top, nobody there": (["top", "127.0.0.1:1", "--once"], "no metrics there"),
    "top, no number of seconds": (["top", "127.0.0.1:1", "--every", "nan"], "--every: found nan"),
    "top, endless seconds": (["top", "127.0.0.1:1", "--every", "inf"], "--every: found inf"),
    "metrics, no port": (["metrics", "--port", 0], "--port: found 0; give 1 to 65,535."),
    "metrics, a port too many": (["metrics", "--port", 65536], "--port: found 65536"),
    "metrics, no host": (
        ["metrics", "--host", f"{TOO_LONG}.x"],
        "--host, --port: cannot listen on",
    ),
    "distill, a head below a file": (distill(out="@file/head"), "file is a file; give a folder"),
    "distill, a head that is a file": (distill(out="@file"), "file is a file; give a folder"),
    "distill, a head with a name too long": (distill(out=f"@{TOO_LONG}"), "File name too long"),
    "distill, a damaged note of the run": (distill(out="@damaged-note"), "run.json cannot be read"),
    "distill, a damaged state of the run": (
        distill(out="@damaged-state"),
        "state.pt cannot be resumed from",
    ),
    "distill, no model": (distill(model="none"), "--model: "),
    "distill, a truncated model": (
        distill(model="truncated"),
        "truncated cannot be read by AutoModelForCausalLM",
    ),
    "distill, a model without one of its weights": (
        distill(model="lacking"),
        "lacks 1 of its weights (model.layers.2.mlp.up_proj.weight for one)",
    ),
    "distill, no data": (distill(data="@none"), "none is not a file"),
    "distill, data that is a folder": (distill(data="@folder"), "folder is not a file"),
    "distill, data with a name too long": (distill(data=f"@{TOO_LONG}"), "File name too long"),
    "distill, no hours": (distill("--hours", "nan"), "--hours: found nan"),
    "distill, endless hours": (distill("--hours", "inf"), "--hours: found inf"),
    "distill, no rate": (distill("--learning-rate", "nan"), "--learning-rate: found nan"),
    "distill, an endless rate": (distill("--learning-rate", "inf"), "--learning-rate: found inf"),
    "distill, a budget of the whole context": (
        distill("--budget", 256),
        "--budget: found 256; give 112 tokens",
    ),
    "distill, fewer loaders than none": (distill("--loaders", -1), "--loaders: found -1"),
    "distill, a seed below 0": (distill("--seed", -1), "--seed: found -1"),
    "distill, a seed beyond any": (distill("--seed", 10**30), "--seed: found 1000"),
}


@pytest.mark.parametrize("name", BAD)
def test_an_argument_that_cannot_be_used_is_one_sentence_and_exit_code_2(places, tmp_path, name):
    arguments, sentence = BAD[name]
    new = tmp_path / "head"
    given = [
        str(new) if word == "@new" else f"{places}/{word[1:]}" if word.startswith("@") else word
        for word in map(str, arguments)
    ]
    if "@folder.png" in arguments:
        (places / "folder.png").mkdir()
    result = CliRunner().invoke(app, given)
    assert result.exit_code == 2, result.output
    said = [
        line
        for line in result.stderr.splitlines()
        if line and not line.startswith("Loading weights")
    ]
    assert (
        result.stdout == "" and len(said) == 1 and sentence in said[0] and said[0].endswith(".")
    ), result.stderr
    assert not new.exists()


def test_the_version_says_which_vllm(places):
    from importlib.metadata import version

    result = CliRunner().invoke(app, ["--version"])
    assert (
        result.exit_code == 0
        and result.output
        == f"specontext {__version__}, for vllm{SUPPORTED_VLLM}; vLLM here: {version('vllm')}\n"
    )


def test_a_window_that_no_layer_uses_is_none_to_plan_and_distill(tmp_path):
    from transformers import AutoConfig

    from specontext_vllm import planning
    from specontext_vllm.distillation.teacher import check_teacher

    config = make_config("qwen2", use_sliding_window=True, max_window_layers=5, sliding_window=64)
    config.save_pretrained(tmp_path)
    assert set(AutoConfig.from_pretrained(tmp_path).layer_types) == {"full_attention"}
    assert planning.read_model(tmp_path).max_model_len == 512
    check_teacher(config)
    config = make_config("qwen2", use_sliding_window=True, max_window_layers=4, sliding_window=64)
    config.save_pretrained(tmp_path)
    assert planning.read_model(tmp_path).others.windowed == 1
    check_teacher(config)
