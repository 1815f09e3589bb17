"""The format of our own: what is written is read again, and what is wrong with it is told."""

import json
from dataclasses import replace

import pytest
import torch

from specontext_vllm.retrieval.checkpoint import (
    HeadError,
    check_fits,
    prune_head,
    read_checkpoint,
    save_head,
)
from specontext_vllm.retrieval.head import RetrievalHead
from tests.retrieval.eagle3_files import Layout, write_checkpoint
from tests.retrieval.own_heads import KINDS, changed_tensor, make_own
from tests.retrieval.test_head import LAYOUTS, LLAMA3, make_inputs


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("groups", [1, 2])
def test_what_is_written_is_read_again(tmp_path, kind, groups):
    made = make_own(layer_groups=groups, **KINDS[kind])
    save_head(tmp_path / "new" / "head", made.spec, made.tensors)
    read = read_checkpoint(tmp_path / "new" / "head")
    assert read.spec == replace(made.spec, dtype=torch.bfloat16)
    assert read.tensors.keys() == made.tensors.keys() and not read.pruned
    for name, tensor in made.tensors.items():
        assert torch.equal(read.tensors[name], tensor.bfloat16())
    # Over an earlier one, and with nothing left beside it.
    save_head(tmp_path / "new" / "head", made.spec, made.tensors, dtype=None)
    assert torch.equal(
        read_checkpoint(tmp_path / "new" / "head").tensors["fc.weight"], made.tensors["fc.weight"]
    )
    assert sorted(file.name for file in (tmp_path / "new" / "head").iterdir()) == [
        "config.json",
        "model.safetensors",
    ]


@pytest.mark.parametrize("rope_scaling", [None, LLAMA3], ids=["plain", "llama3"])
def test_the_config_is_plain(tmp_path, rope_scaling):
    made = make_own(rope_scaling=rope_scaling, q_mlp=8)
    save_head(tmp_path, made.spec, made.tensors)
    assert json.loads((tmp_path / "config.json").read_text()) == {
        "architectures": ["SpeContextHead"],
        "model_type": "specontext_head",
        "hidden_size": 28,
        "target_hidden_size": 40,
        "num_attention_heads": 12,
        "num_key_value_heads": 3,
        "head_dim": 10,
        "vocab_size": 77,
        "max_position_embeddings": 64,
        "rope_theta": 5e4,
        "partial_rotary_factor": 1.0,
        "rms_norm_eps": 1e-5,
        "aux_layer_ids": [0, 3, 4, 9],
        "norm_before_fc": False,
        "fc_norm": False,
        "key_states": "own",
    } | ({} if rope_scaling is None else {"rope_scaling": rope_scaling})


def config(**changes):
    def change(folder):
        written = json.loads((folder / "config.json").read_text()) | changes
        kept = {key: value for key, value in written.items() if value is not None}
        (folder / "config.json").write_text(json.dumps(kept))

    return change


def gone(tensor):
    return None


