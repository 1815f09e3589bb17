"""A pruned head on disk: the same queries and keys, the same refusals, and no draft model."""

from dataclasses import replace

import pytest
import torch

from specontext_vllm.retrieval.checkpoint import HeadError, check_fits, read_checkpoint
from specontext_vllm.retrieval.checkpoint.pruned import write_pruned
from specontext_vllm.retrieval.head import RetrievalHead
from tests.retrieval.eagle3_files import Layout, write_checkpoint
from tests.retrieval.test_head import LAYOUTS, LLAMA3, make_inputs

HEADS = LAYOUTS | {
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
    write_pruned(whole, tmp_path / "new" / "pruned")
    return request.param, whole, read_checkpoint(tmp_path / "new" / "pruned")


@pytest.mark.parametrize("pair", HEADS.values(), ids=HEADS, indirect=True)
def test_a_pruned_head_has_the_same_queries_and_keys(pair):
    layout, whole, pruned = pair
    assert pruned.spec == replace(
        whole.spec, format="pruned", aux_layers_from=pruned.spec.aux_layers_from
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
    [LAYOUTS["safeailab"], HEADS["full_vocabulary"]],
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

    with pytest.raises(ValueError, match="[Uu]nrecognized model"):
        AutoConfig.from_pretrained(tmp_path / "new" / "pruned")
