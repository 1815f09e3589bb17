"""When a stream got to a point, by the GPU's own clock: in a replayed graph no event can tell."""

import torch
import triton
import triton.language as tl

from specontext_vllm.triton_kernels.fetch_pages import clock


@triton.jit(do_not_specialize=["place"])
def _stamp_kernel(p_times, place):
    tl.store(p_times + place, clock())


def stamp(times: torch.Tensor, place: int) -> None:
    """Store the time in nanoseconds in ``times[place]`` (int64) when the stream gets here."""
    _stamp_kernel[(1,)](times, place, num_warps=1)
