import json
import re
from types import SimpleNamespace

import pytest
import torch
from huggingface_hub import constants
from typer.testing import CliRunner

from specontext_vllm.cli import app
from specontext_vllm.config import ConfigError
from specontext_vllm.engine.find_head import load_head
from specontext_vllm.retrieval.checkpoint import HeadError, read_checkpoint
from specontext_vllm.retrieval.head import RetrievalHead
from tests.retrieval.eagle3_files import Layout, make_tensors, write_checkpoint

TARGET = {
    "hidden_size": 40,
    "num_hidden_layers": 12,
    "num_attention_heads": 6,
    "num_key_value_heads": 3,
    "vocab_size": 77,
}


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
    assert (
        result.output.endswith(
            "target: reads its layers 2, 6, 9 (default, its config.json names none).\n"
        )
        and "Fits " in result.output
    )


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
    (folder / "config.json").write_text(
        json.dumps({k: v for k, v in TARGET.items() if k != missing})
    )
    result = run(head, "--target", folder)
    assert result.exit_code == 2 and missing in result.stderr


def test_unusable_checkpoint_is_one_line_on_stderr(tmp_path):
    result = run(tmp_path)
    assert result.exit_code == 2
    assert (
        result.stdout == ""
        and result.stderr.count("\n") == 1
        and "holds no config.json" in result.stderr
    )


def test_unknown_hub_id():
    result = run("some/head")
    assert (
        result.exit_code == 2
        and "some/head is no folder here, its revision main is not in the Hugging Face cache"
        in result.stderr
    )


def test_a_revision_is_asked_of_the_hub_and_no_folder_has_one(head, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr(
        "huggingface_hub.snapshot_download",
        lambda name, **asked: head if asked["revision"] == "v2" else None,
    )
    result = run("some/head", "--revision", "v2")
    assert (
        result.exit_code == 0
        and f"taking some/head from {constants.ENDPOINT} at revision v2, which is not pinned"
        in result.stderr
    )
    result = run(head, "--revision", "v2")
    assert (
        result.exit_code == 2 and "is a folder, which has no revision 'v2': leave" in result.stderr
    )


def test_the_pruned_head_is_offered_written_and_fits(head, tmp_path):
    target = write_target(tmp_path)
    kept = 4 * (40 * 120 + 2 * 40 + (60 + 30) * 80 + 77 * 40)
    whole = (
        kept + 4 * (30 * 80 + 40 * 60 + 3 * 56 * 40 + 2 * 40 + 33 * 40) + 8 * 33 + 77
    )  # d2t and t2d come last
    offer = f"--write-pruned FOLDER writes the {kept:,} of {whole:,} bytes that selection reads."
    assert run(head).stdout.endswith(f"{offer}\n")
    pruned = tmp_path / "pruned"
    result = run(head, "--target", target, "--write-pruned", pruned)
    assert result.exit_code == 0, result.output
    assert (
        f"Wrote {pruned}: {kept:,} of {whole:,} bytes. It selects as the whole head does; as a "
        "draft model it no longer serves." in result.stdout
    )
    result = run(pruned, "--target", target)
    assert (
        result.exit_code == 0
        and f"Fits {target}: reads its layers 2, 6, 9" in result.stdout
        and "--write-pruned" not in result.stdout
    )


def test_a_head_that_does_not_fit_is_not_written(head, tmp_path):
    result = run(
        head,
        "--target",
        write_target(tmp_path, num_key_value_heads=2),
        "--write-pruned",
        tmp_path / "pruned",
    )
    assert result.exit_code == 1 and not (tmp_path / "pruned").exists()


@pytest.mark.parametrize(
    "place, sentence",
    [
        ("head", "holds something already"),
        ("head/config.json/new", "cannot be written (NotADirectoryError"),
    ],
)
def test_a_place_that_cannot_take_the_pruned_head_is_one_line_on_stderr(
    head, tmp_path, place, sentence
):
    before = (head / "config.json").read_bytes()
    result = run(head, "--write-pruned", tmp_path / place)
    assert result.exit_code == 2 and sentence in result.stderr and result.stderr.count("\n") == 1
    assert (head / "config.json").read_bytes() == before


LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 48,
}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}
LINEAR = {"rope_type": "linear", "factor": 2.0}
DYNAMIC = {"rope_type": "dynamic", "factor": 2.0}
LONGROPE = {
    "rope_type": "longrope",
    "short_factor": [1.0, 1.1, 1.2, 1.3, 1.4],
    "long_factor": [2.0, 3.0, 4.0, 5.0, 6.0],
    "original_max_position_embeddings": 16,
}
SECTIONS = {"mrope_section": [2, 2, 1]}
NAN, INF = float("nan"), float("inf")


