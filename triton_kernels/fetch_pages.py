"""Copy head pages from the pinned host pool into frames, directly over PCIe; and wait for them on
the device.
"""

import torch
import triton
import triton.language as tl

from specontext_vllm.step_data import Misses
from specontext_vllm.tier_data import CopyProgress
from specontext_vllm.triton_kernels import counters

_AWAITED, _LATE, _LATE_NS = (
    tl.constexpr(counters.AWAITED),
    tl.constexpr(counters.LATE),
    tl.constexpr(counters.LATE_NS),
)

PROGRAMS = 6
"""Programs that copy. Each occupies an SM, which slows concurrent matrix products by about 1 %."""
TILE_BYTES = 65536
"""Bytes that each program has in flight; ``PROGRAMS`` tiles fill a PCIe 5 x16 link
(`python -m benchmarks link`).
"""

_BRIEF_NS = tl.constexpr(10**6)


@triton.jit
def clock():
    """Nanoseconds of the GPU's global timer. The warp's first thread reads it for all, so that a
    branch on it does not diverge.
    """
    return tl.inline_asm_elementwise(
        """{
        .reg .b32 low, high;
        .reg .b64 now;
        mov.u64 now, %globaltimer;
        mov.b64 {low, high}, now;
        shfl.sync.idx.b32 low, low, 0, 31, 0xffffffff;
        shfl.sync.idx.b32 high, high, 0, 31, 0xffffffff;
        mov.b64 $0, {low, high};
        }""",
        "=l",
        [],
        dtype=tl.int64,
        is_pure=False,
        pack=1,
    )


