"""RoPE and the write of the head's keys: against a loop over rows, and, behind ``head_input``,
against the head's own torch methods.
"""

from dataclasses import replace

import pytest
import torch
import triton
import triton.language as tl

from specontext_vllm.config import PAGE_SIZE
from specontext_vllm.retrieval.cache import HeadCache
from specontext_vllm.retrieval.checkpoint import dummy_checkpoint
from specontext_vllm.retrieval.head import RetrievalHead
from specontext_vllm.triton_kernels.head_input import head_input
from specontext_vllm.triton_kernels.head_rope import rope_and_cache
from tests.paging import assert_close


def make_head(device, hidden=48, heads=4, kv_heads=2, head_dim=24, qk_norm=False):
    checkpoint = dummy_checkpoint(
        hidden_size=hidden,
        num_layers=12,
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=head_dim,
        rope_theta=1e4,
        max_position=512,
        dtype=torch.float32,
        seed=3,
    )
    tensors = checkpoint.tensors
    tensors["embed_norm.weight"].uniform_(0.5, 1.5)
    tensors["feature_norm.weight"].uniform_(0.5, 1.5)
    if qk_norm:
        norms = {f"{kind}_norm.weight": torch.rand(head_dim) + 0.5 for kind in "qk"}
        spec = replace(checkpoint.spec, qk_norm=True)
        checkpoint = replace(checkpoint, spec=spec, tensors=tensors | norms)
    return RetrievalHead(checkpoint, max_position=512, dtype=torch.float32, device=device)


@triton.jit
def convert_kernel(p_in, p_out, count, BLOCK: tl.constexpr):
    o_v = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(
        p_out + o_v,
        tl.load(p_in + o_v, mask=o_v < count).to(p_out.dtype.element_ty),
        mask=o_v < count,
    )


def in_eight_bits(values):
    """Float32 ``values`` as e4m3, in float32.

    To the nearest, but in Triton's interpreter. It loses the carry where rounding up reaches the
    next power of two (3.9: the carry is or-ed to the exponent), so that 1.97 becomes 1; the
    reference there is its own conversion.
    """
    if values.is_cuda:
        return values.to(torch.float8_e4m3fn).float()
    converted = torch.empty(values.shape, dtype=torch.float8_e4m3fn)
    convert_kernel[(triton.cdiv(values.numel(), 1024),)](
        values, converted, values.numel(), BLOCK=1024
    )
    return converted.float()