def without(settings, *keys):
    return {key: value for key, value in settings.items() if key not in keys}


# RoPE settings, and what all three say of them; None: they serve.
ROPES = {
    "none": ({}, None),
    "linear": (LINEAR, None),
    "llama3": (LLAMA3, None),
    "llama3_without_a_band": (LLAMA3 | {"high_freq_factor": 1.0}, None),
    "yarn": (YARN, None),
    "dynamic": (DYNAMIC, None),
    "longrope": (LONGROPE, None),
    "su": (without(LONGROPE, "rope_type") | {"type": "su"}, None),
    "su_and_longrope": (LONGROPE | {"type": "su"}, None),
    "mrope": ({"type": "mrope"} | SECTIONS, None),
    "mrope_as_rope_type": ({"rope_type": "mrope", "mrope_interleaved": True} | SECTIONS, None),
    "mrope_and_default": ({"type": "mrope", "rope_type": "default"} | SECTIONS, None),
    "yarn_with_sections": (YARN | SECTIONS, None),
    "mrope_without_sections": ({"type": "mrope"}, "type 'mrope' and no mrope_section"),
    "two_types": (YARN | {"type": "linear"}, "type 'linear' and rope_type 'yarn'"),
    "unknown_type": (
        {"rope_type": "spiral"},
        "rope_type 'spiral', and transformers knows only dynamic, linear",
    ),
    "type_is_a_list": ({"rope_type": ["yarn"]}, "cannot be used|knows only"),
    "linear_without_factor": (without(LINEAR, "factor"), "Missing required keys.*factor"),
    "llama3_without_low": (
        without(LLAMA3, "low_freq_factor"),
        "Missing required keys.*low_freq_factor",
    ),
    "yarn_without_factor": (without(YARN, "factor"), "Missing required keys.*factor"),
    "longrope_without_a_list": (
        without(LONGROPE, "short_factor"),
        "has no list of the 5 numbers that short_factor must hold",
    ),
    "longrope_too_short": (
        LONGROPE | {"long_factor": [1.0]},
        "has 1 of the 5 numbers that long_factor must hold",
    ),
    "longrope_zero": (
        LONGROPE | {"long_factor": [1.0, 0.0, 1.0, 1.0, 1.0]},
        "long_factor .* where a finite number above 0",
    ),
    "longrope_in_words": (
        LONGROPE | {"long_factor": ["1", "1", "1", "1", "1"]},
        "long_factor .* where a finite number above 0",
    ),
    "factor_zero": (LINEAR | {"factor": 0.0}, "factor 0.0 where a finite number above 0 is needed"),
    "factor_negative": (
        DYNAMIC | {"factor": -2},
        "factor -2 where a finite number above 0 is needed",
    ),
    "factor_infinite": (
        LINEAR | {"factor": INF},
        "factor inf where a finite number above 0 is needed",
    ),
    "factor_nan": (LINEAR | {"factor": NAN}, "factor nan where a finite number above 0 is needed"),
    "factor_in_words": (
        LINEAR | {"factor": "2"},
        "factor '2' where a finite number above 0 is needed",
    ),
    "yarn_factor_nan": (
        YARN | {"factor": NAN},
        "factor nan where a finite number above 0 is needed",
    ),
    "yarn_attention_factor_zero": (
        YARN | {"attention_factor": 0.0},
        "attention_factor 0.0 where a finite number above 0 is needed",
    ),
    "yarn_attention_factor_beyond_float32": (
        YARN | {"attention_factor": 1e39},
        "No finite rotary angles come of",
    ),
    "yarn_beta_nan": (YARN | {"beta_slow": NAN}, "beta_slow nan where a finite number is needed"),
    "yarn_beta_negative": (YARN | {"beta_fast": -1.0}, "No rotary angles come of .*ValueError"),
    "yarn_original_length_zero": (
        YARN | {"original_max_position_embeddings": 0},
        "original_max_position_embeddings 0 where",
    ),
    "llama3_low_zero": (LLAMA3 | {"low_freq_factor": 0.0}, "low_freq_factor 0.0 where"),
    "mscale_nan": (
        YARN | {"mscale": NAN, "mscale_all_dim": 1.0},
        "mscale nan where a finite number is needed",
    ),
    "base_of_one": (
        {"rope_theta": 1.0},
        "No rotary angles come of the head's rope_theta 1 .ZeroDivisionError",
    ),
    "base_near_zero": (
        LINEAR | {"rope_theta": 1e-300},
        "No finite rotary angles come of the head's rope_theta 1e-300",
    ),
}


