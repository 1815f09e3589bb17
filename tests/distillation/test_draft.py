"""Draft models as files: written whole, read again, extended by YaRN, and refused where they do not
fit.
"""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from specontext_vllm.distillation.command import make_draft, most_frequent
from specontext_vllm.distillation.draft import DraftModel
from specontext_vllm.distillation.options import make_settings
from specontext_vllm.distillation.shape import DraftShape
from specontext_vllm.retrieval.checkpoint import HeadError, read_checkpoint
from specontext_vllm.retrieval.checkpoint.whole_file import whole_file
from specontext_vllm.retrieval.head import RetrievalHead
from tests.distillation.tiny_models import FAMILIES, make_config
from tests.paging import assert_close
from tests.retrieval.eagle3_files import Layout, write_checkpoint

OPTIONS = {
    "batch_tokens": None,
    "hours": 1.0,
    "steps": None,
    "loss": "both",
    "learning_rate": None,
    "budget": None,
    "seed": 0,
}


def make(config, context=256, **changes):
    torch.manual_seed(1)
    return DraftModel(DraftShape.for_target(config, max_position=context, **changes))


@pytest.mark.parametrize("family", FAMILIES)
def test_a_head_goes_out_and_in_unchanged(tmp_path, family):
    draft = make(make_config(family))
    draft.save(tmp_path)
    again = DraftModel.load(tmp_path, max_position=256, num_layers=5, vocabulary=97)
    assert again.shape == draft.shape
    for name, tensor in draft.state_dict().items():
        torch.testing.assert_close(again.state_dict()[name], tensor.to(torch.bfloat16).float())


def test_yarn_of_a_shorter_head_is_trained_as_it_is_served(tmp_path):
    short, long = tmp_path / "short", tmp_path / "long"
    make(make_config("llama"), context=64).save(short)
    draft = DraftModel.load(short, max_position=512, num_layers=5, vocabulary=97)
    assert (
        draft.shape.rope_scaling["rope_type"] == "yarn" and draft.shape.rope_scaling["factor"] == 8
    )
    draft.save(long)
    head = RetrievalHead(read_checkpoint(long), max_position=512, dtype=torch.float32, device="cpu")
    aux, embeds, positions = (
        [torch.randn(6, 32) for _ in range(3)],
        torch.randn(6, 32),
        torch.tensor([1, 60, 64, 65, 300, 511]),
    )
    _, q, k, _ = draft.queries_keys(embeds[None], torch.cat(aux, -1)[None], positions)
    got_q, got_k = head.project(embeds, head.fuse(aux), positions)
    assert_close("q", q[0].transpose(0, 1), got_q, 1e-5)
    assert_close("k", k[0].transpose(0, 1), got_k, 1e-5)
    # Without YaRN the far positions would be others.
    plain = make(make_config("llama"), context=512)
    plain.load_state_dict(draft.state_dict())
    assert not torch.allclose(
        plain.queries_keys(embeds[None], torch.cat(aux, -1)[None], positions)[2], k, atol=1e-3
    )


def test_a_reduced_vocabulary_is_written_as_offsets(tmp_path):
    config = make_config("llama")
    ids = most_frequent([(torch.tensor([[90, 90, 5, 7, 7]]), None)], 4)
    assert ids.tolist() == [0, 5, 7, 90]
    DraftModel(DraftShape.for_target(config, max_position=64, draft_vocabulary=4), ids).save(
        tmp_path
    )
    tensors = load_file(tmp_path / "model.safetensors")
    assert (torch.arange(4) + tensors["d2t"]).tolist() == ids.tolist() and tensors[
        "t2d"
    ].nonzero().flatten().tolist() == ids.tolist()
    again = DraftModel.load(tmp_path, max_position=64, num_layers=5, vocabulary=97)
    assert again.draft_ids.tolist() == ids.tolist() and again.shape.draft_vocabulary == 4
    del tensors["d2t"]
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(HeadError, match="no d2t"):
        DraftModel.load(tmp_path, max_position=64, num_layers=5, vocabulary=97)


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"hidden_size": 64}, "hidden states of width 32, but the target's hidden_size is 64"),
        ({"num_attention_heads": 4, "num_key_value_heads": 4}, "2 KV heads"),
    ],
    ids=["hidden", "kv-heads"],
)
def test_an_init_of_another_model_is_refused(tmp_path, changes, why):
    make(make_config("llama")).save(tmp_path)
    config = make_config("llama", **changes)
    with pytest.raises(HeadError, match=why) as caught:
        make_draft(config, make_settings(config, context=256, **OPTIONS), str(tmp_path), None, None)
    assert str(caught.value).startswith("--init ")


def test_an_init_with_parts_that_are_not_trained_is_refused(tmp_path):
    with pytest.raises(HeadError, match="cannot be trained further here .tensors unknown: .*norm"):
        DraftModel.load(
            write_checkpoint(tmp_path, Layout(fc_norm=True)),
            max_position=64,
            num_layers=8,
            vocabulary=97,
        )


def test_an_error_while_writing_leaves_the_old_file_alone(tmp_path):
    path = tmp_path / "model.safetensors"
    path.write_text("old")
    for contended in (False, True):
        with pytest.raises(KeyboardInterrupt), whole_file(path, contended=contended) as part:
            part.write_text("ne")
            raise KeyboardInterrupt
        assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]
    with whole_file(path) as part:
        part.write_text("new")
    assert path.read_text() == "new" and list(tmp_path.iterdir()) == [path]


def test_processes_of_one_id_write_a_file_at_once(tmp_path):
    """As on two machines that share the folder."""
    path = tmp_path / "0.safetensors"
    with whole_file(path, contended=True) as first, whole_file(path, contended=True) as second:
        first.write_text("first")
        second.write_text("second")
    assert path.read_text() == "first" and list(tmp_path.iterdir()) == [path]


def test_the_config_names_what_vllm_reads(tmp_path):
    make(make_config("mistral")).save(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["architectures"] == ["LlamaForCausalLMEagle3"]
    assert config["eagle_aux_hidden_state_layer_ids"] == [1, 2, 3]
    assert config["eagle_config"] == {
        "eagle_aux_hidden_state_layer_ids": [1, 2, 3],
        "use_aux_hidden_state": True,
    }
