"""The size of the hot buffers while the engine runs: small ones with few offloaded layers, or large
ones with many.
"""

from __future__ import annotations

from specontext_vllm.residency.ledger import Ledger

PRIOR_RATES = 0.134, 0.056
"""Miss rates of buffers as large as the selection, and twice as large, on the demo model
(`python -m benchmarks transfer`).
"""

SMOOTHING = 0.25
"""Weight of the newest measurement."""

MAX_RATIO = 0.8
"""A change of size must cut the predicted transfers at least to this share of the present ones."""

HIDDEN_SHARE = 0.05
"""Share of late fetches up to which the copies count as hidden behind the compute."""

SETTLE_READINGS = 8
"""Readings of the counters between two changes of the size."""


def prior_rate(hot_pages: int, selection_pages: int) -> float:
    """The miss rate to assume before one was measured: linear between the two ``PRIOR_RATES``.

    Args:
        hot_pages: S, slots of a buffer.
        selection_pages: pages that a step selects, at the most.
    """
    share = min(max(hot_pages / selection_pages - 1, 0.0), 1.0)
    return (1 - share) * PRIOR_RATES[0] + share * PRIOR_RATES[1]


class HotSizePolicy:
    """Picks the size by the time law, step = max(compute, offloaded layers x misses / link).

    Compute and link do not depend on the size, so the size with the smaller product of offloaded
    layers and miss rate is never the slower one. Larger buffers miss less but take more frames, so
    that more layers are offloaded. While the copies are hidden behind the compute, all sizes are
    equally fast, and the size stays: a change would move layers for nothing.

    Args:
        smallest: slots of a buffer that holds one selection.
        largest: slots that the memory model allows.
    """

    def __init__(self, smallest: int, largest: int) -> None:
        self.smallest, self.largest = min(smallest, largest), largest
        self.size = largest
        self.late_share = 0.0
        self.hidden = False
        self.rates = {size: prior_rate(size, smallest) for size in (self.smallest, largest)}
        self._readings = 0

    def observe(self, missed: float, missed_by_smallest: float, late_share: float | None) -> None:
        """Take in what was measured at the present size.

        Args:
            missed, missed_by_smallest: the miss rate, and the one that buffers of the smallest size
                would have had (``meter.miss_rates``).
            late_share: share of the layers' fetches that came late; None where they are not timed.
        """
        self.late_share += SMOOTHING * ((late_share or 0.0) - self.late_share)
        self.hidden = late_share is not None and self.late_share <= HIDDEN_SHARE
        if self.smallest == self.largest:
            return
        if self.size == self.largest:
            measured = {self.largest: missed, self.smallest: missed_by_smallest}
        else:
            # Small buffers do not show what larger ones would save: keep the ratio seen last.
            ratio = self.rates[self.largest] / max(self.rates[self.smallest], 1e-9)
            measured = {self.smallest: missed, self.largest: missed * ratio}
        for size, rate in measured.items():
            self.rates[size] += SMOOTHING * (rate - self.rates[size])

    def choose(self, ledger: Ledger) -> int:
        """The size to use from now on, for the running requests."""
        self._readings += 1
        other = self.smallest if self.size == self.largest else self.largest
        if (
            not self.hidden
            and self._readings >= SETTLE_READINGS
            and self._transfers(ledger, other) < MAX_RATIO * self._transfers(ledger, self.size)
        ):
            self.size, self._readings = other, 0
        return self.size

    def _transfers(self, ledger: Ledger, size: int) -> float:
        return ledger.layers_to_offload(size) * self.rates[size]
