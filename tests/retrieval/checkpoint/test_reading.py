"""Every published layout, and what is kept of it."""

import pytest
import torch

from specontext_vllm.retrieval.checkpoint import (
    read_checkpoint,
    tensor_files,
)
from tests.retrieval.eagle3_files import Layout, make_tensors, write_checkpoint

BASE = {"fc.weight", "embed_norm.weight", "feature_norm.weight", "q_proj.weight", "k_proj.weight"}
BIASES = {"q_proj.bias", "k_proj.bias"}
QK_NORMS = {"q_norm.weight", "k_norm.weight"}
FC_NORMS = {f"fc_norm.{i}.weight" for i in range(3)}

LAYOUTS = {
    "safeailab": (Layout(), BASE),
    "safeailab_bin": (Layout(storage="bin"), BASE),
    "safeailab_bin_before_torch_1.6": (Layout(storage="bin_legacy"), BASE),
    "safeailab_bin_sharded": (Layout(storage="bin_sharded"), BASE),
    "safeailab_sharded": (Layout(storage="safetensors_sharded"), BASE),
    "specforge": (Layout(format="specforge"), BASE),
    "specforge_full_vocabulary": (Layout(format="specforge", vocabulary_maps=False), BASE),
    "specforge_model_prefix": (
        Layout(format="specforge", prefix="model.", own_embedding=True),
        BASE | {"embed_tokens.weight"},
    ),
    "specforge_other_target_width": (Layout(format="specforge", target_hidden_size=56), BASE),
    "speculators": (Layout(format="speculators"), BASE),
    "speculators_qwen3": (Layout(format="speculators", qk_norm=True), BASE | QK_NORMS),
    "speculators_bias": (Layout(format="speculators", bias=True), BASE | BIASES),
    "speculators_norm_before_fc": (
        Layout(format="speculators", norm_before_fc=True),
        BASE | {"input_norm.weight"},
    ),
    "speculators_fc_norm": (Layout(format="speculators", fc_norm=True), BASE | FC_NORMS),
    "speculators_sharded": (Layout(format="speculators", storage="safetensors_sharded"), BASE),
    "bfloat16": (Layout(dtype=torch.bfloat16), BASE),
}


def _canonical(layout: Layout) -> dict[str, str]:
    """Canonical name -> name in the file, spelled out for the test rather than taken from the
    reader.
    """
    block = layout.prefix + ("layers.0." if layout.format == "speculators" else "midlayer.")
    names = {
        "embed_norm.weight": block + "input_layernorm.weight",
        "feature_norm.weight": block + "hidden_norm.weight",
        "q_proj.weight": block + "self_attn.q_proj.weight",
        "q_proj.bias": block + "self_attn.q_proj.bias",
        "k_proj.weight": block + "self_attn.k_proj.weight",
        "k_proj.bias": block + "self_attn.k_proj.bias",
        "q_norm.weight": block + "self_attn.q_norm.weight",
        "k_norm.weight": block + "self_attn.k_norm.weight",
    }
    return names | {
        n: layout.prefix + n
        for n in ("fc.weight", "input_norm.weight", "embed_tokens.weight", *FC_NORMS)
    }


@pytest.mark.parametrize("layout, expected", LAYOUTS.values(), ids=LAYOUTS)
def test_reads_every_layout(tmp_path, layout, expected):
    head = read_checkpoint(write_checkpoint(tmp_path, layout), allow_pickle="bin" in layout.storage)
    original = make_tensors(layout)
    assert set(head.tensors) == expected
    for canonical, tensor in head.tensors.items():
        torch.testing.assert_close(tensor, original[_canonical(layout)[canonical]], rtol=0, atol=0)
    kept, pruned = {info.name for info in head.kept}, {info.name for info in head.pruned}
    assert kept == {_canonical(layout)[name] for name in expected}
    assert kept | pruned == set(original) and not kept & pruned
    assert {info.name: info.shape for info in head.kept + head.pruned} == {
        n: tuple(t.shape) for n, t in original.items()
    }


@pytest.mark.parametrize("layout, expected", LAYOUTS.values(), ids=LAYOUTS)
def test_spec_of_every_layout(tmp_path, layout, expected):
    spec = read_checkpoint(
        write_checkpoint(tmp_path, layout), allow_pickle="bin" in layout.storage
    ).spec
    assert spec.format == layout.format
    assert (spec.hidden_size, spec.target_hidden_size, spec.embed_size) == (
        40,
        layout.target_width,
        40,
    )
    assert (spec.num_heads, spec.num_kv_heads, spec.head_dim) == (6, 3, 10)
    assert (spec.rope_theta, spec.rope_scaling, spec.trained_length) == (10_000.0, None, 64)
    assert (spec.num_aux, spec.aux_layer_ids) == (3, None)
    assert (spec.norm_before_fc, spec.fc_norm, spec.qk_norm) == (
        layout.norm_before_fc,
        layout.fc_norm,
        layout.qk_norm,
    )
    assert (spec.rms_norm_eps, spec.dtype) == (1e-5, layout.dtype)
    assert spec.embed_vocab_size == (77 if layout.own_embedding else None)


def test_mask_hidden_and_second_layer_are_pruned(tmp_path):
    layout = Layout(format="speculators")
    tensors = make_tensors(layout) | {
        "mask_hidden": torch.zeros(1, 120),
        "layers.1.input_layernorm.weight": torch.ones(40),
        "layers.1.self_attn.q_proj.weight": torch.ones(60, 40),
    }
    head = read_checkpoint(write_checkpoint(tmp_path, layout, tensors))
    assert {"mask_hidden", "layers.1.self_attn.q_proj.weight"} <= {
        info.name for info in head.pruned
    }


def test_only_kept_tensors_are_loaded(tmp_path, monkeypatch):
    loaded = []
    load = tensor_files.load_safetensor
    monkeypatch.setattr(
        tensor_files, "load_safetensor", lambda file, name: loaded.append(name) or load(file, name)
    )
    head = read_checkpoint(write_checkpoint(tmp_path, Layout()))
    assert sorted(loaded) == sorted(info.name for info in head.kept)


def test_pickle_tensors_do_not_hold_the_file(tmp_path):
    layout = Layout(storage="bin")
    head = read_checkpoint(write_checkpoint(tmp_path, layout), allow_pickle=True)
    whole = sum(tensor.nbytes for tensor in make_tensors(layout).values())
    assert sum(tensor.untyped_storage().nbytes() for tensor in head.tensors.values()) < whole / 2


def test_parameter_counts_leave_the_vocabulary_maps_out(tmp_path):
    head = read_checkpoint(write_checkpoint(tmp_path, Layout(own_embedding=True)))
    counts = {info.name: info.parameters for info in head.kept + head.pruned}
    assert (counts["d2t"], counts["t2d"]) == (0, 0)
    assert counts["embed_tokens.weight"] == 77 * 40
    assert {info.name for info in head.kept + head.pruned if info.is_vocabulary} == {
        "embed_tokens.weight",
        "lm_head.weight",
    }