@pytest.mark.parametrize("settings, sentence", ROPES.values(), ids=ROPES)
def test_inspect_the_config_check_and_a_worker_come_to_the_same(tmp_path, settings, sentence):
    folder = tmp_path / "head"
    folder.mkdir()
    write_checkpoint(folder, Layout(config={"rope_scaling": settings}))
    target = write_target(tmp_path, max_position_embeddings=512)

    def worker():
        head = RetrievalHead(
            read_checkpoint(folder), max_position=512, dtype=torch.float32, device="cpu"
        )
        assert torch.isfinite(head.cos_sin).all() and len(head.cos_sin.unique(dim=0)) == 512

    def config_check():
        text = SimpleNamespace(num_hidden_layers=12)
        model = SimpleNamespace(
            hf_text_config=text,
            get_hidden_size=lambda: 40,
            get_total_num_kv_heads=lambda: 3,
            get_vocab_size=lambda: 77,
            max_model_len=512,
            dtype=torch.bfloat16,
        )
        load_head(
            str(folder),
            SimpleNamespace(
                model_config=model,
                additional_config={},
                parallel_config=SimpleNamespace(tensor_parallel_size=1),
            ),
        )

    found = []
    for place in (worker, config_check):
        try:
            place()
            found.append("")
        except (HeadError, ConfigError) as error:
            found.append(str(error).removeprefix("additional_config.specontext.retrieval_head: "))
    result = run(folder, "--target", target)
    refusal = (
        result.stderr
        if result.exit_code == 2
        else result.stdout[result.stdout.find("Does not fit") :]
    )
    found.append(
        "" if result.exit_code == 0 else refusal.removeprefix(f"Does not fit {target}: ").strip()
    )
    assert found == found[:1] * 3
    if sentence is None:
        assert found[0] == "" and f"Fits {target}" in result.stdout
    else:
        assert found[0].endswith(".") and ". " not in found[0] and "\n" not in found[0]
        assert re.search(sentence, found[0])


@pytest.mark.parametrize("key", ["dtype", "torch_dtype"])
def test_a_weight_beyond_the_targets_float16_does_not_fit(tmp_path, key):
    (tmp_path / "head").mkdir()
    tensors = make_tensors(Layout(dtype=torch.bfloat16))
    tensors["fc.weight"].view(-1)[5] = -1e5
    head = write_checkpoint(tmp_path / "head", Layout(dtype=torch.bfloat16), tensors)
    assert run(head, "--target", write_target(tmp_path)).exit_code == 0
    (tmp_path / "target" / "config.json").write_text(json.dumps(TARGET | {key: "float16"}))
    result = run(head, "--target", tmp_path / "target")
    assert (
        result.exit_code == 1
        and "fc.weight holds values up to 99840, which float16 cannot" in result.stdout
    )
