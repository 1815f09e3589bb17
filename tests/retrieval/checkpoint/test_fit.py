"""Which targets a head fits."""

from dataclasses import replace

import pytest
import torch

from specontext_vllm.retrieval.checkpoint import (
    HeadError,
    aux_layers_of,
    check_dtype,
    check_fits,
    default_aux_layers,
    dummy_checkpoint,
    layer_groups,
    read_checkpoint,
)
from tests.retrieval.checkpoint.sentences import assert_one_sentence
from tests.retrieval.eagle3_files import Layout, make_tensors, write_checkpoint


@pytest.mark.parametrize(
    "num_layers, ids", [(7, (2, 3, 4)), (8, (2, 4, 5)), (36, (2, 18, 33)), (80, (2, 40, 77))]
)
def test_default_aux_layers(num_layers, ids):
    assert default_aux_layers(num_layers) == ids


@pytest.mark.parametrize("num_layers", [1, 4, 5, 6])
def test_default_aux_layers_of_small_targets_are_refused(num_layers):
    with pytest.raises(HeadError, match="set eagle_aux_hidden_state_layer_ids"):
        default_aux_layers(num_layers)


@pytest.mark.parametrize("num_layers", [1, 2, 5, 30, 32])
def test_groups_of_layers_are_neighbours_of_about_one_size(num_layers):
    for count in range(1, num_layers + 1):
        parts = torch.arange(num_layers).tensor_split(count)
        wanted = tuple(group for group, part in enumerate(parts) for _ in part)
        assert layer_groups(num_layers, count) == wanted
    for count in (0, num_layers + 1):
        with pytest.raises(ValueError, match="cannot be"):
            layer_groups(num_layers, count)


TARGET = {"target_hidden_size": 40, "num_layers": 12, "num_kv_heads": 3, "vocab_size": 77}

FITS = {
    "same": ({}, {}),
    "one_target_head_takes_three": ({}, {"num_kv_heads": 1}),
    "groups_of_layers": ({"layer_groups": 2}, {}),
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
    "more_groups_than_layers": ({"layer_groups": 13}, {}, "13 groups of layers, but the target"),
    "groups_and_more_kv_heads": (
        {"layer_groups": 2},
        {"num_kv_heads": 1},
        "2 groups of layers and 3 KV heads, where such a head needs the target's 1",
    ),
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
        match="fc.weight holds values up to 99840, which float16 cannot: "
        "serve with --dtype bfloat16 or float32",
    ) as error:
        check_dtype(checkpoint, torch.float16)
    assert_one_sentence(error)


@pytest.mark.parametrize("head, target, sentence", MISFITS.values(), ids=MISFITS)
def test_does_not_fit(spec, head, target, sentence):
    with pytest.raises(HeadError, match=sentence) as error:
        check_fits(replace(spec, **head), **TARGET | target)
    assert_one_sentence(error)


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
    assert len(aux_layers_of(head.spec, num_layers)) == head.spec.num_aux
    assert head.tensors["fc.weight"].shape == (24, head.spec.num_aux * 24)
    assert all(tensor.dtype == torch.bfloat16 for tensor in head.tensors.values())
    again = dummy_checkpoint(**shape, num_layers=num_layers, dtype=torch.bfloat16, seed=3)
    assert torch.equal(head.tensors["q_proj.weight"], again.tensors["q_proj.weight"])
