"""Settings out of config.json, as vLLM reads them."""

import json

import pytest

from specontext_vllm.retrieval.checkpoint import (
    aux_layers_of,
    describe_aux_layers,
    read_checkpoint,
)
from tests.retrieval.eagle3_files import Layout, write_checkpoint

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
            describe_aux_layers(spec, aux_layers_of(spec, 12))
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


def test_peagle_is_read_as_eagle3(tmp_path):
    write_checkpoint(tmp_path, Layout(format="speculators"))
    config = json.loads((tmp_path / "config.json").read_text()) | {
        "speculators_model_type": "peagle",
        "mask_token_id": 5,
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert read_checkpoint(tmp_path).spec.format == "speculators"
