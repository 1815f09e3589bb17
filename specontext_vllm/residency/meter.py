"""The counters of the two tiers' kernels, and how the host reads them without waiting."""

from __future__ import annotations

import numpy as np
import torch

from specontext_vllm.late_copy import LateCopy
from specontext_vllm.triton_kernels.counters import (
    AWAITED,
    COUNTERS,
    FETCHED,
    LATE,
    LATE_NS,
    MISSED,
    RETURNED,
    SELECTED,
)

POLL_STEPS = 16
"""Steps between two readings of the counters."""


class Meter:
    """Counters on the device, with an exact reading and a late one that does not wait.

    Attributes:
        counts: ``[COUNTERS]`` int64 on the device, which kernels add to.
        seen: its values in the last late reading.
    """

    def __init__(self, device: torch.device) -> None:
        self.counts = torch.zeros(COUNTERS, dtype=torch.int64, device=device)
        self.seen = np.zeros(COUNTERS, np.int64)
        self._base = np.zeros(COUNTERS, np.int64)
        self._copy = LateCopy(self.counts)
        self._polls = 0

    def poll(self) -> np.ndarray | None:
        """Call once a step; what was counted between the last two late readings when one has just
        arrived, else None.
        """
        self._polls += 1
        if self._polls % POLL_STEPS == 0:
            self._copy.ask()
        if (taken := self._copy.take()) is None:
            return None
        news, self.seen = taken[0] - self.seen, taken[0]
        return news

    def read(self, reset: bool) -> np.ndarray:
        """Exactly what was counted since the last reset; waits for the device."""
        now = self.counts.cpu().numpy()
        since = now - self._base
        if reset:
            self._base = now.copy()
        return since


def ratios(counted: np.ndarray, head_page_bytes: int) -> dict[str, float]:
    """Figures from the counters of some steps: ``hit_rate``, ``fetched_bytes``, ``late_share`` of
    the layers' fetches, and ``late_us``, the mean lateness of a late one in microseconds.
    """
    return {
        "hit_rate": float(1 - counted[MISSED] / max(1, counted[SELECTED])),
        "fetched_bytes": int(counted[FETCHED]) * head_page_bytes,
        "late_share": late_share(counted) or 0.0,
        "late_us": float(counted[LATE_NS] / max(1, counted[LATE]) / 1e3),
    }


def late_share(counted: np.ndarray) -> float | None:
    """Share of the layers' fetches that came late; None where none was timed."""
    return float(counted[LATE] / counted[AWAITED]) if counted[AWAITED] else None


def miss_rates(counted: np.ndarray) -> tuple[float, float] | None:
    """Share of the selected head pages that were missed, and the share that buffers without a slot
    beyond the selection would have missed; None when nothing was selected.

    Such buffers would also miss the pages that the step before did not read.
    """
    if not counted[SELECTED]:
        return None
    return counted[MISSED] / counted[SELECTED], (counted[MISSED] + counted[RETURNED]) / counted[
        SELECTED
    ]
