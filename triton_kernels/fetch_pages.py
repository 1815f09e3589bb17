"""Head pages from the pinned host pool into frames, read by the GPU straight over PCIe; and waiting
for them on the device.
"""

import torch
import triton
import triton.language as tl

from specontext_vllm.triton_kernels import counters

_AWAITED, _LATE, _LATE_NS = (
    tl.constexpr(counters.AWAITED),
    tl.constexpr(counters.LATE),
    tl.constexpr(counters.LATE_NS),
)

PROGRAMS = 6
"""Programs that copy. Each keeps an SM to itself, which costs the matrix products beside it about 1
% of their time.
"""
TILE_BYTES = 65536
"""What each program has in flight; ``PROGRAMS`` of them fill a PCIe 5 x16 link (case `link` of the
benchmarks).
"""

_BRIEF_NS = tl.constexpr(10**6)


@triton.jit
def clock():
    """Nanoseconds of the GPU's global timer, as a warp's first thread reads it: what hangs on them
    does not part the threads.
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
                # The next tile's indices come while this one's pages are on the link; the store
                # waits for those.
                o_i = done + N * PAGES + tl.arange(0, PAGES)
                m_i = o_i < count
                b_source = tl.load(p_sources + o_i, mask=m_i, other=0)
                b_target = tl.load(p_targets + o_i, mask=m_i, other=0)
                b_frame = tl.load(p_layer_frames + b_target // H, mask=m_i, other=0)
                tl.store(p_to[:, None] + o_w[None, :], b_words, mask=m_words)
        if SIGNALS:
            # All threads' stores come before the one thread that tells of them.
            tl.debug_barrier()
            tl.atomic_add(p_done + layer, 1, sem="release")


def fetch_pages(
    host: torch.Tensor,
    arena: torch.Tensor,
    sources: torch.Tensor,
    targets: torch.Tensor,
    count: torch.Tensor,
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
    """Copy the same ``count`` head pages of several layers, layer by layer, but for those that are
    resident; both numbers are read on the device.

    Args:
        host: ``[N, words]`` int32 view of the pinned pool, one row a head page.
        arena: ``[frames * H, words]`` int32 view of the frames.
        sources: ``[C]`` int32 rows of ``host``, counted from the layer's first.
        targets: ``[C]`` int32 ``place * H + head``, places being entries of a layer's row of
            ``frames``.
        count: ``[1]`` int32.
        frames: ``[len(layers), K]`` int32 frame of each place.
        resident: ``[1]`` int32; layers below it are resident.
        layers: consecutive layers. first_source: first row of their first in ``host``;
            layer_sources: rows from one to the next.
        done: ``[L]`` int32; each program adds one to a layer's entry when its share of the layer
            has been copied.
        programs, tile_bytes: how many programs copy, and how much each has in flight (at least one
            page).
    """
    words = host.shape[1]
    block = triton.next_power_of_2(words)
    _fetch_pages_kernel[(programs,)](
        host,
        arena,
        sources,
        targets,
        count,
        frames,
        resident,
        count if done is None else done,
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
        # Both sides wrap around alike.
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
                    # Once one wait was in vain the engine ends, and those behind it need not take
                    # as long.
                    waited = tl.where(tl.load(p_overdue, volatile=True) > 0, LIMIT, waited)
            if done - wanted < 0:
                tl.store(p_overdue, layer + 1, mask=tl.load(p_overdue, volatile=True) == 0)
            if TIMED:
                tl.atomic_add(p_counts + _LATE, 1)
                tl.atomic_add(p_counts + _LATE_NS, clock() - begin)


def await_pages(
    done: torch.Tensor,
    epoch: torch.Tensor,
    resident: torch.Tensor,
    overdue: torch.Tensor,
    counts: torch.Tensor | None,
    *,
    layer: int,
    seconds: float,
    programs: int = PROGRAMS,
) -> None:
    """Hold the current stream until ``fetch_pages`` number ``epoch`` has copied a layer; at once
    for a resident layer.

    One thread looks at a counter in device memory: an event that a captured graph waits for costs
        20 us a layer (H200, 2026-11-24), and the
    copies may begin before the graph does. The copies never wait for this stream, so the one
    waiting warp cannot keep them off the GPU.

    Args:
        done: ``[L]`` int32 of ``fetch_pages``. epoch: ``[1]`` int32, how many calls there were.
        resident: ``[1]`` int32.
        overdue: ``[1]`` int32 that the host may read at any time, pinned or on the device. 0;
            written where the copies have not come in ``seconds``, and the stream goes on without
                them: the layer plus 1.
        counts: int64 counters (module ``counters``) of waits, late layers and their nanoseconds;
            None: not counted.
        seconds: by the GPU's clock. Once ``overdue`` is written, waits last a millisecond.
    """
    _await_pages_kernel[(1,)](
        done,
        epoch,
        resident,
        overdue,
        done if counts is None else counts,
        layer,
        N=programs,
        LIMIT=int(seconds * 1e9),
        TIMED=counts is not None,
        num_warps=1,
    )