BAD = {
    "key_states_missing": (config(key_states=None), "key_states is None in config.json"),
    "key_states_unknown": (config(key_states="next"), "key_states is 'next' in config.json"),
    "key_states_of_another_width": (
        config(key_states="previous"),
        "has shape [20, 96] where [20, 68] is needed: check hidden_size, target_hidden_size, "
        "key_states and the head counts",
    ),
    "no_k_proj": (changed_tensor("k_proj.weight", gone), "holds no k_proj.weight"),
    "no_feature_norm": (
        changed_tensor("feature_norm.weight", gone),
        "holds no feature_norm.weight",
    ),
    "no_up": (changed_tensor("q_mlp.up_proj.weight", gone), "holds no q_mlp.up_proj.weight"),
    "no_gate": (changed_tensor("k_mlp.gate_proj.weight", gone), "holds no k_mlp.gate_proj.weight"),
    "k_proj_reads_too_little": (
        changed_tensor("k_proj.weight", lambda t: t[:, :68]),
        "k_proj.weight has shape [30, 68] where [30, 96] is needed",
    ),
    "mlp_reads_too_much": (
        changed_tensor("q_mlp.gate_proj.weight", lambda t: torch.cat([t, t], 1)),
        "q_mlp.gate_proj.weight has shape [12, 136] where [12, 68] is needed",
    ),
    "mlp_without_a_shape": (
        changed_tensor("q_mlp.gate_proj.weight", lambda t: t[:, 0]),
        "q_mlp.gate_proj.weight has shape [12] where [12, 68] is needed",
    ),
    "down_writes_too_much": (
        changed_tensor("k_mlp.down_proj.weight", lambda t: torch.cat([t, t])),
        "k_mlp.down_proj.weight has shape [60, 20] where [30, 20] is needed",
    ),
    "not_finite": (
        changed_tensor(
            "k_mlp.down_proj.weight", lambda t: t.index_fill(0, torch.tensor([3]), torch.nan)
        ),
        "k_mlp.down_proj.weight holds 20 of 600 values that are NaN or infinite",
    ),
    "quantized": (
        changed_tensor("q_mlp.up_proj.weight", lambda t: t.to(torch.float8_e4m3fn)),
        "q_mlp.up_proj.weight is stored as torch.float8_e4m3fn",
    ),
    "misnamed": (
        changed_tensor("q_mlp.norm.weight", lambda t: torch.ones(3)),
        "q_mlp.norm.weight is no tensor of a head in this format",
    ),
    "groups_that_do_not_divide": (
        config(layer_groups=3),
        "layer_groups is 3 in config.json, which does not divide the 4 query heads of a KV head",
    ),
    "groups_of_nothing": (config(layer_groups=0), "layer_groups is 0 in config.json"),
    "groups_in_words": (config(layer_groups="two"), "layer_groups is 'two' in config.json"),
    "head_dim": (config(head_dim=12), "head_dim is 12 in config.json but q_proj.weight has 12"),
    "heads": (config(num_attention_heads=7), "do not divide into num_attention_heads 7"),
    "hidden_size": (config(hidden_size=30), "hidden_size is 30 in config.json but fc.weight has"),
    "layers_unnamed": (config(aux_layer_ids=None), "the default rule names 3 layers: set aux_laye"),
    "layers_of_another_number": (config(aux_layer_ids=[1, 2]), "aux_layer_ids [1, 2] are 2 layers"),
    "layers_in_disorder": (config(aux_layer_ids=[1, 3, 2, 4]), "are not distinct and ascending"),
    "fc_norms_missing": (config(fc_norm=True), "holds no fc_norm.0.weight"),
}


@pytest.mark.parametrize(("damage", "sentence"), BAD.values(), ids=BAD)
def test_a_bad_head_is_refused_in_a_sentence(tmp_path, damage, sentence):
    made = make_own(q_mlp=12, k_mlp=20)
    save_head(tmp_path, made.spec, made.tensors, dtype=None)
    damage(tmp_path)
    with pytest.raises(HeadError) as refused:
        read_checkpoint(tmp_path)
    told = str(refused.value)
    assert sentence in told and str(tmp_path) in told and told.endswith(".") and "\n" not in told


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"k_proj.weight": torch.zeros(30, 68)}, "k_proj.weight has shape"),
        ({"lm_head.weight": torch.zeros(3)}, "lm_head.weight is no tensor of a head"),
    ],
)
def test_what_could_not_be_read_is_not_written(tmp_path, changes, sentence):
    made = make_own()
    with pytest.raises(HeadError, match=sentence):
        save_head(tmp_path / "head", made.spec, made.tensors | changes)
    assert not (tmp_path / "head").exists()


