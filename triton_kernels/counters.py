"""Places of the figures that the kernels of the two tiers count, in one int64 tensor on the device."""

SELECTED, MISSED, RETURNED, FETCHED = range(4)
"""Head pages: selected; to be fetched; held without having been read in the step before; copied,
all layers together.
"""

AWAITED, LATE, LATE_NS = range(4, 7)
"""Layers whose prefetch a decode step waited for; those where it arrived after the layer was ready;
nanoseconds of it.
"""

FILLED = 7
"""Head pages copied into the hot buffers of layers that were offloaded, all layers together."""

COUNTERS = 8
