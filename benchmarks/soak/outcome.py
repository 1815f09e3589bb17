"""The outcome of a load, and what is wrong with it."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

WARM_UP_SHARE = 0.5
"""Share of the requests after which memory must not grow any more: that of a process of this size
levels off only after some 5,000 requests.
"""
GROWTH = 0.02
"""Growth of resident memory, over the rest of the run, that counts as none."""


@dataclass
class Outcome:
    """The outcome of a load.

    Attributes:
        counts: requests by kind ("whole", "streamed", "given up"), "wrong", "near tie" and
            "failed".
        wrong, failed: the first few of them, described.
        partings: the gap of every token at which an answer parted from its reference.
        memory: ``(seconds, requests done, bytes)`` samples of the server's resident memory.
    """

    counts: Counter[str] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)
    failed: list[str] = field(default_factory=list)
    partings: list[float] = field(default_factory=list)
    memory: list[tuple[float, int, int]] = field(default_factory=list)
    seconds: float = 0.0

    @property
    def done(self) -> int:
        return sum(self.counts[kind] for kind in ("whole", "streamed", "given up"))

    def growth(self) -> float | None:
        """Relative growth of the median memory from the first to the last third of the samples
        after warm-up; None with too few.
        """
        import numpy as np

        after = [size for _, _, size in self._after_warm_up()]
        third = len(after) // 3
        return float(np.median(after[-third:]) / np.median(after[:third]) - 1) if third else None

    def slope(self) -> float | None:
        """Bytes of memory a request after warm-up, by least squares; None with too few samples."""
        import numpy as np

        after = self._after_warm_up()
        return (
            float(np.polyfit([done for _, done, _ in after], [size for _, _, size in after], 1)[0])
            if len(after) > 2
            else None
        )

    def _after_warm_up(self) -> list[tuple[float, int, int]]:
        return [sample for sample in self.memory if sample[1] >= WARM_UP_SHARE * self.done]


def complaints(outcome: Outcome, left: dict[str, Any], exact: bool) -> dict[str, str]:
    """What is not as it must be, by name; empty after a good run.

    Args:
        exact: whether every token must be the reference's.
    """
    found: dict[str, str] = {}
    if exact and outcome.wrong:
        found["wrong tokens"] = f"{outcome.counts['wrong']} answers, such as {outcome.wrong[0]}"
    if outcome.failed:
        found["failed requests"] = f"{outcome.counts['failed']}, such as {outcome.failed[0]}"
    growth = outcome.growth()
    if growth is not None and growth > GROWTH:
        found["memory"] = f"resident memory grew by {growth:.1%} after warm-up"
    if left["running"] or left["waiting"] or left["kv_cache_usage"] > 0:
        found["requests left"] = (
            f"{left['running']:.0f} running, {left['waiting']:.0f} waiting, "
            f"{left['kv_cache_usage']:.1%} of the pages in use"
        )
    if left["ledger"].get("requests", 0) > 1:
        found["lanes left"] = f"{left['ledger']['requests']} requests in the worker's ledger"
    return found