def test_a_save_that_is_cut_off_leaves_the_head_before(tmp_path, monkeypatch):
    made = make_own()
    save_head(tmp_path, made.spec, made.tensors)
    before = (tmp_path / "model.safetensors").read_bytes()

    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match="No space left"):
        save_head(tmp_path, made.spec, {n: 2 * t for n, t in made.tensors.items()})
    assert (tmp_path / "model.safetensors").read_bytes() == before
    assert read_checkpoint(tmp_path).spec.key_states == "own"


def test_a_head_fits_its_target(tmp_path):
    spec = make_own().spec
    target = {"target_hidden_size": 40, "num_layers": 12, "num_kv_heads": 3}
    check_fits(spec, **target, vocab_size=77)
    with pytest.raises(HeadError, match="for a vocabulary of 77 tokens"):
        check_fits(spec, **target, vocab_size=78)
    with pytest.raises(HeadError, match="the target has only 8 layers"):
        check_fits(spec, **target | {"num_layers": 8}, vocab_size=77)


# EAGLE-3 heads without what selection does not read.

EAGLE = LAYOUTS | {
    "bfloat16": Layout(dtype=torch.bfloat16),
    "scaled_and_named_layers": Layout(
        config={
            "rope_scaling": LLAMA3,
            "rope_theta": 5e5,
            "eagle_config": {"eagle_aux_hidden_state_layer_ids": [1, 4, 9]},
        }
    ),
    "full_vocabulary": Layout(format="specforge", vocabulary_maps=False, draft_vocab_size=77),
    "reduced_without_maps": Layout(format="specforge", vocabulary_maps=False),
    "model_prefix": Layout(format="specforge", prefix="model.", own_embedding=True),
}


@pytest.fixture
def pair(tmp_path, request):
    """A head's checkpoint, and what is read of the pruned one."""
    (tmp_path / "whole").mkdir()
    whole = read_checkpoint(write_checkpoint(tmp_path / "whole", request.param))
    prune_head(whole, tmp_path / "new" / "pruned")
    return request.param, whole, read_checkpoint(tmp_path / "new" / "pruned")


@pytest.mark.parametrize("pair", EAGLE.values(), ids=EAGLE, indirect=True)
def test_a_pruned_head_has_the_same_queries_and_keys(pair):
    layout, whole, pruned = pair
    assert pruned.spec == replace(
        whole.spec, format="specontext", aux_layers_from=pruned.spec.aux_layers_from
    )
    assert not pruned.pruned and sum(info.num_bytes for info in pruned.kept) == sum(
        info.num_bytes for info in whole.kept
    )
    aux, embeds, positions = make_inputs(layout, 7)
    found = []
    for checkpoint in (whole, pruned):
        head = RetrievalHead(checkpoint, max_position=99, dtype=torch.float32, device="cpu")
        found.append(
            (
                *head.project(embeds, head.fuse(aux), positions),
                head.keys(embeds, head.fuse(aux), positions),
            )
        )
        if layout.own_embedding:
            found[-1] += (head.embed(torch.arange(77)),)
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


@pytest.mark.parametrize(
    "pair",
    [LAYOUTS["safeailab"], EAGLE["full_vocabulary"]],
    ids=["t2d", "full_vocabulary"],
    indirect=True,
)
def test_a_pruned_head_still_knows_its_targets_vocabulary(pair):
    target = {"target_hidden_size": 40, "num_layers": 12, "num_kv_heads": 3}
    check_fits(pair[2].spec, **target, vocab_size=77)
    with pytest.raises(HeadError, match="for a vocabulary of 77 tokens"):
        check_fits(pair[2].spec, **target, vocab_size=80)


@pytest.mark.parametrize(
    "pair", [LAYOUTS["safeailab"], LAYOUTS["qk_norm"]], ids=["flat", "speculators"], indirect=True
)
def test_no_engine_takes_a_pruned_head_for_a_model(pair, tmp_path):
    from transformers import AutoConfig

    with pytest.raises(ValueError, match="specontext_head"):
        AutoConfig.from_pretrained(tmp_path / "new" / "pruned")
