"""The decode path of the head (fused input, RoPE and cache write) against the head's own torch methods."""

import pytest
import torch
import torch.nn.functional as F

from specontext_vllm.config import PAGE_SIZE
from specontext_vllm.retrieval.cache import HeadCache
from specontext_vllm.retrieval.checkpoint import dummy_checkpoint
from specontext_vllm.retrieval.head import RetrievalHead
from specontext_vllm.triton_kernels.head_input import head_input
from specontext_vllm.triton_kernels.head_rope import rope_and_cache
from tests.paging import assert_close


def make_head(device, hidden=48, heads=4, kv_heads=2, head_dim=24, qk_norm=False):
    checkpoint = dummy_checkpoint(
        hidden_size=hidden, num_layers=12, num_heads=heads, num_kv_heads=kv_heads, head_dim=head_dim, rope_theta=1e4,
        max_position=512, dtype=torch.float32, seed=3,
    )  # fmt: skip
    head = RetrievalHead(checkpoint, max_position=512, dtype=torch.float32, device=device)
    head.embed_norm.data.uniform_(0.5, 1.5)
    head.feature_norm.data.uniform_(0.5, 1.5)
    if qk_norm:
        head.qk_norm = torch.nn.Parameter(torch.rand(heads + kv_heads, head_dim, device=device) + 0.5, requires_grad=False)
    return head


@pytest.mark.parametrize("qk_norm", [False, True], ids=["plain", "qk-norm"])
@pytest.mark.parametrize("with_queries", [True, False], ids=["queries-and-keys", "keys-only"])
@pytest.mark.parametrize("key_dtype", [torch.float32, torch.float8_e4m3fn], ids=["fp32", "fp8"])
def test_decode_projection_matches_the_head(qk_norm, with_queries, key_dtype, device):
    head = make_head(device, qk_norm=qk_norm)
    spec = head.spec
    cache = HeadCache.allocate(67, spec.num_kv_heads, spec.head_dim, spec.hidden_size, torch.float32, key_dtype, device)
    cache.fused.normal_()
    positions = torch.tensor([0, 1, 16, 17, 95, 160], device=device)
    table = torch.randperm(66).view(6, 11).to(torch.int32).to(device)
    blocks = table.gather(1, (positions // PAGE_SIZE)[:, None]).squeeze(1).long()
    slots = blocks * PAGE_SIZE + positions % PAGE_SIZE
    slots[2] = -1
    embeds = torch.randn(len(positions), spec.embed_size, device=device)

    inputs = head_input(embeds, cache.fused, table, positions, head.embed_norm, head.feature_norm, spec.rms_norm_eps, PAGE_SIZE)
    fused = cache.previous(table, positions)
    assert (fused[0] == 0).all() and torch.equal(fused[1], cache.fused[table[1, 0]]) and torch.equal(fused[2], cache.fused[table[2, 0]])
    assert_close("inputs", head._inputs(embeds, fused), inputs, 1e-5)

    skipped = 0 if with_queries else spec.num_heads
    qk = F.linear(inputs, head.qk_weight[skipped * spec.head_dim :])
    norm = None if head.qk_norm is None else head.qk_norm[skipped:]
    before = cache.keys.clone().fill_(float("nan"))
    keys = before.clone()
    queries = rope_and_cache(qk, head.cos_sin, positions, slots, keys, spec.num_heads - skipped, norm, spec.rms_norm_eps)
    reference_q, reference_k = head.project(embeds, fused, positions)
    if with_queries:
        assert_close("queries", reference_q, queries, 1e-5)
    for row, slot in enumerate(slots.tolist()):
        if slot >= 0:
            # Half a step of e4m3's three bits; Triton's interpreter does not round but cuts off.
            tolerance = 1e-5 if key_dtype == torch.float32 else 2**-4 if device.type == "cuda" else 0.2
            assert_close("keys", reference_k[row], keys[slot // PAGE_SIZE, :, slot % PAGE_SIZE], tolerance)
    assert int((~keys.float().isnan()).all(-1).all(1).sum()) == len(positions) - 1, "a padding slot was written"
