"""Head pages from the pinned host pool into frames, read by the GPU straight over PCIe."""

import torch
import triton
import triton.language as tl

from specontext_vllm.triton_kernels.stamp import clock

PROGRAMS = 8
"""Programs that copy. Each keeps an SM to itself, which costs the matrix products beside it about 1 % of their time."""
TILE_BYTES = 32768
"""What each program has in flight; ``PROGRAMS`` of them fill a PCIe 5 x16 link (case `link` of the benchmarks)."""


@triton.jit(do_not_specialize=["first_source", "layer"], do_not_specialize_on_alignment=["p_frames"])
def _fetch_pages_kernel(
    p_host, p_arena, p_sources, p_targets, p_count, p_frames, p_resident, p_times, first_source, layer,
    H: tl.constexpr, WORDS: tl.constexpr, BLOCK: tl.constexpr, N: tl.constexpr, PAGES: tl.constexpr, TIMED: tl.constexpr,
):  # fmt: skip
    if layer >= tl.load(p_resident):
        count = tl.load(p_count)
        first = tl.program_id(0) * PAGES
        # [PAGES]
        o_i = first + tl.arange(0, PAGES)
        m_i = o_i < count
        b_source = tl.load(p_sources + o_i, mask=m_i, other=0)
        b_target = tl.load(p_targets + o_i, mask=m_i, other=0)
        b_frame = tl.load(p_frames + b_target // H, mask=m_i, other=0)
        # [BLOCK]
        o_w = tl.arange(0, BLOCK)
        m_w = o_w < WORDS
        for done in range(first, count, N * PAGES):
            p_from = p_host + (first_source.to(tl.int64) + b_source) * WORDS
            p_to = p_arena + (b_frame.to(tl.int64) * H + b_target % H) * WORDS
            # [PAGES, BLOCK]
            m_words = m_i[:, None] & m_w[None, :]
            b_words = tl.load(p_from[:, None] + o_w[None, :], mask=m_words, other=0)
            # The next tile's indices come while this one's pages are on the link; the store waits for those.
            o_i = done + N * PAGES + tl.arange(0, PAGES)
            m_i = o_i < count
            b_source = tl.load(p_sources + o_i, mask=m_i, other=0)
            b_target = tl.load(p_targets + o_i, mask=m_i, other=0)
            b_frame = tl.load(p_frames + b_target // H, mask=m_i, other=0)
            tl.store(p_to[:, None] + o_w[None, :], b_words, mask=m_words)
        if TIMED:
            tl.debug_barrier()
            tl.atomic_max(p_times + layer, clock())


def fetch_pages(
    host: torch.Tensor, arena: torch.Tensor, sources: torch.Tensor, targets: torch.Tensor, count: torch.Tensor, frames: torch.Tensor,
    resident: torch.Tensor, *, layer: int, first_source: int, num_kv_heads: int, times: torch.Tensor | None = None, programs: int = PROGRAMS,
    tile_bytes: int = TILE_BYTES,
) -> None:  # fmt: skip
    """Copy ``count`` head pages of one layer, unless that layer is resident; both numbers are read on the device.

    Args:
        host: ``[N, words]`` int32 view of the pinned pool, one row a head page.
        arena: ``[frames * H, words]`` int32 view of the frames.
        sources: ``[C]`` int32 rows of ``host`` from ``first_source`` on.
        targets: ``[C]`` int32 ``place * H + head``, places being entries of ``frames``.
        count: ``[1]`` int32.
        frames: int32 frame of each place.
        resident: ``[1]`` int32; layers below it are resident.
        layer, first_source: the layer, and its first row in ``host``.
        times: ``[L]`` int64; the layer's entry gets the time when the last page had arrived.
        programs, tile_bytes: how many programs copy, and how much each has in flight (at least one page).
    """
    words = host.shape[1]
    block = triton.next_power_of_2(words)
    _fetch_pages_kernel[(programs,)](
        host, arena, sources, targets, count, frames, resident, count if times is None else times, first_source, layer,
        H=num_kv_heads, WORDS=words, BLOCK=block, N=programs, PAGES=max(1, tile_bytes // (4 * block)), TIMED=times is not None,
        num_warps=16,
    )  # fmt: skip
