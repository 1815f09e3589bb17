"""Heads with matrices in 8 bits: what they lose, what they choose, and what is wrong with one."""

from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file

from specontext_vllm.config import PAGE_SIZE
from specontext_vllm.retrieval.checkpoint import (
    HeadError,
    prune_head,
    read_checkpoint,
    save_head,
)
from specontext_vllm.retrieval.head import RetrievalHead
from specontext_vllm.retrieval.reference import (
    Budget,
    chosen_pages,
    grouped_logits,
    page_scores,
    reduce_to_pages,
)
from tests.retrieval.checkpoint.sentences import assert_one_sentence
from tests.retrieval.eagle3_files import Layout, write_checkpoint
from tests.retrieval.own_heads import KINDS, changed_tensor, make_own
from tests.retrieval.test_own_head import make_sequence

MODEL_SIZED = {
    "hidden_size": 256,
    "target_hidden_size": 288,
    "embed_size": 288,
    "num_heads": 6,
    "num_kv_heads": 3,
    "head_dim": 64,
    "trained_length": 2048,
    "q_mlp": 96,
    "k_mlp": 96,
    "fc_norm": True,
    "partial_rotary_factor": 0.5,
}


def matrices(tensors):
    return [name for name, tensor in tensors.items() if tensor.dim() == 2]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_value_is_off_by_half_a_scale_at_most(tmp_path, kind, dtype):
    made = make_own(**KINDS[kind], dtype=dtype)
    made.tensors["fc.weight"][3] = 0
    made.tensors["fc.weight"][4, 5] = 3e4
    save_head(tmp_path, made.spec, made.tensors, dtype=torch.int8)
    read = read_checkpoint(tmp_path)
    assert read.spec == replace(made.spec, dtype=torch.float32) and read.is_int8
    assert read.tensors.keys() == made.tensors.keys() and not read.pruned
    stored = load_file(tmp_path / "model.safetensors")
    assert len(stored) == len(made.tensors) + len(matrices(made.tensors))
    for name, tensor in made.tensors.items():
        back = read.tensors[name]
        if tensor.dim() == 1:
            assert back.dtype == torch.bfloat16 and torch.equal(back, tensor.bfloat16())
            continue
        scale = stored[f"{name}.scale"]
        assert stored[name].dtype == torch.int8 and back.dtype == torch.float32
        error = (back.double() - tensor.double()).abs()
        assert (error <= 0.5001 * scale[:, None].double()).all()
        assert (stored[name].abs().amax(1) == 127 * (scale > 0)).all()
        expected = [max(abs(value) for value in row) / 127 for row in tensor.tolist()]
        torch.testing.assert_close(scale, torch.tensor(expected))
    assert torch.equal(read.tensors["fc.weight"][3], torch.zeros(160))


def test_a_head_of_8_bits_stays_the_same_when_it_is_pruned_again(tmp_path):
    made = make_own(q_mlp=12)
    save_head(tmp_path / "once", made.spec, made.tensors, dtype=torch.int8)
    once = read_checkpoint(tmp_path / "once")
    prune_head(once, tmp_path / "twice")
    twice = read_checkpoint(tmp_path / "twice")
    assert twice.spec == once.spec and twice.kept == once.kept
    files = [load_file(tmp_path / name / "model.safetensors") for name in ("once", "twice")]
    for name, tensor in files[0].items():
        torch.testing.assert_close(files[1][name], tensor, rtol=1e-6, atol=0)


def test_an_eagle3_head_is_stored_in_8_bits_with_its_embedding(tmp_path):
    (tmp_path / "whole").mkdir()
    whole = read_checkpoint(write_checkpoint(tmp_path / "whole", Layout(own_embedding=True)))
    prune_head(whole, tmp_path / "small", int8=True)
    small = read_checkpoint(tmp_path / "small")
    assert small.spec.embed_vocab_size == 77 and small.is_int8 and not whole.is_int8
    scale = whole.tensors["embed_tokens.weight"].abs().amax(1, keepdim=True) / 127
    error = (small.tensors["embed_tokens.weight"] - whole.tensors["embed_tokens.weight"]).abs()
    assert (error <= 0.5001 * scale).all()