@pytest.mark.parametrize("qk_norm", [False, True], ids=["plain", "qk-norm"])
@pytest.mark.parametrize("with_queries", [True, False], ids=["queries-and-keys", "keys-only"])
@pytest.mark.parametrize("key_dtype", [torch.float32, torch.float8_e4m3fn], ids=["fp32", "fp8"])
def test_decode_projection_matches_the_head(qk_norm, with_queries, key_dtype, device):
    head = make_head(device, qk_norm=qk_norm)
    spec = head.spec
    cache = HeadCache.allocate(
        67, spec.num_kv_heads, spec.head_dim, spec.hidden_size, torch.float32, key_dtype, device
    )
    cache.fused.normal_()
    positions = torch.tensor([0, 1, 16, 17, 95, 160], device=device)
    table = torch.randperm(66).view(6, 11).to(torch.int32).to(device)
    blocks = table.gather(1, (positions // PAGE_SIZE)[:, None]).squeeze(1).long()
    slots = blocks * PAGE_SIZE + positions % PAGE_SIZE
    slots[2] = -1
    embeds = torch.randn(len(positions), spec.embed_size, device=device)

    inputs = head_input(
        embeds,
        cache.fused,
        table,
        positions,
        head.embed_norm,
        head.feature_norm,
        spec.rms_norm_eps,
        PAGE_SIZE,
    )
    fused = cache.previous(table, positions)
    assert (
        (fused[0] == 0).all()
        and torch.equal(fused[1], cache.fused[table[1, 0]])
        and torch.equal(fused[2], cache.fused[table[2, 0]])
    )
    assert_close("inputs", head.inputs(embeds, fused), inputs, 1e-5)

    projection = head.queries_and_keys if with_queries else head.keys_alone
    qk = projection(inputs)

    def written(dtype):
        """Queries, and the keys as float32; NaN where none was written."""
        keys = torch.full(cache.keys.shape, float("nan"), device=device).to(dtype)
        queries = rope_and_cache(
            qk,
            head.cos_sin,
            positions,
            slots,
            keys,
            spec.num_heads if with_queries else 0,
            projection.norm,
            spec.rms_norm_eps,
        )
        return queries, keys.float()

    queries, keys = written(torch.float32)
    reference_q, reference_k = head.project(embeds, fused, positions)
    if with_queries:
        assert_close("queries", reference_q, queries, 1e-5)
    for row, slot in enumerate(slots.tolist()):
        if slot >= 0:
            assert_close(
                "keys", reference_k[row], keys[slot // PAGE_SIZE, :, slot % PAGE_SIZE], 1e-5
            )
    assert int((~keys.isnan()).all(-1).all(1).sum()) == len(positions) - 1, (
        "a padding slot was written"
    )
    if key_dtype != torch.float32:
        assert keys.nan_to_num().abs().max() < torch.finfo(key_dtype).max
        # The same numbers, once more rounded and nothing else.
        expected = torch.where(keys.isnan(), keys, in_eight_bits(keys))
        torch.testing.assert_close(written(key_dtype)[1], expected, rtol=0, atol=0, equal_nan=True)


def naive_rotation(x, cos_sin, position):
    """``x [D]`` in float32, its halves rotated against one another."""
    half = x.shape[0] // 2
    cos, sin = cos_sin[position, :half], cos_sin[position, half:]
    first, second = x[:half], x[half:]
    return torch.cat([first * cos - second * sin, second * cos + first * sin])


@pytest.mark.parametrize("qk_norm", [False, True], ids=["plain", "qk-norm"])
@pytest.mark.parametrize(
    ("queries", "kv_heads", "width"),
    [
        pytest.param(4, 2, 24, id="gqa-odd-width"),
        pytest.param(0, 2, 32, id="keys-only"),
        pytest.param(8, 1, 64, id="mqa"),
        pytest.param(6, 0, 24, id="queries-only"),
    ],
)
def test_each_head_is_rotated_by_its_position_and_keys_go_to_their_slots(
    queries, kv_heads, width, qk_norm, device
):
    positions, slots = torch.tensor([0, 3, 40, 99]), torch.tensor([35, -1, 0, 31])
    heads, eps = queries + kv_heads, 1e-5
    qk = torch.randn(len(positions), heads * width)
    angles = torch.rand(100, width // 2) * 6
    cos_sin = torch.cat([angles.cos(), angles.sin()], -1)
    norm = torch.rand(heads, width) + 0.5 if qk_norm else None
    keys = torch.full((4, kv_heads, PAGE_SIZE, width), float("nan"), device=device)
    found = rope_and_cache(
        qk.to(device),
        cos_sin.to(device),
        positions.to(device),
        slots.to(device),
        keys if kv_heads else None,
        queries,
        None if norm is None else norm.to(device),
        eps,
    )
    wanted_queries = torch.empty(len(positions), queries, width)
    wanted_keys = torch.full(keys.shape, float("nan"))
    for row, (position, slot) in enumerate(zip(positions.tolist(), slots.tolist(), strict=True)):
        for head in range(heads):
            x = qk[row, head * width : (head + 1) * width]
            if norm is not None:
                x = x / (x.pow(2).mean() + eps).sqrt() * norm[head]
            x = naive_rotation(x, cos_sin, position)
            if head < queries:
                wanted_queries[row, head] = x
            elif slot >= 0:
                wanted_keys[slot // PAGE_SIZE, head - queries, slot % PAGE_SIZE] = x
    torch.testing.assert_close(found.cpu(), wanted_queries, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(keys.cpu(), wanted_keys, rtol=1e-5, atol=1e-5, equal_nan=True)
