"""`specontext inspect`."""

import json

import pytest
import torch
from huggingface_hub import constants

from specontext_vllm.retrieval.checkpoint import save_head
from tests.cli.inspecting import TARGET, run, write_target
from tests.retrieval.eagle3_files import Layout, make_tensors, write_checkpoint
from tests.retrieval.own_heads import make_own


@pytest.fixture
def head(tmp_path):
    folder = tmp_path / "head"
    folder.mkdir()
    return write_checkpoint(folder, Layout(own_embedding=True))


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
        "its token's embedding, the states before ",
        "gated MLPs",
        "yes: a whole draft model",
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


def test_the_layers_that_are_selected_for_are_counted(head, tmp_path):
    assert "It selects for" not in run(head, "--target", write_target(tmp_path)).output
    (tmp_path / "mixed").mkdir()
    kinds = ["linear_attention"] * 3 + ["full_attention"]
    mixed = write_target(tmp_path / "mixed", layer_types=kinds * 3)
    output = run(head, "--target", mixed).output
    assert "It selects for 3 of its 12 layers, those that attend to the whole context." in output


def test_of_a_hybrid_layers_are_counted_by_its_rule_and_states_are_named(head, tmp_path):
    """Released Qwen3-Next models say that each fourth layer attends fully, and list none."""
    rule = {
        "model_type": "qwen3_next",
        "full_attention_interval": 4,
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 4,
        "linear_key_head_dim": 8,
        "linear_value_head_dim": 16,
        "linear_conv_kernel_dim": 4,
        "dtype": "float32",
    }
    output = run(head, "--target", write_target(tmp_path, **rule)).output
    assert "It selects for 3 of its 12 layers" in output
    size = 4 * (3 * (2 * 2 * 8 + 4 * 16) + 4 * 16 * 8)
    assert f"9 layers keep a state: {9 * size:,} bytes a request" in output


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


def test_a_head_of_our_own_shows_what_is_its_own(tmp_path):
    made = make_own(q_mlp=12, k_mlp=20, fc_norm=True)
    save_head(tmp_path / "head", made.spec, made.tensors)
    result = run(tmp_path / "head", "--target", write_target(tmp_path))
    assert result.exit_code == 0, result.output
    for text in (
        "specontext",
        "k_mlp.down_proj.weight",
        "30 x 20",
        "12, 3, 10",
        "a key is made from",
        "its token's embedding, the states before and its own",
        "12 wide for queries, 20 wide for keys",
        "embedding, feature, a norm for each layer before fc",
        "no: a head for retrieval alone",
        "0, 3, 4, 9 (aux_layer_ids)",
        "Fits ",
    ):
        assert text in result.stdout
    assert "specontext prune" not in result.stdout


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


WRONG_TARGETS = {
    "no layers": ({"num_hidden_layers": 0}, "num_hidden_layers 0, where a number above 0"),
    "layers: yes": ({"num_hidden_layers": True}, "num_hidden_layers True, where a number"),
    "KV heads in words": ({"num_key_value_heads": "x"}, "num_key_value_heads 'x', where"),
    "length in words": ({"max_position_embeddings": "x"}, "max_position_embeddings 'x', where"),
    "length under 0": ({"max_position_embeddings": -1}, "max_position_embeddings -1, where"),
    "nested number": ({"text_config": 5}, "text_config 5, where the language model's settings"),
    "dtype list": ({"model_type": "llama", "dtype": ["x"]}, "holds a value that cannot be used"),
    "kinds a number": ({"layer_types": 5}, "holds a value that cannot be used"),
    "kinds unknown": (
        {"model_type": "llama", "layer_types": ["x"] * 12},
        "holds a value that cannot be used",
    ),
}


@pytest.mark.parametrize("name", WRONG_TARGETS)
def test_a_wrong_target_is_one_sentence(head, tmp_path, name):
    changes, sentence = WRONG_TARGETS[name]
    result = run(head, "--target", write_target(tmp_path, **changes))
    assert (result.exit_code, result.stdout) == (2, "")
    assert sentence in result.stderr and result.stderr.count("\n") == 1


def test_a_target_that_transformers_does_not_know_is_taken_as_it_is(head, tmp_path):
    result = run(head, "--target", write_target(tmp_path, model_type="of_tomorrow"))
    assert result.exit_code == 0, result.output


@pytest.mark.parametrize("content", ["[" * 100_000, '{"hidden_size": ' + "9" * 5000 + "}"])
def test_json_that_cannot_be_parsed_is_one_sentence(head, content):
    (head / "config.json").write_text(content)
    result = run(head)
    assert result.exit_code == 2 and "config.json is not valid JSON (" in result.stderr
