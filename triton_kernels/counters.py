"""Indices of the counters that the two tiers' kernels add to, in one int64 tensor on the device."""

SELECTED, MISSED, RETURNED, FETCHED = range(4)
"""Head pages: selected; missing from their hot buffer; in their hot buffer though the step before
did not read them; copied for misses, summed over layers.
"""

AWAITED, LATE, LATE_NS = range(4, 7)
"""Layers whose misses a decode step waited for; layers whose misses came after the layer was ready;
nanoseconds of that lateness.
"""

FILLED = 7
"""Head pages copied into the hot buffers of newly offloaded layers, summed over layers."""

COUNTERS = 8
"""Number of counters."""
