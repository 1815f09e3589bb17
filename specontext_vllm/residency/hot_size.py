"""How large hot buffers are while the engine runs: few offloaded layers with small ones, or many
with large ones.
"""

from __future__ import annotations

from specontext_vllm.residency.ledger import Ledger

PRIOR_RATES = 0.134, 0.056
"""Miss rates on the demo model: with buffers no larger than the selection, and twice as large
(benchmarks, transfer).
"""

SMOOTHING = 0.25
"""Weight of the newest measurement."""

MAX_RATIO = 0.8
"""A change of size must cut the predicted transfers at least to this share of the present ones."""

HIDDEN_SHARE = 0.05
"""Share of late prefetches up to which the copies count as hidden behind the compute."""

SETTLE_LOOKS = 8
"""Looks at the counters between two changes of the size."""


def prior_rate(hot_pages: int, selection_pages: int) -> float:
    """Miss rate to expect of hot buffers before any was measured: ``PRIOR_RATES``, and a straight
    line between the two sizes.

    Args:
        hot_pages: S, slots of a buffer. selection_pages: most pages that a step selects.
    """
    share = min(max(hot_pages / selection_pages - 1, 0.0), 1.0)
    return (1 - share) * PRIOR_RATES[0] + share * PRIOR_RATES[1]


class HotSizePolicy:
    """Picks the size by the time law, step = max(compute, offloaded layers x misses / link).

    Compute and link do not depend on the size, so the size with the smaller product of offloaded
    layers and miss rate is never the slower one. Larger buffers miss less but leave fewer frames,
    so that more layers are offloaded. While the copies hide behind the compute
    no size is faster than another, and none is changed: that would move layers for nothing.

    Args:
        smallest: S of a buffer that holds one selection. largest: what the memory model allows.
    """

    def __init__(self, smallest: int, largest: int) -> None:
        self.smallest, self.largest = min(smallest, largest), largest
        self.size = largest
        self.late_share = 0.0
        self.hidden = False
        self.rates = {size: prior_rate(size, smallest) for size in (self.smallest, largest)}
        self._looks = 0

    def observe(self, missed: float, missed_by_smallest: float, late_share: float | None) -> None:
        """Take in what was measured at the present size: the miss rate, the one that the smallest
        would have had (``meter.miss_rates``), and the share of prefetches that came late, None
        where they are not timed."""
        self.late_share += SMOOTHING * ((late_share or 0.0) - self.late_share)
        self.hidden = late_share is not None and self.late_share <= HIDDEN_SHARE
        if self.smallest == self.largest:
            return
        if self.size == self.largest:
            measured = {self.largest: missed, self.smallest: missed_by_smallest}
        else:
            # What larger buffers would save cannot be seen now; the ratio last seen stands.
            ratio = self.rates[self.largest] / max(self.rates[self.smallest], 1e-9)
            measured = {self.smallest: missed, self.largest: missed * ratio}
        for size, rate in measured.items():
            self.rates[size] += SMOOTHING * (rate - self.rates[size])

    def choose(self, ledger: Ledger) -> int:
        """The size to use from now on, for the load that the ledger has."""
        self._looks += 1
        other = self.smallest if self.size == self.largest else self.largest
        if (
            not self.hidden
            and self._looks >= SETTLE_LOOKS
            and self._transfers(ledger, other) < MAX_RATIO * self._transfers(ledger, self.size)
        ):
            self.size, self._looks = other, 0
        return self.size

    def _transfers(self, ledger: Ledger, size: int) -> float:
        return ledger.layers_to_offload(size) * self.rates[size]
