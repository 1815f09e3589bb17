"""RoPE that turns a share of the dimensions, in heads of our own format."""

import json
from dataclasses import replace

import pytest
import torch

from specontext_vllm.retrieval.checkpoint import HeadError, read_checkpoint
from specontext_vllm.retrieval.checkpoint.dummy import dummy_checkpoint
from specontext_vllm.retrieval.checkpoint.saving import save_head
from specontext_vllm.retrieval.rope import apply_rope, rope_table


def make_head(share):
    head = dummy_checkpoint(
        hidden_size=16,
        num_layers=8,
        num_heads=2,
        num_kv_heads=1,
        head_dim=16,
        rope_theta=1e4,
        max_position=64,
        dtype=torch.float32,
        seed=0,
    )
    return replace(head, spec=replace(head.spec, partial_rotary_factor=share))


@pytest.mark.parametrize("beyond", [1, 4])
def test_the_share_is_turned_as_a_whole_head_of_its_width_would_be(beyond):
    """With YaRN, which extends a head beyond what it was trained for, and without."""
    spec = make_head(0.5).spec
    x, at = torch.randn(5, 2, 16), torch.tensor([0, 3, 17, 40, 64 * beyond - 1])
    turned = apply_rope(x, rope_table(spec, 64 * beyond, "cpu"), at)
    own = torch.tensor([0, 1, 2, 3, 8, 9, 10, 11])
    narrow = rope_table(replace(spec, head_dim=8, partial_rotary_factor=1.0), 64 * beyond, "cpu")
    torch.testing.assert_close(turned[..., own], apply_rope(x[..., own], narrow, at))
    rest = [i for i in range(16) if i not in own]
    # YaRN's attention factor goes for all of them.
    factor = narrow[0, 0]
    torch.testing.assert_close(turned[..., rest], x[..., rest] * factor)


def test_the_share_is_saved_and_read(tmp_path):
    head = make_head(0.5)
    save_head(tmp_path, head.spec, head.tensors, dtype=None)
    assert read_checkpoint(tmp_path).spec.partial_rotary_factor == 0.5


@pytest.mark.parametrize("share", [0.0, 1.5, 0.3])
def test_a_share_of_no_whole_pairs_is_refused(tmp_path, share):
    head = make_head(0.5)
    save_head(tmp_path, head.spec, head.tensors, dtype=None)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "partial_rotary_factor": share}))
    with pytest.raises(HeadError, match="partial_rotary_factor is"):
        read_checkpoint(tmp_path)
