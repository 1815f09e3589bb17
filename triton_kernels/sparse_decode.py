"""Decode attention over page tables with one row per (request, KV head). Each sequence is split
into parts; the part that ends last combines them.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from specontext_vllm.float8 import KVScales
from specontext_vllm.step_data import RowQueries

MAX_SPLITS = 64
"""Maximum number of parts of a sequence."""

STEP_BYTES = 16384
"""Bytes of keys, and as many of values, that a program has in flight. Four programs on a processor
then hide the memory's latency.
"""

MAX_STEP_PAGES = 4
"""Maximum number of pages of a step: with more, four programs would not fit into a processor's
registers.
"""

MIN_STEPS = 2
"""Minimum number of steps of a part: combining smaller parts takes longer than reading them."""

COMBINED = 8
"""Parts that are loaded at a time when they are combined."""

WIDE = 2
"""Factor on the pages of a step and on the parts of a launch where a tile has 17 to 32 rows. Such
programs hold so much that fewer fit into a processor; with as much in flight they took 1.08 ms for
what now takes 0.77 (24 rows of 32,768 tokens, five query tokens each, on an H200).
"""

WIDE_TILE = 32
"""Rows of those tiles."""

LOG2_E = 1.4426950408889634

MOST = 100.0
"""Logarithm, base 2, of the most that a sink adds to the tokens' sum: they count for nothing then,
and nothing overflows.
"""


@triton.jit(do_not_specialize=["num_kv_heads", "splits"])
def _sparse_decode_kernel(
    p_query,
    p_kv,
    p_pages,
    p_lengths,
    p_starts,
    p_sinks,
    p_k_scale,
    p_v_scale,
    p_out,
    p_partial,
    p_lse,
    p_ended,
    scale,
    soft_cap,
    s_query,
    s_pages,
    num_kv_heads,
    splits,
    G: tl.constexpr,
    Q: tl.constexpr,
    M_PAD: tl.constexpr,
    P: tl.constexpr,
    D: tl.constexpr,
    D_PAD: tl.constexpr,
    STEP: tl.constexpr,
    MIN_STEPS: tl.constexpr,
    M_OUT: tl.constexpr,
    COMBINED: tl.constexpr,
    PRECISION: tl.constexpr,
    STAGES: tl.constexpr,
    CAPPED: tl.constexpr,
    SINKS: tl.constexpr,
    SCALED: tl.constexpr,
    HALF: tl.constexpr,
    LOG2_E: tl.constexpr,
    MOST: tl.constexpr,
):
    # A grid of one axis: the others are limited to 65,535 programs.
    i_split = tl.program_id(0) % splits
    i_seq = (tl.program_id(0) // splits).to(tl.int64)
    length = tl.load(p_lengths + i_seq)
    pages = (length + P - 1) // P
    per_split = tl.maximum(tl.cdiv(tl.cdiv(pages, splits), STEP), MIN_STEPS) * STEP
    parts = tl.maximum((pages + per_split - 1) // per_split, 1)
    if i_split >= parts:
        return
    first = i_split * per_split
    last = tl.minimum(first + per_split, pages)
    # A tile's rows are the group's heads, for each of the row's query tokens.
    o_m = tl.arange(0, M_PAD)
    o_d = tl.arange(0, D_PAD)
    i_row = i_seq // num_kv_heads
    start, new = i_row, 1
    if Q > 1:
        start = tl.load(p_starts + i_row).to(tl.int64)
        new = tl.load(p_starts + i_row + 1).to(tl.int32) - start.to(tl.int32)
    m_m = o_m < new * G
    m_q = m_m[:, None] & (o_d < D)[None, :]
    # [M_PAD, D_PAD]
    o_q = (start + o_m // G) * s_query + ((i_seq % num_kv_heads) * G + o_m % G) * D
    b_q = tl.load(p_query + o_q[:, None] + o_d[None, :], mask=m_q, other=0.0)
    if HALF:
        b_q = tl.clamp(b_q.to(tl.float32), -65504.0, 65504.0, propagate_nan=tl.PropagateNan.ALL).to(
            tl.float16
        )
    if SCALED:
        scale *= tl.load(p_k_scale)
    # [M_PAD] tokens that each query reads.
    b_seen = length - new + 1 + o_m // G
    b_acc = tl.zeros((M_PAD, D_PAD), tl.float32)
    b_top = tl.full((M_PAD,), float("-inf"), tl.float32)
    # Summed over tokens only once, at the end: a sum across warps would synchronize them in every
    # step.
    b_sums = tl.zeros((M_PAD, STEP * P), tl.float32)
    o_t = tl.arange(0, STEP * P)
    for page in tl.range(first, last, STEP, num_stages=STAGES):
        # [STEP * P]
        o_page = page + o_t // P
        m_t = (o_page < last) & (page * P + o_t < length)
        b_id = tl.load(p_pages + i_seq * s_pages + o_page, mask=m_t, other=0).to(tl.int64)
        # [STEP * P, D_PAD]; keys then values in the last axis
        p_k = p_kv + ((b_id * P + o_t % P) * 2 * D)[:, None] + o_d[None, :]
        m_kv = m_t[:, None] & (o_d < D)[None, :]
        b_k = tl.load(p_k, mask=m_kv, other=0.0).to(b_q.dtype)
        b_v = tl.load(p_k + D, mask=m_kv, other=0.0).to(b_q.dtype)
        if SCALED:
            # A sum of one element, which keeps Triton from converting values after it has laid them
            # out for their product: 8-bit ones would be read from shared memory byte by byte.
            b_v = tl.sum(tl.reshape(b_v, (STEP * P, D_PAD, 1)), axis=2).to(b_q.dtype)
        # [M_PAD, STEP * P] logits in powers of two: the scale includes log2(e).
        b_s = tl.dot(b_q, tl.trans(b_k), input_precision=PRECISION) * scale
        if CAPPED:
            # soft_cap * tanh(logit / soft_cap), with tanh(x) = 1 - 2 / (exp(2 x) + 1), which
            # overflows nowhere; exp(2 x) in powers of two is exp2(2 b_s / soft_cap).
            b_s = soft_cap * LOG2_E * (1.0 - 2.0 / (tl.exp2(b_s * (2.0 / soft_cap)) + 1.0))
        if Q > 1:
            m_s = m_t[None, :] & ((page * P + o_t)[None, :] < b_seen[:, None])
            b_s = tl.where(m_s, b_s, float("-inf"))
        else:
            b_s = tl.where(m_t[None, :], b_s, float("-inf"))
        b_new = tl.maximum(b_top, tl.max(b_s, axis=1))
        b_safe = b_new
        if Q > 1:
            # A part with none but the newest tokens has nothing for the queries before them.
            b_safe = tl.where(b_new == float("-inf"), 0.0, b_new)
        b_p = tl.exp2(b_s - b_safe[:, None])
        b_scale = tl.exp2(b_top - b_safe)
        b_sums = b_sums * b_scale[:, None] + b_p
        b_acc = b_acc * b_scale[:, None] + tl.dot(b_p.to(b_v.dtype), b_v, input_precision=PRECISION)
        b_top = b_new
    b_sum = tl.sum(b_sums, axis=1)
    if SINKS:
        # Joins the sum once a head: here, or where the parts are combined.
        o_head = (i_seq % num_kv_heads) * G + o_m % G
        b_sink = tl.load(p_sinks + o_head) * LOG2_E
        b_sum += tl.where(parts == 1, tl.exp2(tl.minimum(b_sink - b_top, MOST)), 0.0)
    if SCALED:
        b_acc *= tl.load(p_v_scale)
    # A padding row has no token; its output is 0.
    b_acc = b_acc / tl.where(b_sum == 0.0, 1.0, b_sum)[:, None]
    o_out = ((start + o_m // G) * num_kv_heads + i_seq % num_kv_heads) * G + o_m % G
    p_o = p_out + o_out[:, None] * D + o_d[None, :]
    if parts == 1:
        tl.store(p_o, b_acc.to(p_out.dtype.element_ty), mask=m_q)
        return
    o_part = (i_seq * splits + i_split) * (Q * G) + o_m
    tl.store(p_partial + o_part[:, None] * D + o_d[None, :], b_acc, mask=m_q)
    tl.store(p_lse + o_part, b_top + tl.log2(b_sum), mask=m_m)
    # All threads have stored the part before one of them counts it.
    tl.debug_barrier()
    ended = tl.atomic_add(p_ended + i_seq, 1, sem="acq_rel", scope="gpu")
    if ended == parts - 1:
        tl.store(p_ended + i_seq, 0)
        o_c = tl.arange(0, M_OUT)
        c_top = tl.full((M_OUT,), float("-inf"), tl.float32)
        c_sum = tl.zeros((M_OUT,), tl.float32)
        # [M_OUT, D_PAD]; each thread adds up its own elements of all parts
        c_acc = tl.zeros((M_OUT, D_PAD), tl.float32)
        for part in range(0, parts, COMBINED):
            for i in tl.static_range(COMBINED):
                o_all = (i_seq * splits + part + i) * (Q * G) + o_c
                m_all = o_c < tl.where(part + i < parts, new * G, 0)
                # [M_OUT] and [M_OUT, D_PAD]; .cg skips the L1 cache, which does not see other
                # programs' stores.
                b_lse = tl.load(
                    p_lse + o_all, mask=m_all, other=float("-inf"), cache_modifier=".cg"
                )
                b_x = tl.load(
                    p_partial + o_all[:, None] * D + o_d[None, :],
                    mask=m_all[:, None] & (o_d < D)[None, :],
                    other=0.0,
                    cache_modifier=".cg",
                )
                c_new = tl.maximum(c_top, b_lse)
                # -inf in rows of padding.
                c_safe = tl.where(c_new == float("-inf"), 0.0, c_new)
                b_w = tl.exp2(b_lse - c_safe)
                c_scale = tl.exp2(c_top - c_safe)
                c_sum = c_sum * c_scale + b_w
                c_acc = c_acc * c_scale[:, None] + b_x * b_w[:, None]
                c_top = c_new
        if SINKS:
            c_sink = tl.load(p_sinks + (i_seq % num_kv_heads) * G + o_c % G) * LOG2_E
            c_sum += tl.exp2(tl.minimum(c_sink - c_top, MOST))
        o_row = ((start + o_c // G) * num_kv_heads + i_seq % num_kv_heads) * G + o_c % G
        p_c = p_out + o_row[:, None] * D + o_d[None, :]
        m_c = (o_c < new * G)[:, None] & (o_d < D)[None, :]
        tl.store(
            p_c,
            (c_acc / tl.where(c_sum == 0.0, 1.0, c_sum)[:, None]).to(p_out.dtype.element_ty),
            mask=m_c,
        )


@dataclass(frozen=True)
class SplitWorkspace:
    """Partial results, which the last part of a sequence combines. Calls that share a workspace
    must not overlap.

    Attributes:
        parts: number of parts of all sequences together that a launch aims for.
        partial: float32, outputs of the parts.
        lse: float32, logarithms of their softmax sums, base 2.
        ended: ``[parts]`` int32, parts of each sequence that have ended; 0 between calls.
    """

    parts: int
    partial: torch.Tensor
    lse: torch.Tensor
    ended: torch.Tensor

    @classmethod
    def allocate(
        cls, parts: int, group: int, head_dim: int, device: torch.device
    ) -> SplitWorkspace:
        """For any number of sequences of ``group`` query heads, over all query tokens of a row."""
        most = WIDE * parts if group > WIDE_TILE // 2 else parts
        # With two parts or more each, there are at most parts / 1.5 sequences, and rounding adds
        # at most half a part to each.
        size = 2 * most * group
        return cls(
            parts,
            torch.empty(size * head_dim, dtype=torch.float32, device=device),
            torch.empty(size, dtype=torch.float32, device=device),
            torch.zeros(most, dtype=torch.int32, device=device),
        )

    def splits(self, sequences: int, factor: int = 1) -> int:
        """Number of parts of each sequence, where a launch aims for ``factor`` times the parts."""
        return min(max(round(factor * self.parts / sequences), 1), MAX_SPLITS)


def sparse_decode(
    query: torch.Tensor,
    head_pages: torch.Tensor,
    pages: torch.Tensor,
    lengths: torch.Tensor,
    output: torch.Tensor,
    scale: float,
    workspace: SplitWorkspace,
    queries: RowQueries | None = None,
    soft_cap: float = 0.0,
    sinks: torch.Tensor | None = None,
    scales: KVScales | None = None,
) -> None:
    """Attention of the query tokens of R rows; each KV head of a row is a sequence with its own
    list of pages.

    Args:
        query: ``[N, H * G, D]``; the row stride is free; copied if its rows are not contiguous.
        head_pages: ``[num_blocks * H, P, 2 * D]`` contiguous, keys then values in the last axis; of
            the query's dtype, or with ``scales`` 8-bit floats.
        pages: ``[R * H, K]`` int32 head-page ids; only the first ``ceil(length / P)`` of a sequence
            are read.
        lengths: ``[R * H]`` int32 tokens; the last page may be partly filled; 0 gives zeros.
        output: ``[N, H * G, D]`` contiguous, written.
        scale: factor on ``q . k``.
        workspace: for ``G * queries.max_len`` query heads.
        queries: which tokens are whose, each reading the list up to itself; None: one a row.
        soft_cap: logits become ``soft_cap * tanh(logit / soft_cap)``; 0: they stay.
        sinks: ``[H * G]`` float32, of each head a logit that joins the sum of the softmax.
        scales: of keys and values.
    """
    tokens, heads, d = query.shape
    rows, most = tokens, 1
    if queries is not None:
        rows, most = queries.starts.shape[0] - 1, queries.max_len
    if query.stride()[1:] != (d, 1):
        query = query.contiguous()
    sequences = lengths.shape[0]
    num_kv_heads = sequences // rows
    group, page_size = heads // num_kv_heads, head_pages.shape[1]
    d_pad = max(16, triton.next_power_of_2(d))
    step = min(max(STEP_BYTES // (page_size * d_pad * query.element_size()), 1), MAX_STEP_PAGES)
    tile = max(16, triton.next_power_of_2(group * most))
    factor = WIDE if tile == WIDE_TILE else 1
    step *= factor
    # No more than the longest list can be cut into: even programs that end at once cost time.
    splits = min(workspace.splits(sequences, factor), triton.cdiv(pages.shape[1], MIN_STEPS * step))
    _sparse_decode_kernel[(splits * sequences,)](
        query,
        head_pages,
        pages,
        lengths,
        lengths if queries is None else queries.starts,
        lengths if sinks is None else sinks,
        lengths if scales is None else scales.key,
        lengths if scales is None else scales.value,
        output,
        workspace.partial,
        workspace.lse,
        workspace.ended,
        scale * LOG2_E,
        soft_cap,
        query.stride(0),
        pages.stride(0),
        num_kv_heads,
        splits,
        G=group,
        Q=most,
        M_PAD=tile,
        P=page_size,
        D=d,
        D_PAD=d_pad,
        STEP=step,
        MIN_STEPS=MIN_STEPS,
        M_OUT=triton.next_power_of_2(group * most),
        COMBINED=COMBINED,
        PRECISION="ieee" if query.dtype == torch.float32 else "tf32",
        STAGES=3,
        CAPPED=bool(soft_cap),
        SINKS=sinks is not None,
        SCALED=scales is not None,
        # IEEE float16 represents 8-bit floats exactly, and GPUs convert them with one instruction;
        # bfloat16 queries are exact in it, too, but for very large ones, which are clamped, and
        # very small ones.
        HALF=scales is not None and query.dtype != torch.float32,
        LOG2_E=LOG2_E,
        MOST=MOST,
        num_warps=4,
    )