def chosen(checkpoint, aux, embeds, at, budget):
    """The pages ``[nkv, len(at), pages]`` that queries at these tokens choose."""
    tokens = len(embeds)
    head = RetrievalHead(checkpoint, max_position=tokens, dtype=torch.float32, device="cpu")
    fused, positions = head.fuse(aux), torch.arange(tokens)
    before = torch.cat([torch.zeros_like(fused[:1]), fused[:-1]])
    q = head.queries(embeds, before, positions)
    k = head.keys(embeds, before, positions, fused)
    logits = grouped_logits(q.transpose(0, 1)[None], k.transpose(0, 1)[None], at[None])[0]
    logits = logits.masked_fill(torch.arange(tokens) >= at[:, None, None], float("-inf"))
    scores, _ = page_scores(*reduce_to_pages(logits, PAGE_SIZE))
    return chosen_pages(scores, (at // PAGE_SIZE + 1)[None, :, None], budget)


@pytest.mark.parametrize("seed", [3, 4])
def test_nearly_the_same_pages_are_chosen_as_in_bfloat16(tmp_path, seed):
    """97 % of the pages that are chosen by their score: scores of random vectors lie close to each
    other.
    """
    made = make_own(**MODEL_SIZED, seed=seed)
    save_head(tmp_path / "bfloat16", made.spec, made.tensors)
    save_head(tmp_path / "int8", made.spec, made.tensors, dtype=torch.int8)
    aux, embeds = make_sequence(made.spec, 2048, seed=seed)
    at, budget = torch.arange(1024, 2048, 16), Budget(16, 1, 2)
    ours, theirs = (
        chosen(read_checkpoint(tmp_path / name), aux, embeds, at, budget)
        for name in ("int8", "bfloat16")
    )
    assert (theirs.sum(-1) == 16).all()
    kept = ((ours & theirs).sum() - ours.shape[0] * len(at) * 3) / (ours.shape[0] * len(at) * 13)
    assert 0.95 < kept < 1


def with_value(value):
    return lambda scale: scale.index_fill(0, torch.tensor([2]), value)


BAD = {
    "no_scale": (
        changed_tensor("k_proj.weight.scale", lambda t: None),
        "holds no k_proj.weight.scale, without which the int8 k_proj.weight means nothing",
    ),
    "scale_of_a_float_matrix": (
        changed_tensor("k_proj.weight", lambda t: t.bfloat16()),
        "k_proj.weight.scale is no tensor of a head in this format",
    ),
    "scale_of_a_norm": (
        changed_tensor("embed_norm.weight.scale", lambda t: torch.ones(40)),
        "embed_norm.weight.scale is no tensor of a head in this format",
    ),
    "too_few_scales": (
        changed_tensor("fc.weight.scale", lambda t: t[:-1]),
        "fc.weight.scale has shape [27] where [28] is needed, a scale for each row",
    ),
    "scales_in_a_column": (
        changed_tensor("fc.weight.scale", lambda t: t[:, None]),
        "fc.weight.scale has shape [28, 1] where [28] is needed, a scale for each row",
    ),
    "scales_that_are_integers": (
        changed_tensor("fc.weight.scale", lambda t: t.int()),
        "fc.weight.scale is stored as torch.int32, which is not read here",
    ),
    "scale_not_finite": (
        changed_tensor("fc.weight.scale", with_value(torch.inf)),
        "fc.weight.scale holds 1 of 28 values that are NaN or infinite",
    ),
    "scale_negative": (
        changed_tensor("fc.weight.scale", with_value(-0.1)),
        "fc.weight.scale holds 1 of 28 scales that are negative",
    ),
    "integers_in_a_norm": (
        changed_tensor("embed_norm.weight", lambda t: t.to(torch.int8)),
        "embed_norm.weight is stored as torch.int8, which is not read here",
    ),
    "wider_integers": (
        changed_tensor("q_proj.weight", lambda t: t.int()),
        "q_proj.weight is stored as torch.int32, which is not read here",
    ),
}


@pytest.mark.parametrize(("damage", "sentence"), BAD.values(), ids=BAD)
def test_a_bad_head_of_8_bits_is_refused_in_a_sentence(tmp_path, damage, sentence):
    made = make_own()
    save_head(tmp_path, made.spec, made.tensors, dtype=torch.int8)
    damage(tmp_path)
    with pytest.raises(HeadError) as refused:
        read_checkpoint(tmp_path)
    assert_one_sentence(refused)
    assert sentence in str(refused.value) and str(tmp_path) in str(refused.value)


def test_an_eagle3_head_of_integers_is_refused_as_ever(tmp_path):
    write_checkpoint(tmp_path, Layout())
    tensors = load_file(tmp_path / "model.safetensors")
    tensors["fc.weight"] = tensors["fc.weight"].to(torch.int8)
    tensors["fc.weight.scale"] = torch.ones(len(tensors["fc.weight"]))
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(HeadError, match="quantized heads are not supported"):
        read_checkpoint(tmp_path)
