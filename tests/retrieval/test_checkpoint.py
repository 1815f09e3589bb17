import json
from dataclasses import replace

import pytest
import torch

from specontext_vllm.retrieval import tensor_files
from specontext_vllm.retrieval.checkpoint import (
    HeadError,
    check_dtype,
    check_fits,
    default_aux_layers,
    describe_aux_layers,
    dummy_checkpoint,
    read_checkpoint,
    resolve_aux_layers,
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


CONFIG_CASES = {
    "head_dim_absent": (Layout(drop_config=("head_dim",)), {"head_dim": 10}),
    "head_dim_edited_for_another_engine": (Layout(config={"head_dim": 7}), {"head_dim": 10}),
    "no_kv_heads_means_mha": (
        Layout(num_kv_heads=6, drop_config=("num_key_value_heads",)),
        {"num_kv_heads": 6},
    ),
    "rope_theta": (Layout(config={"rope_theta": 500000}), {"rope_theta": 500_000.0}),
    "rope_parameters_default": (
        Layout(config={"rope_parameters": {"rope_type": "default", "rope_theta": 1e6}}),
        {"rope_theta": 1e6, "rope_scaling": None},
    ),
    "rope_parameters_without_theta": (
        Layout(config={"rope_parameters": {"rope_type": "linear", "factor": 4.0}}),
        {"rope_theta": 10_000.0, "rope_scaling": {"rope_type": "linear", "factor": 4.0}},
    ),
    "rope_scaling_legacy_type": (
        Layout(config={"rope_scaling": {"type": "linear", "factor": 2.0}, "rope_theta": 5e5}),
        {"rope_theta": 5e5, "rope_scaling": {"rope_type": "linear", "factor": 2.0}},
    ),
    "rope_scaling_null": (
        Layout(config={"rope_scaling": None, "rope_theta": None}),
        {"rope_scaling": None},
    ),
    "trained_length_absent": (
        Layout(drop_config=("max_position_embeddings",)),
        {"trained_length": 2048},
    ),
    "aux_ids_in_eagle_config": (
        Layout(config={"eagle_config": {"eagle_aux_hidden_state_layer_ids": [1, 4, 9]}}),
        {"aux_layer_ids": (1, 4, 9)},
    ),
    "four_aux_layers": (
        Layout(num_aux=4, config={"eagle_aux_hidden_state_layer_ids": [0, 2, 5, 8]}),
        {"aux_layer_ids": (0, 2, 5, 8), "num_aux": 4},
    ),
    "norm_before_fc_in_eagle_config": (
        Layout(
            norm_before_fc=True,
            drop_config=("norm_before_fc",),
            config={"eagle_config": {"norm_before_fc": True}},
        ),
        {"norm_before_fc": True},
    ),
    "unasked_input_norm_is_pruned_as_in_vllm": (
        Layout(norm_before_fc=True, drop_config=("norm_before_fc",)),
        {"norm_before_fc": False},
    ),
    "rms_norm_eps_absent": (Layout(drop_config=("rms_norm_eps",)), {"rms_norm_eps": 1e-6}),
}


@pytest.mark.parametrize("layout, expected", CONFIG_CASES.values(), ids=CONFIG_CASES)
def test_settings(tmp_path, layout, expected):
    head = read_checkpoint(write_checkpoint(tmp_path, layout))
    assert {name: getattr(head.spec, name) for name in expected} == expected
    assert ("input_norm.weight" in head.tensors) == head.spec.norm_before_fc


KEY = "eagle_aux_hidden_state_layer_ids"
TOP, NESTED = {KEY: [1, 4, 9]}, {"eagle_config": {KEY: [0, 5, 8]}}
BOTH = ("v1", "v2")
# The config, the layers it names and where, and which of vLLM's model runners read the same (they
# differ over eagle_config's key).
AUX_LAYERS = {
    "none": (Layout(), None, None, BOTH),
    "top_level": (Layout(config=TOP), (1, 4, 9), KEY, BOTH),
    "top_level_before_nested": (Layout(config=TOP | NESTED), (1, 4, 9), KEY, BOTH),
    "nested": (Layout(config=NESTED), (0, 5, 8), f"eagle_config.{KEY}", ("v1",)),
    "nested_of_v2": (
        Layout(config={"eagle_config": {"layer_ids": [0, 5, 8]}}),
        (0, 5, 8),
        "eagle_config.layer_ids",
        ("v2",),
    ),
    "empty_top_level": (
        Layout(config=NESTED | {KEY: []}),
        (0, 5, 8),
        f"eagle_config.{KEY}",
        ("v1",),
    ),
    "empty_nested": (Layout(config=TOP | {"eagle_config": {KEY: []}}), (1, 4, 9), KEY, BOTH),
    "both_empty": (Layout(config={KEY: [], "eagle_config": {KEY: []}}), None, None, BOTH),
    "speculators_none": (Layout(format="speculators"), None, None, BOTH),
    "speculators": (Layout(format="speculators", own_level=TOP), (1, 4, 9), KEY, BOTH),
    "speculators_layer": (
        Layout(format="speculators", config=TOP),
        (1, 4, 9),
        f"transformer_layer_config.{KEY}",
        BOTH,
    ),
    "speculators_own_before_layer": (
        Layout(format="speculators", own_level={KEY: [2, 3, 4]}, config=TOP),
        (2, 3, 4),
        KEY,
        BOTH,
    ),
    "speculators_empty": (
        Layout(format="speculators", own_level={KEY: []}, config=TOP),
        (1, 4, 9),
        f"transformer_layer_config.{KEY}",
        BOTH,
    ),
    "speculators_own_eagle_config_is_not_read": (
        Layout(format="speculators", own_level=NESTED),
        None,
        None,
        BOTH,
    ),
    "speculators_layer_nested": (
        Layout(format="speculators", config=NESTED),
        (0, 5, 8),
        f"transformer_layer_config.eagle_config.{KEY}",
        ("v1",),
    ),
}


def _vllm_reads(folder, runner):
    from types import SimpleNamespace

    from vllm.transformers_utils.configs.speculators import SpeculatorsConfig
    from vllm.v1.worker.gpu.spec_decode.eagle.eagle3_utils import get_eagle3_aux_layers_from_config
    from vllm.v1.worker.gpu_model_runner import GPUModelRunner

    config = json.loads((folder / "config.json").read_text())
    if "speculators_model_type" in config:
        config = SpeculatorsConfig.extract_transformers_pre_trained_config(config)
    speculative = SimpleNamespace(
        draft_model_config=SimpleNamespace(hf_config=SimpleNamespace(**config))
    )
    if runner == "v2":
        return get_eagle3_aux_layers_from_config(speculative)
    return GPUModelRunner._get_eagle3_aux_layers_from_config(
        SimpleNamespace(speculative_config=speculative)
    )


@pytest.mark.parametrize("layout, layers, place, runners", AUX_LAYERS.values(), ids=AUX_LAYERS)
def test_the_layers_are_those_that_vllm_reads_from_the_same_file(
    tmp_path, layout, layers, place, runners
):
    write_checkpoint(tmp_path, layout)
    assert {_vllm_reads(tmp_path, runner) for runner in runners} == {layers}
    spec = read_checkpoint(tmp_path).spec
    assert (spec.aux_layer_ids, spec.aux_layers_from) == (layers, place)
    if layers is None:
        assert (
            describe_aux_layers(spec, resolve_aux_layers(spec, 12))
            == "2, 6, 9 (default, its config.json names none)"
        )
    else:
        assert describe_aux_layers(spec) == f"{', '.join(map(str, layers))} ({place})"


OTHER_LEVELS = {
    "norm_before_fc_of_speculators_own_level": (
        Layout(format="speculators", norm_before_fc=True, config={"norm_before_fc": False}),
        {"norm_before_fc": True},
    ),
    "norm_before_fc_of_the_layers_level_is_not_read": (
        Layout(format="speculators", config={"norm_before_fc": True}),
        {"norm_before_fc": False},
    ),
    "eagle_configs_norm_before_fc_goes_first": (
        Layout(config={"norm_before_fc": True, "eagle_config": {"norm_before_fc": False}}),
        {"norm_before_fc": False},
    ),
    "eagle_config_holds_no_widths": (
        Layout(config={"eagle_config": {"target_hidden_size": 60}}),
        {"target_hidden_size": 40},
    ),
    "speculators_own_level_holds_no_rope": (
        Layout(format="speculators", own_level={"rope_theta": 5.0}),
        {"rope_theta": 10_000.0},
    ),
}


@pytest.mark.parametrize("layout, expected", OTHER_LEVELS.values(), ids=OTHER_LEVELS)
def test_other_settings_are_read_where_vllm_reads_them(tmp_path, layout, expected):
    spec = read_checkpoint(write_checkpoint(tmp_path, layout)).spec
    assert {name: getattr(spec, name) for name in expected} == expected


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
    load = tensor_files._load_safetensor
    monkeypatch.setattr(
        tensor_files, "_load_safetensor", lambda file, name: loaded.append(name) or load(file, name)
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


def _without(name):
    def build(layout):
        tensors = make_tensors(layout)
        return {n: t for n, t in tensors.items() if name not in n}

    return build


def _with(**changes):
    def build(layout):
        return make_tensors(layout) | {
            name.replace("__", "."): tensor for name, tensor in changes.items()
        }

    return build


ERRORS = {
    "eagle1": (Layout(num_aux=2), _without("hidden_norm"), "is an EAGLE-1 or EAGLE-2 checkpoint"),
    "not_a_head": (Layout(), _without("midlayer"), "is not an EAGLE-3 checkpoint"),
    "no_q_proj": (Layout(), _without("q_proj"), "holds no midlayer.self_attn.q_proj.weight"),
    "no_fc": (Layout(), _without("fc."), "holds no fc.weight"),
    "no_embed_norm": (
        Layout(),
        _without("input_layernorm"),
        "holds no midlayer.input_layernorm.weight",
    ),
    "last_layer_only": (
        Layout(config={"eagle_config": {"use_aux_hidden_state": False}}),
        None,
        "use_aux_hidden_state",
    ),
    "fc_not_a_multiple": (
        Layout(config={"target_hidden_size": 50}),
        None,
        "not a multiple of the target's hidden size 50",
    ),
    "aux_count_without_ids": (
        Layout(config={"target_hidden_size": 60}),
        None,
        "set eagle_aux_hidden_state_layer_ids",
    ),
    "aux_count": (
        Layout(config={"eagle_aux_hidden_state_layer_ids": [1, 2]}),
        None,
        "are 2 layers but fc.weight reads 3",
    ),
    "aux_order": (
        Layout(config={"eagle_aux_hidden_state_layer_ids": [4, 2, 8]}),
        None,
        "not distinct and ascending",
    ),
    "aux_in_words": (
        Layout(config={"eagle_aux_hidden_state_layer_ids": [2, "4", 8]}),
        None,
        "not distinct and ascending",
    ),
    "aux_fraction": (
        Layout(config={"eagle_aux_hidden_state_layer_ids": [2, 4.5, 8]}),
        None,
        "not distinct and ascending",
    ),
    "aux_double": (
        Layout(config={"eagle_aux_hidden_state_layer_ids": [2, 2, 8]}),
        None,
        "not distinct and ascending",
    ),
    "hidden_size": (
        Layout(config={"hidden_size": 48}),
        None,
        "hidden_size is 48 in config.json but fc.weight has 40 rows",
    ),
    "head_count": (
        Layout(config={"num_attention_heads": 7}),
        None,
        "do not divide into num_attention_heads 7",
    ),
    "no_head_count": (
        Layout(drop_config=("num_attention_heads",)),
        None,
        "has no num_attention_heads",
    ),
    "q_columns": (
        Layout(),
        _with(midlayer__self_attn__q_proj__weight=torch.ones(60, 79)),
        r"\[60, 79\] where \[60, 80\]",
    ),
    "norm_length": (
        Layout(),
        _with(midlayer__hidden_norm__weight=torch.ones(39)),
        r"\[39\] where \[40\]",
    ),
    "norm_dimensions": (
        Layout(),
        _with(midlayer__hidden_norm__weight=torch.ones(40, 1)),
        "not 1-dimensional",
    ),
    "no_input_norm": (
        Layout(norm_before_fc=True),
        _without("input_norm"),
        "holds no input_norm.weight",
    ),
    "no_k_norm": (Layout(qk_norm=True), _without("k_norm"), "holds no k_norm.weight"),
    "fc_norm_too_many": (
        Layout(fc_norm=True),
        _with(fc_norm__3__weight=torch.ones(40)),
        "one input norm too many",
    ),
    "quantized": (
        Layout(),
        _with(midlayer__self_attn__q_proj__weight=torch.ones(60, 80).to(torch.float8_e4m3fn)),
        "stored as torch.float8_e4m3fn",
    ),
    "name_twice": (Layout(), _with(model__fc__weight=torch.ones(40, 120)), "holds both"),
    "nested_rope": (
        Layout(config={"rope_parameters": {"full_attention": {"rope_theta": 1.0}}}),
        None,
        "differ by layer type",
    ),
    "partial_rotary": (
        Layout(config={"partial_rotary_factor": 0.5}),
        None,
        "partial_rotary_factor",
    ),
    "no_heads": (
        Layout(config={"num_attention_heads": 0}),
        None,
        "config.json holds a value that cannot be used",
    ),
    "heads_in_words": (
        Layout(config={"num_attention_heads": "six"}),
        None,
        "config.json holds a value that cannot be used",
    ),
    "target_of_no_width": (
        Layout(config={"target_hidden_size": 0}),
        None,
        "config.json holds a value that cannot be used",
    ),
    "rope_scaling_is_a_word": (
        Layout(config={"rope_scaling": "yarn"}),
        None,
        "config.json holds a value that cannot be used",
    ),
    "eagle_config_is_a_list": (
        Layout(config={"eagle_config": [1]}),
        None,
        "config.json holds a value that cannot be used",
    ),
    "architectures_hold_null": (
        Layout(config={"architectures": [None]}),
        None,
        "config.json holds a value that cannot be used",
    ),
    "aux_ids_are_a_number": (
        Layout(config={"eagle_aux_hidden_state_layer_ids": 5}),
        None,
        "config.json holds a value that cannot be used",
    ),
    "rope_theta_nan": (
        Layout(config={"rope_theta": float("nan")}),
        None,
        "rope_theta is nan in config.json, where a positive number is needed",
    ),
    "eps_negative": (
        Layout(config={"rms_norm_eps": -1e-5}),
        None,
        "rms_norm_eps is -1e-05 in config.json",
    ),
    "eps_nan_in_words": (
        Layout(config={"rms_norm_eps": "nan"}),
        None,
        "rms_norm_eps is nan in config.json",
    ),
    "knows_no_position": (
        Layout(config={"max_position_embeddings": 0}),
        None,
        "max_position_embeddings is 0 in config.json",
    ),
}


@pytest.mark.parametrize("layout, build, sentence", ERRORS.values(), ids=ERRORS)
def test_bad_checkpoints_give_one_sentence(tmp_path, layout, build, sentence):
    tensors = None if build is None else build(layout)
    write_checkpoint(tmp_path, layout, tensors)
    with pytest.raises(HeadError, match=sentence) as error:
        read_checkpoint(tmp_path)
    _assert_one_sentence(error)


def _assert_one_sentence(error):
    text = str(error.value)
    assert text.endswith(".") and "\n" not in text and ". " not in text


def _remove(name):
    return lambda folder: (folder / name).unlink()


def _overwrite(name, content):
    return lambda folder: (folder / name).write_text(content)


def _cut(name):
    """A download that broke off: the header is whole, the data is not."""

    def damage(folder):
        with (folder / name).open("r+b") as file:
            file.truncate((folder / name).stat().st_size * 3 // 4)

    return damage


FOLDERS = {
    "no_config": (Layout(), _remove("config.json"), "holds no config.json"),
    "broken_config": (Layout(), _overwrite("config.json", "{"), "not valid JSON"),
    "config_is_a_list": (Layout(), _overwrite("config.json", "[]"), "not a JSON object"),
    "no_weights": (
        Layout(),
        _remove("model.safetensors"),
        "neither \\*.safetensors nor pytorch_model.bin",
    ),
    "pickle_without_consent": (
        Layout(storage="bin"),
        lambda folder: None,
        "as a pickle \\(pytorch_model.bin\\).*set additional_config.specontext.allow_pickle",
    ),
    "cut_safetensors": (
        Layout(),
        _cut("model.safetensors"),
        r"model.safetensors cannot be read \(it ends within midlayer\.[\w.]+\.weight\)",
    ),
    "index_without_a_map": (
        Layout(storage="safetensors_sharded"),
        _overwrite("model.safetensors.index.json", json.dumps({"weight_map": None})),
        "has no weight_map of tensor names to file names",
    ),
    "index_with_a_list": (
        Layout(storage="safetensors_sharded"),
        _overwrite(
            "model.safetensors.index.json", json.dumps({"weight_map": ["model.safetensors"]})
        ),
        "has no weight_map",
    ),
    "truncated_safetensors": (Layout(), _overwrite("model.safetensors", "junk"), "cannot be read"),
    "shard_missing": (
        Layout(storage="safetensors_sharded"),
        _remove("model-00002-of-00002.safetensors"),
        "names model-00002-of-00002.safetensors, which is not there",
    ),
    "other_speculator": (
        Layout(),
        _overwrite("config.json", json.dumps({"speculators_model_type": "dflash"})),
        "speculators_model_type 'dflash'",
    ),
    "speculators_without_layer": (
        Layout(),
        _overwrite("config.json", json.dumps({"speculators_model_type": "eagle3"})),
        "no transformer_layer_config",
    ),
}


@pytest.mark.parametrize("layout, damage, sentence", FOLDERS.values(), ids=FOLDERS)
def test_bad_folders_give_one_sentence(tmp_path, layout, damage, sentence):
    damage(write_checkpoint(tmp_path, layout))
    with pytest.raises(HeadError, match=sentence):
        read_checkpoint(tmp_path)


@pytest.mark.parametrize(
    "storage, index",
    [
        ("safetensors_sharded", "model.safetensors.index.json"),
        ("bin_sharded", "pytorch_model.bin.index.json"),
    ],
)
@pytest.mark.parametrize(
    "name", ["../secret/{}", "{folder}/secret/{}", "part/../../secret/{}", "secret/..", "a\0{}"]
)
def test_an_index_opens_no_file_outside_its_folder(tmp_path, storage, index, name):
    for folder in ("head", "secret"):
        (tmp_path / folder).mkdir()
        write_checkpoint(tmp_path / folder, Layout(storage=storage))
    weight_map = json.loads((tmp_path / "head" / index).read_text())["weight_map"]
    outside = {tensor: name.format(file, folder=tmp_path) for tensor, file in weight_map.items()}
    (tmp_path / "head" / index).write_text(json.dumps({"weight_map": outside}))
    with pytest.raises(
        HeadError, match=f"{index} names '.*', which is not inside its folder"
    ) as error:
        read_checkpoint(tmp_path / "head", allow_pickle=True)
    _assert_one_sentence(error)


def test_a_snapshot_of_the_hub_cache_is_read_through_its_links(tmp_path):
    """Its files are links to ../../blobs, by design of huggingface_hub; shards may also lie in a
    folder of their own.
    """
    snapshot, blobs = tmp_path / "snapshots" / "0a1b", tmp_path / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    layout = Layout(storage="safetensors_sharded")
    write_checkpoint(snapshot, layout)
    whole = read_checkpoint(snapshot)
    index = snapshot / "model.safetensors.index.json"
    weight_map = json.loads(index.read_text())["weight_map"]
    moved = dict.fromkeys(weight_map.values())
    (snapshot / "parts").mkdir()
    for name in moved:
        (snapshot / name).rename(blobs / name)
        (snapshot / "parts" / name).symlink_to(f"../../../blobs/{name}")
    index.write_text(
        json.dumps({"weight_map": {tensor: f"parts/{name}" for tensor, name in weight_map.items()}})
    )
    (snapshot / "config.json").rename(blobs / "config")
    (snapshot / "config.json").symlink_to("../../blobs/config")
    linked = read_checkpoint(snapshot)
    assert linked.spec == whole.spec
    assert all(torch.equal(tensor, whole.tensors[name]) for name, tensor in linked.tensors.items())


def test_a_broken_pickle_gives_one_sentence(tmp_path):
    write_checkpoint(tmp_path, Layout(storage="bin"))
    (tmp_path / "pytorch_model.bin").write_text("junk")
    with pytest.raises(HeadError, match="pytorch_model.bin cannot be read") as error:
        read_checkpoint(tmp_path, allow_pickle=True)
    _assert_one_sentence(error)


def test_consent_to_a_pickle_does_not_run_it(tmp_path):
    write_checkpoint(tmp_path, Layout(storage="bin"))
    torch.save({"fc.weight": _Touches(tmp_path / "touched")}, tmp_path / "pytorch_model.bin")
    with pytest.raises(HeadError, match="pytorch_model.bin cannot be read"):
        read_checkpoint(tmp_path, allow_pickle=True)
    assert not (tmp_path / "touched").exists()


class _Touches:
    """Unpickled freely, it makes a file."""

    def __init__(self, file):
        self.file = file

    def __reduce__(self):
        return type(self.file).touch, (self.file,)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize(
    "name", ["fc.weight", "midlayer.self_attn.k_proj.weight", "midlayer.hidden_norm.weight"]
)
def test_a_tensor_that_is_not_finite_is_named(tmp_path, name, value):
    layout = Layout(dtype=torch.bfloat16)
    tensors = make_tensors(layout)
    tensors[name].view(-1)[3] = value
    write_checkpoint(tmp_path, layout, tensors)
    with pytest.raises(
        HeadError,
        match=rf"{name} holds 1 of {tensors[name].numel()} values that are NaN or infinite",
    ) as error:
        read_checkpoint(tmp_path)
    _assert_one_sentence(error)


def test_a_pruned_tensor_may_hold_anything(tmp_path):
    layout = Layout()
    tensors = make_tensors(layout)
    tensors["lm_head.weight"].fill_(float("nan"))
    read_checkpoint(write_checkpoint(tmp_path, layout, tensors))


@pytest.mark.parametrize(
    "num_layers, ids", [(7, (2, 3, 4)), (8, (2, 4, 5)), (36, (2, 18, 33)), (80, (2, 40, 77))]
)
def test_default_aux_layers(num_layers, ids):
    assert default_aux_layers(num_layers) == ids


@pytest.mark.parametrize("num_layers", [1, 4, 5, 6])
def test_default_aux_layers_of_small_targets_are_refused(num_layers):
    with pytest.raises(HeadError, match="set eagle_aux_hidden_state_layer_ids"):
        default_aux_layers(num_layers)


TARGET = {"target_hidden_size": 40, "num_layers": 12, "num_kv_heads": 3, "vocab_size": 77}

FITS = {
    "same": ({}, {}),
    "one_target_head_takes_three": ({}, {"num_kv_heads": 1}),
    "last_layer_output": ({"aux_layer_ids": (2, 6, 12)}, {}),
    "no_vocabulary_map": ({"target_vocab_size": None}, {"vocab_size": 80}),
    "own_embedding_of_other_width": ({"embed_size": 24, "embed_vocab_size": 80}, {}),
}
MISFITS = {
    "hidden_size": ({}, {"target_hidden_size": 48}, "target's hidden_size is 48"),
    "other_vocabulary": (
        {},
        {"vocab_size": 80},
        "for a vocabulary of 77 tokens \\(its t2d map, LM head or config.json\\), but the target's "
        "vocab_size is 80",
    ),
    "embed_size": ({"embed_size": 24}, {}, "token embeddings of width 24"),
    "vocabulary": ({"embed_vocab_size": 70}, {}, "has 70 rows"),
    "fewer_kv_heads": ({"num_kv_heads": 2}, {"num_kv_heads": 4}, "head has 2 KV heads"),
    "kv_heads_no_multiple": ({}, {"num_kv_heads": 2}, "neither the target's 2 nor a multiple"),
    "aux_beyond": ({"aux_layer_ids": (2, 6, 13)}, {}, "only 12 layers"),
    "aux_default_too_small": ({}, {"num_layers": 6}, "distinct and ascending"),
}


@pytest.fixture
def spec(tmp_path):
    return read_checkpoint(write_checkpoint(tmp_path, Layout())).spec


@pytest.mark.parametrize("head, target", FITS.values(), ids=FITS)
def test_fits(spec, head, target):
    check_fits(replace(spec, **head), **TARGET | target)


def test_at_full_vocabulary_the_lm_head_tells_the_target(tmp_path):
    layout = Layout(vocabulary_maps=False, draft_vocab_size=77)
    spec = read_checkpoint(write_checkpoint(tmp_path, layout)).spec
    check_fits(spec, **TARGET)
    with pytest.raises(HeadError, match="for a vocabulary of 77 tokens"):
        check_fits(spec, **TARGET | {"vocab_size": 128})


@pytest.mark.parametrize("format", ["safeailab", "specforge", "speculators"])
def test_a_reduced_lm_head_without_maps_fits_any_target_as_in_vllm(tmp_path, format):
    spec = read_checkpoint(
        write_checkpoint(tmp_path, Layout(format=format, vocabulary_maps=False))
    ).spec
    assert spec.target_vocab_size is None
    check_fits(spec, **TARGET)


def test_a_weight_beyond_the_served_dtype_is_named(tmp_path):
    layout = Layout(dtype=torch.bfloat16)
    tensors = make_tensors(layout)
    tensors["fc.weight"].view(-1)[5] = -1e5
    checkpoint = read_checkpoint(write_checkpoint(tmp_path, layout, tensors))
    for dtype in (torch.bfloat16, torch.float32):
        check_dtype(checkpoint, dtype)
    with pytest.raises(
        HeadError,
        match="fc.weight holds values up to 99840, which float16 cannot: serve with --dtype bfloat16 or float32",
    ) as error:
        check_dtype(checkpoint, torch.float16)
    _assert_one_sentence(error)


@pytest.mark.parametrize("head, target, sentence", MISFITS.values(), ids=MISFITS)
def test_does_not_fit(spec, head, target, sentence):
    with pytest.raises(HeadError, match=sentence) as error:
        check_fits(replace(spec, **head), **TARGET | target)
    _assert_one_sentence(error)


@pytest.mark.parametrize("num_layers", [1, 2, 3, 4, 6, 7, 8, 32])
def test_dummy_fits_its_target(num_layers):
    shape = {
        "hidden_size": 24,
        "num_heads": 4,
        "num_kv_heads": 2,
        "head_dim": 10,
        "rope_theta": 5e5,
        "max_position": 99,
    }
    head = dummy_checkpoint(**shape, num_layers=num_layers, dtype=torch.bfloat16, seed=3)
    check_fits(
        head.spec, target_hidden_size=24, num_layers=num_layers, num_kv_heads=2, vocab_size=7
    )
    assert len(resolve_aux_layers(head.spec, num_layers)) == head.spec.num_aux
    assert head.tensors["fc.weight"].shape == (24, head.spec.num_aux * 24)
    assert all(tensor.dtype == torch.bfloat16 for tensor in head.tensors.values())
    again = dummy_checkpoint(**shape, num_layers=num_layers, dtype=torch.bfloat16, seed=3)
    assert torch.equal(head.tensors["q_proj.weight"], again.tensors["q_proj.weight"])


def test_peagle_is_read_as_eagle3(tmp_path):
    write_checkpoint(tmp_path, Layout(format="speculators"))
    config = json.loads((tmp_path / "config.json").read_text()) | {
        "speculators_model_type": "peagle",
        "mask_token_id": 5,
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert read_checkpoint(tmp_path).spec.format == "speculators"
