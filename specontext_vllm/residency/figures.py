"""The figures of the two tiers: for ``specontext_stats`` and for the log."""

from __future__ import annotations

from dataclasses import dataclass

from specontext_vllm.residency.meter import Meter, ratios
from specontext_vllm.triton_kernels.counters import FILLED, MISSED


@dataclass(frozen=True)
class TierStatus:
    """What the host knows of the tiers without waiting for the device; sums count from the start.

    Attributes:
        num_layers, resident_layers: all of our layers, and those whose pages are all on the GPU.
        moved_layers: layers that were offloaded or came back.
        steps: steps that fetched misses.
        hot_tokens: size of a request's hot buffer now, in tokens per KV head.
        free_frames: frames that hold nothing.
        num_tokens: tokens that both tiers hold.
        host_pool_bytes: size of the host pool.
        host_pool_used: share of the logical pages that running requests hold.
        head_page_bytes: bytes of one page of one KV head of one layer.
        loaded_head_pages: head pages copied from the host pool that were no misses: for layers that
            came back, prefix hits and the history of prompt rows.
    """

    num_layers: int
    resident_layers: int
    moved_layers: int
    steps: int
    hot_tokens: int
    free_frames: int
    num_tokens: int
    host_pool_bytes: int
    host_pool_used: float
    head_page_bytes: int
    loaded_head_pages: int

    @property
    def offloaded_layers(self) -> int:
        """Layers of which only the hot buffers are on the GPU."""
        return self.num_layers - self.resident_layers


class TierFigures:
    """Figures since the last reset, and since the last line in the log."""

    def __init__(self, meter: Meter) -> None:
        self._meter = meter
        self._base: TierStatus | None = None
        self._reported_counts, self._reported_steps = meter.seen, 0

    def stats(self, now: TierStatus, reset: bool) -> dict[str, int | float]:
        """Figures since the last reset; waits for the device. See ``TieredKV.stats``."""
        counted, base = self._meter.read(reset), self._base
        steps, moved, loaded = (
            (0, 0, 0) if base is None else (base.steps, base.moved_layers, base.loaded_head_pages)
        )
        if reset:
            self._base = now
        return {
            "tier_steps": now.steps - steps,
            "missed_head_pages": int(counted[MISSED]),
            **ratios(counted, now.head_page_bytes),
            "loaded_bytes": (int(counted[FILLED]) + now.loaded_head_pages - loaded)
            * now.head_page_bytes,
            "resident_layers": now.resident_layers,
            "num_layers": now.num_layers,
            "layer_moves": now.moved_layers - moved,
            "hot_tokens": now.hot_tokens,
            "free_frames": now.free_frames,
            "host_pool_bytes": now.host_pool_bytes,
            "host_pool_used": now.host_pool_used,
        }

    def report(self, now: TierStatus, with_lateness: bool) -> str | None:
        """One line on the steps since the last report, as far as the host has seen their counters
        without waiting; None if nothing happened.
        """
        counted = self._meter.seen - self._reported_counts
        passed = now.steps - self._reported_steps
        self._reported_counts, self._reported_steps = self._meter.seen, now.steps
        if passed <= 0 or not counted.any():
            return None
        figures = ratios(counted, now.head_page_bytes)
        late = (
            f"{figures['late_share']:.1%} of the prefetches late by {figures['late_us']:.0f} us in "
            "the mean, "
            if with_lateness
            else ""
        )
        return (
            f"hit rate {figures['hit_rate']:.1%}, {figures['fetched_bytes'] / passed / 1e6:.1f} MB "
            f"fetched a step, {late}{now.resident_layers} of "
            f"{now.num_layers} layers resident, hot buffers of {now.hot_tokens} tokens, "
            f"{now.host_pool_used:.1%} of {now.num_tokens} tokens in use"
        )
