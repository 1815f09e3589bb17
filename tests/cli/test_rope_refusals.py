"""Which RoPE settings of a head are refused, and that everybody refuses the same."""

import re
from types import SimpleNamespace

import pytest
import torch

from specontext_vllm.config import ConfigError
from specontext_vllm.engine.find_head import load_head
from specontext_vllm.retrieval.checkpoint import HeadError, read_checkpoint
from specontext_vllm.retrieval.head import RetrievalHead
from tests.cli.inspecting import run, write_target
from tests.retrieval.eagle3_files import Layout, write_checkpoint

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
        "No finite rotary angles can be made with",
    ),
    "yarn_beta_nan": (YARN | {"beta_slow": NAN}, "beta_slow nan where a finite number is needed"),
    "yarn_beta_negative": (
        YARN | {"beta_fast": -1.0},
        "No rotary angles can be made with .*ValueError",
    ),
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
        "No rotary angles can be made with the head's rope_theta 1 .ZeroDivisionError",
    ),
    "base_near_zero": (
        LINEAR | {"rope_theta": 1e-300},
        "No finite rotary angles can be made with the head's rope_theta 1e-300",
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
