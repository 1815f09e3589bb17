"""Configs and tensors that do not go together are refused, in one sentence."""

import pytest
import torch

from specontext_vllm.retrieval.checkpoint import (
    HeadError,
    read_checkpoint,
)
from tests.retrieval.checkpoint.sentences import assert_one_sentence
from tests.retrieval.eagle3_files import Layout, make_tensors, write_checkpoint


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
    assert_one_sentence(error)


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
    assert_one_sentence(error)


def test_a_pruned_tensor_may_hold_anything(tmp_path):
    layout = Layout()
    tensors = make_tensors(layout)
    tensors["lm_head.weight"].fill_(float("nan"))
    read_checkpoint(write_checkpoint(tmp_path, layout, tensors))