@triton.jit(
    do_not_specialize=["first_layer", "stop_layer", "first_source", "s_frames"],
    do_not_specialize_on_alignment=["p_frames"],
)
def _fetch_pages_kernel(
    p_host,
    p_arena,
    p_sources,
    p_targets,
    p_count,
    p_frames,
    p_resident,
    p_done,
    first_layer,
    stop_layer,
    first_source,
    layer_sources,
    s_frames,
    H: tl.constexpr,
    WORDS: tl.constexpr,
    BLOCK: tl.constexpr,
    N: tl.constexpr,
    PAGES: tl.constexpr,
    SIGNALS: tl.constexpr,
):
    count = tl.load(p_count)
    resident = tl.load(p_resident)
    first = tl.program_id(0) * PAGES
    # [BLOCK]
    o_w = tl.arange(0, BLOCK)
    m_w = o_w < WORDS
    for layer in range(first_layer, stop_layer):
        if layer >= resident:
            source_base = (
                first_source.to(tl.int64) + (layer - first_layer).to(tl.int64) * layer_sources
            )
            p_layer_frames = p_frames + (layer - first_layer).to(tl.int64) * s_frames
            # [PAGES]
            o_i = first + tl.arange(0, PAGES)
            m_i = o_i < count
            b_source = tl.load(p_sources + o_i, mask=m_i, other=0)
            b_target = tl.load(p_targets + o_i, mask=m_i, other=0)
            b_frame = tl.load(p_layer_frames + b_target // H, mask=m_i, other=0)
            for done in range(first, count, N * PAGES):
                p_from = p_host + (source_base + b_source) * WORDS
                p_to = p_arena + (b_frame.to(tl.int64) * H + b_target % H) * WORDS
                # [PAGES, BLOCK]
                m_words = m_i[:, None] & m_w[None, :]
                b_words = tl.load(p_from[:, None] + o_w[None, :], mask=m_words, other=0)
                # Load the next tile's indices while this tile's pages are on the link: the store
                # below waits for the pages.
                o_i = done + N * PAGES + tl.arange(0, PAGES)
                m_i = o_i < count
                b_source = tl.load(p_sources + o_i, mask=m_i, other=0)
                b_target = tl.load(p_targets + o_i, mask=m_i, other=0)
                b_frame = tl.load(p_layer_frames + b_target // H, mask=m_i, other=0)
                tl.store(p_to[:, None] + o_w[None, :], b_words, mask=m_words)
        if SIGNALS:
            # All threads have stored before one thread signals.
            tl.debug_barrier()
            tl.atomic_add(p_done + layer, 1, sem="release")


def fetch_pages(
    host: torch.Tensor,
    arena: torch.Tensor,
    misses: Misses,
    frames: torch.Tensor,
    resident: torch.Tensor,
    *,
    layers: range,
    first_source: int,
    layer_sources: int,
    num_kv_heads: int,
    done: torch.Tensor | None = None,
    programs: int = PROGRAMS,
    tile_bytes: int = TILE_BYTES,
) -> None:
    """Copy the same head pages of consecutive layers, layer by layer; skip resident layers.

    Args:
        host: ``[N, words]`` int32 view of the pinned pool, one row a head page.
        arena: ``[F * H, words]`` int32 view of the frames.
        misses: the head pages; ``sources`` are rows of ``host`` counted from the layer's first row,
            ``targets`` are ``place * H + head``, where a place is a column of ``frames``.
        frames: ``[len(layers), places]`` int32 frame of each place.
        resident: ``[1]`` int32 number of resident layers.
        layers: the layers.
        first_source: first row of the first layer in ``host``.
        layer_sources: rows of a layer in ``host``.
        done: ``[L]`` int32 as in ``CopyProgress``, or None.
        programs: programs that copy.
        tile_bytes: bytes that each has in flight, at least one page.
    """
    words = host.shape[1]
    block = triton.next_power_of_2(words)
    _fetch_pages_kernel[(programs,)](
        host,
        arena,
        misses.sources,
        misses.targets,
        misses.count,
        frames,
        resident,
        misses.count if done is None else done,
        layers.start,
        layers.stop,
        first_source,
        layer_sources,
        frames.stride(0),
        H=num_kv_heads,
        WORDS=words,
        BLOCK=block,
        N=programs,
        PAGES=max(1, tile_bytes // (4 * block)),
        SIGNALS=done is not None,
        num_warps=16,
    )


@triton.jit(do_not_specialize=["layer"])
def _await_pages_kernel(
    p_done,
    p_epoch,
    p_resident,
    p_overdue,
    p_counts,
    layer,
    N: tl.constexpr,
    LIMIT: tl.constexpr,
    TIMED: tl.constexpr,
):
    if layer >= tl.load(p_resident):
        # Both counters wrap around in the same way.
        wanted = tl.load(p_epoch) * N
        done = tl.atomic_add(p_done + layer, 0, sem="acquire")
        if TIMED:
            tl.atomic_add(p_counts + _AWAITED, 1)
        if done - wanted < 0:
            begin = clock()
            waited = begin - begin
            while (done - wanted < 0) & (waited < LIMIT):
                done = tl.atomic_add(p_done + layer, 0, sem="acquire")
                waited = clock() - begin
                if waited > _BRIEF_NS:
                    # After one timeout the engine ends; later waits give up at once.
                    waited = tl.where(tl.load(p_overdue, volatile=True) > 0, LIMIT, waited)
            if done - wanted < 0:
                tl.store(p_overdue, layer + 1, mask=tl.load(p_overdue, volatile=True) == 0)
            if TIMED:
                tl.atomic_add(p_counts + _LATE, 1)
                tl.atomic_add(p_counts + _LATE_NS, clock() - begin)


def await_pages(
    progress: CopyProgress,
    resident: torch.Tensor,
    counts: torch.Tensor | None,
    *,
    layer: int,
    seconds: float,
    programs: int = PROGRAMS,
) -> None:
    """Hold the current stream until the latest fetch has copied a layer; return at once for a
    resident layer.

    One thread polls a counter in device memory. That is cheaper than an external event in a
    captured graph, and lets the copies begin before the graph does. The copies never wait for this
    stream, so the polling warp cannot block them.

    Args:
        progress: ``overdue`` must be readable by the host (pinned) or lie on the device. It is set
            when the copies have not come in ``seconds``; the stream then goes on without them.
        resident: ``[1]`` int32 number of resident layers.
        counts: ``[COUNTERS]`` int64 counters (module ``counters``) of waits, late layers and their
            nanoseconds; None to count nothing.
        seconds: timeout by the GPU's clock. Once ``overdue`` is set, waits last a millisecond.
        programs: as in the call of ``fetch_pages``.
    """
    _await_pages_kernel[(1,)](
        progress.done,
        progress.epoch,
        resident,
        progress.overdue,
        progress.done if counts is None else counts,
        layer,
        N=programs,
        LIMIT=int(seconds * 1e9),
        TIMED=counts is not None,
        num_warps=1,
    )
