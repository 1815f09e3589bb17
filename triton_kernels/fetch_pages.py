"""Head pages from the pinned host pool into frames, read by the GPU straight over PCIe."""

import torch
import triton
import triton.language as tl

from specontext_vllm.triton_kernels.stamp import clock

PROGRAMS = 32
"""Programs that copy. Enough to fill a PCIe 5 x16 link at 8 KiB rows, few enough to leave the SMs to attention (spike)."""


@triton.jit(do_not_specialize=["first_source"])
def _fetch_pages_kernel(
    p_host, p_arena, p_sources, p_targets, p_count, p_frames, p_resident, p_times, first_source, layer,
    H: tl.constexpr, WORDS: tl.constexpr, BLOCK: tl.constexpr, N: tl.constexpr, TIMED: tl.constexpr,
):  # fmt: skip
    i_program = tl.program_id(0)
    if layer >= tl.load(p_resident):
        count = tl.load(p_count)
        o_w = tl.arange(0, BLOCK)
        for i in range(i_program, count, N):
            source = first_source.to(tl.int64) + tl.load(p_sources + i)
            target = tl.load(p_targets + i)
            frame = tl.load(p_frames + target // H).to(tl.int64)
            p_from = p_host + source * WORDS
            p_to = p_arena + (frame * H + target % H) * WORDS
            for first in tl.static_range(0, WORDS, BLOCK):
                m_w = first + o_w < WORDS
                tl.store(p_to + first + o_w, tl.load(p_from + first + o_w, mask=m_w, other=0), mask=m_w)
        if TIMED:
            tl.debug_barrier()
            tl.atomic_max(p_times + layer, clock())


def fetch_pages(
    host: torch.Tensor, arena: torch.Tensor, sources: torch.Tensor, targets: torch.Tensor, count: torch.Tensor, frames: torch.Tensor,
    resident: torch.Tensor, *, layer: int, first_source: int, num_kv_heads: int, times: torch.Tensor | None = None, programs: int = PROGRAMS,
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
    """
    words = host.shape[1]
    _fetch_pages_kernel[(programs,)](
        host, arena, sources, targets, count, frames, resident, count if times is None else times, first_source, layer,
        H=num_kv_heads, WORDS=words, BLOCK=min(2048, triton.next_power_of_2(words)), N=programs, TIMED=times is not None, num_warps=8,
    )  # fmt: skip
