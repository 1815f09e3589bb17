"""A worker's part of a head computes the queries and keys that the whole head has for the worker's
heads.
"""

import pytest
import torch

from specontext_vllm.retrieval.checkpoint import HeadError, read_checkpoint
from specontext_vllm.retrieval.head import RetrievalHead
from specontext_vllm.retrieval.shard import shard_checkpoint
from tests.retrieval.eagle3_files import Layout, write_checkpoint
from tests.retrieval.own_heads import KINDS, make_own


def project(checkpoint):
    """Queries and keys of some tokens."""
    spec = checkpoint.spec
    generator = torch.Generator().manual_seed(1)
    aux = [
        torch.randn(9, spec.target_hidden_size, generator=generator) for _ in range(spec.num_aux)
    ]
    head = RetrievalHead(checkpoint, max_position=64, dtype=torch.float32, device="cpu")
    embeds = torch.randn(9, spec.embed_size, generator=generator)
    fused, positions = head.fuse(aux), torch.arange(9)
    own = fused if spec.key_states == "own" else None
    # As if they were those of the tokens before.
    before = fused.flip(0)
    return head.queries(embeds, before, positions), head.keys(embeds, before, positions, own)


def eagle(tmp_path, kv_heads, **extras):
    write_checkpoint(tmp_path, Layout(num_kv_heads=kv_heads, **extras))
    return read_checkpoint(tmp_path)


def own(tmp_path, kv_heads, **extras):
    return make_own(num_heads=6, num_kv_heads=kv_heads, **extras)


@pytest.mark.parametrize(
    ("kv_heads", "size"),
    [(2, 2), (6, 3), (2, 6), (1, 3), (1, 2)],
    ids=["one-each", "mha", "replicated", "mqa", "mqa-pairs"],
)
@pytest.mark.parametrize(
    ("make", "extras"),
    [
        pytest.param(eagle, {}, id="plain"),
        pytest.param(
            eagle, {"format": "speculators", "bias": True, "qk_norm": True}, id="bias-and-norms"
        ),
        pytest.param(own, KINDS["own-all-of-it"], id="own-all-of-it"),
        pytest.param(own, KINDS["previous-mlps"], id="previous-mlps"),
    ],
)
def test_workers_have_the_heads_that_vllm_gives_them(tmp_path, kv_heads, size, make, extras):
    whole = make(tmp_path, kv_heads, **extras)
    heads, group = whole.spec.num_heads, whole.spec.num_heads // kv_heads
    q, k = project(whole)
    for rank in range(size):
        own_q, own_k = project(shard_checkpoint(whole, rank=rank, size=size))
        mine = range(rank * heads // size, (rank + 1) * heads // size)
        torch.testing.assert_close(own_q, q[:, mine.start : mine.stop])
        # The KV heads are those that the worker's query heads belong to.
        torch.testing.assert_close(own_k, k[:, mine.start // group : (mine.stop - 1) // group + 1])


def test_a_head_with_groups_is_cut_into_its_kv_heads_at_most():
    whole = make_own(num_heads=24, num_kv_heads=3, layer_groups=2)
    q, _ = project(whole)
    for rank in range(3):
        part = shard_checkpoint(whole, rank=rank, size=3)
        assert part.spec.layer_groups == 2
        torch.testing.assert_close(project(part)[0], q[:, 8 * rank : 8 * rank + 8])
    with pytest.raises(HeadError, match="--tensor-parallel-size: found 6, but a head with queries"):
        shard_checkpoint(whole, rank=0, size=6)


@pytest.mark.parametrize(
    ("kv_heads", "size"), [(2, 4), (6, 4), (3, 2)], ids=["query-heads", "both", "kv-heads"]
)
def test_heads_that_cannot_be_divided_are_refused(tmp_path, kv_heads, size):
    write_checkpoint(tmp_path, Layout(num_kv_heads=kv_heads))
    with pytest.raises(HeadError, match=f"--tensor-parallel-size: found {size}"):
        shard_checkpoint(read_checkpoint(tmp_path), rank=0, size=size)
