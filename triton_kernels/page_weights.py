"""What a layer reads each page for: the largest softmax weights of sampled queries."""

import torch
import triton
import triton.language as tl

ROWS = 64
"""Query heads times positions of a program."""
TOKENS = 64
"""Tokens that it reads at a time."""


@triton.jit
def _page_weights_kernel(
    p_query,
    p_key,
    p_place,
    p_max,
    p_total,
    scale,
    sampled,
    tokens,
    pages,
    s_key_batch,
    s_key_head,
    s_key_token,
    NQ: tl.constexpr,
    NKV: tl.constexpr,
    G_PAD: tl.constexpr,
    P: tl.constexpr,
    D: tl.constexpr,
    D_PAD: tl.constexpr,
    POSITIONS: tl.constexpr,
    TOKENS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    i_block = tl.program_id(0)
    i_kv = tl.program_id(1)
    i_batch = tl.program_id(2).to(tl.int64)
    G: tl.constexpr = NQ // NKV
    LN2: tl.constexpr = 0.6931471805599453
    # [POSITIONS * G_PAD]: the query heads of a position side by side.
    o_row = tl.arange(0, POSITIONS * G_PAD)
    o_sample = i_block * POSITIONS + o_row // G_PAD
    o_head = i_kv * G + o_row % G_PAD
    m_row = (o_row % G_PAD < G) & (o_sample < sampled)
    b_place = tl.load(p_place + i_batch * sampled + o_sample, mask=m_row, other=-1)
    o_query = (i_batch * NQ + o_head) * sampled + o_sample
    o_d = tl.arange(0, D_PAD)
    # [POSITIONS * G_PAD, D_PAD]
    b_q = tl.load(
        p_query + o_query[:, None] * D + o_d[None, :],
        mask=m_row[:, None] & (o_d < D)[None, :],
        other=0.0,
    )
    p_head = p_key + i_batch * s_key_batch + i_kv * s_key_head
    scale2 = scale / LN2
    b_top = tl.full((POSITIONS * G_PAD,), float("-inf"), tl.float32)
    b_sum = tl.zeros((POSITIONS * G_PAD,), tl.float32)
    for first in range(0, tl.max(b_place) + 1, TOKENS):
        o_token = first + tl.arange(0, TOKENS)
        # [D_PAD, TOKENS]
        b_k = tl.load(
            p_head + o_token.to(tl.int64)[None, :] * s_key_token + o_d[:, None],
            mask=(o_token < tokens)[None, :] & (o_d < D)[:, None],
            other=0.0,
        )
        b_s = tl.dot(b_q, b_k, input_precision=PRECISION) * scale2
        b_s = tl.where(o_token[None, :] <= b_place[:, None], b_s, float("-inf"))
        # [POSITIONS * G_PAD, TOKENS / P]
        b_page = tl.max(tl.reshape(b_s, (POSITIONS * G_PAD, TOKENS // P, P)), axis=2)
        o_page = first // P + tl.arange(0, TOKENS // P)
        tl.store(
            p_max + o_query[:, None] * pages + o_page[None, :],
            b_page * LN2,
            mask=m_row[:, None] & (o_page < pages)[None, :],
        )
        b_new = tl.maximum(b_top, tl.max(b_page, axis=1))
        b_safe = tl.where(b_new == float("-inf"), 0.0, b_new)
        b_sum = b_sum * tl.exp2(b_top - b_safe) + tl.sum(tl.exp2(b_s - b_safe[:, None]), axis=1)
        b_top = b_new
    tl.store(p_total + o_query, (b_top + tl.log2(b_sum)) * LN2, mask=m_row)


def page_weights(
    query: torch.Tensor, key: torch.Tensor, place: torch.Tensor, scale: float, page_size: int
) -> torch.Tensor:
    """Logarithm of the largest softmax weight that a query head of the group gives one of a page's
    tokens, for queries that see the tokens up to their own place; -inf for pages behind it.

    Args:
        query: ``[B, NQ, S, D]``. key: ``[B, NKV, T, D]`` of the same dtype, last stride 1.
        place: ``[B, S]`` token of each query, 0 or more.
        scale: factor of ``q . k``.
    Returns:
        ``[B, NKV, S, ceil(T / page_size)]`` float32.
    """
    (batch, heads, sampled, d), (kv_heads, tokens) = query.shape, key.shape[1:3]
    pages = triton.cdiv(tokens, page_size)
    page_max = torch.full(
        (batch, heads, sampled, pages), float("-inf"), dtype=torch.float32, device=key.device
    )
    total = torch.empty(batch, heads, sampled, dtype=torch.float32, device=key.device)
    group = triton.next_power_of_2(heads // kv_heads)
    positions = max(1, ROWS // group)
    _page_weights_kernel[(triton.cdiv(sampled, positions), kv_heads, batch)](
        query.contiguous(),
        key,
        place.to(torch.int32).contiguous(),
        page_max,
        total,
        scale,
        sampled,
        tokens,
        pages,
        *key.stride()[:3],
        NQ=heads,
        NKV=kv_heads,
        G_PAD=group,
        P=page_size,
        D=d,
        D_PAD=max(16, triton.next_power_of_2(d)),
        POSITIONS=positions,
        TOKENS=TOKENS,
        PRECISION="ieee" if query.dtype == torch.float32 else "tf32",
    )
    page_max -= total[..., None]
    return page_max.unflatten(1, (kv_heads, -1)).amax(2)
