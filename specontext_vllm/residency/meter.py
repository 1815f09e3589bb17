"""Figures that the device counts, and how the host gets to see them without waiting."""

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
"""Steps between two looks at the counters."""


class Meter:
    """Counters on the device, an exact reading of them, and a late one that costs no wait.

    Attributes:
        counts: ``[COUNTERS]`` int64 on the device; kernels add to it and nothing else writes it.
        seen: the same as the host last saw it.
    """

    def __init__(self, device: torch.device) -> None:
        self.counts = torch.zeros(COUNTERS, dtype=torch.int64, device=device)
        self.seen = np.zeros(COUNTERS, np.int64)
        self._base = np.zeros(COUNTERS, np.int64)
        self._copy = LateCopy(self.counts)
        self._polls = 0

    def poll(self) -> np.ndarray | None:
        """Called once a step: what was counted between the last two looks, when there is news; else
        None.
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
    """What counters of some steps say: ``hit_rate``, ``fetched_bytes``, ``late_share`` of the
    layers' prefetches and ``late_us``, the mean microseconds of a late one."""
    return {
        "hit_rate": float(1 - counted[MISSED] / max(1, counted[SELECTED])),
        "fetched_bytes": int(counted[FETCHED]) * head_page_bytes,
        "late_share": late_share(counted) or 0.0,
        "late_us": float(counted[LATE_NS] / max(1, counted[LATE]) / 1e3),
    }


def late_share(counted: np.ndarray) -> float | None:
    """Share of the layers' prefetches that came late; None where none was timed."""
    return float(counted[LATE] / counted[AWAITED]) if counted[AWAITED] else None


def miss_rates(counted: np.ndarray) -> tuple[float, float] | None:
    """Share of the selected head pages that were missed, and that would have been missed with no
    slot beyond the selection's own.

    The second one counts hits on pages that the step before did not read. None when nothing was
    selected.
    """
    if not counted[SELECTED]:
        return None
    return counted[MISSED] / counted[SELECTED], (counted[MISSED] + counted[RETURNED]) / counted[
        SELECTED
    ]
