"""A worker's figures on their way to /metrics; the mechanism is in ``observability/files.py``, the
list in ``observability/catalog.py``.

vLLM: this worker's rank, and its log.
"""

from __future__ import annotations

import threading
import time
from typing import Any

import numpy as np
import torch
from vllm.distributed.parallel_state import get_tensor_model_parallel_rank
from vllm.logger import init_logger

from specontext_vllm.engine.names import METRICS_FOLDER
from specontext_vllm.engine.stopwatch import Stopwatch
from specontext_vllm.late_copy import LateCopy
from specontext_vllm.observability import catalog
from specontext_vllm.observability.files import PUBLISHERS, MetricFiles
from specontext_vllm.residency.figures import TierStatus
from specontext_vllm.residency.tiers import TieredKV
from specontext_vllm.retrieval import counters as decode_counters
from specontext_vllm.retrieval.protocol import Retriever
from specontext_vllm.triton_kernels import counters as tier_counters

logger = init_logger("vllm.specontext")

SIDECAR = {
    "sidecar_up": catalog.SIDECAR_UP,
    "sidecar_restarts": catalog.SIDECAR_RESTARTS,
    "sidecar_dense_rows": catalog.SIDECAR_DENSE_ROWS,
    "sidecar_lost_pages": catalog.SIDECAR_LOST_PAGES,
    "sidecar_wait_seconds": catalog.SIDECAR_WAIT_SECONDS,
}
"""Metrics of ``Retriever.sidecar_figures``."""

OF_REQUESTS = {
    catalog.OWN_BUDGET_ROWS: decode_counters.OWN_BUDGET_ROWS,
    catalog.OWN_BUDGET_PAGES: decode_counters.OWN_BUDGET_PAGES,
    catalog.DENSE_ROWS: decode_counters.WHOLE_ROWS,
    catalog.DENSE_PAGES: decode_counters.WHOLE_PAGES,
}
"""Metrics of requests with settings of their own."""

LOSSLESS = (catalog.LOSSLESS_STEPS, catalog.LOSSLESS_VERIFIED_STEPS, catalog.LOSSLESS_DRAFTS)
"""Metrics of lossless mode."""

REPORT_SECONDS = 10
"""Time between two lines about the tiers in the log, as between vLLM's own."""

PUBLISH_SECONDS = 1.0
"""Time between two readings of what the device counts; scrapes are further apart."""


class Exporter:
    """Publishes one worker's figures: what the host counts in every step, what the device counts
    once in a while and at rest.

    Args:
        vllm_config: the engine's configuration, seen by ``name_metrics_folder``.
        retriever, tiers: where the figures are; tiers None with one tier.
        publishes: False: another worker publishes the same figures.

    Attributes:
        counting: whether steps are counted and timed.
        select, learn: stopwatches of what a step does before the model and after it.
    """

    def __init__(
        self,
        vllm_config: Any,
        retriever: Retriever,
        tiers: TieredKV | None,
        device: torch.device,
        *,
        publishes: bool = True,
    ) -> None:
        self._retriever, self._tiers = retriever, tiers
        self.counting = retriever.config.stats
        self._timed_copies = device.type == "cuda"
        self.select = Stopwatch(catalog.SECONDS, device)
        self.learn = Stopwatch(catalog.SECONDS, device)
        sources = [retriever.counters.cells] + ([] if tiers is None else [tiers.meter.counts])
        self._copy = LateCopy(*sources)
        self._host, self._device = retriever.counters.host, np.zeros(len(retriever.counters.cells))
        self._next = self._next_report = 0.0
        self._rounds = dict.fromkeys(LOSSLESS, 0) if retriever.config.is_lossless else {}
        self._files: MetricFiles | None = None
        labels = {
            "model_name": vllm_config.model_config.served_model_name,
            "engine": str(vllm_config.parallel_config.data_parallel_index),
        }
        folder = getattr(vllm_config.observability_config, METRICS_FOLDER, None)
        try:
            self._files = (
                None
                if folder is None or not publishes
                else MetricFiles(folder, labels, get_tensor_model_parallel_rank())
            )
        except OSError as error:
            logger.warning(
                "SpeContext: the figures of this worker stay out of /metrics, whose folder it "
                "cannot write to (%s).",
                error,
            )
        if self._files is not None and self._files.is_remote:
            logger.info(
                "SpeContext: /metrics is another machine's; run `specontext metrics` on this one "
                "for the figures of its workers."
            )
        self._thread = threading.get_ident()
        if self._files is not None:
            # Prometheus computes a counter's rate from its earlier value: publish the zeros first.
            self._publish_now(self._files)
            PUBLISHERS.add(self)

    def close(self) -> None:
        """Take this worker's metrics out of /metrics."""
        PUBLISHERS.discard(self)
        if self._files is not None:
            self._files.close()

    def begin_step(self, idle: bool) -> None:
        """Called once a step, before its work is enqueued.

        Args:
            idle: nothing is scheduled. Whatever has been counted is then published at once, so that
                an engine at rest shows its last step. This waits for the device, but an idle engine
                has no other work to delay.
        """
        self._log_report()
        if self._files is None:
            return
        if idle:
            self._publish_now(self._files)
            return
        now = time.monotonic()
        if now >= self._next and self._copy.ask():
            self._next = now + PUBLISH_SECONDS
            self._host = self._retriever.counters.host.copy()
        if (taken := self._copy.take()) is not None:
            self._publish(self._files, taken)

    def count_round(self, drafts: int) -> None:
        """Called in lossless mode for a step with decode rows, which verify up to ``drafts``."""
        for metric, count in zip(LOSSLESS, (1, int(drafts > 0), drafts), strict=True):
            self._rounds[metric] += count

    def end_selection(self) -> None:
        """Called once a step, when its decode rows have been counted: what the host knows of them
        is in /metrics before their tokens are made.
        """
        if self._files is not None:
            self._publish_host(self._files)

    def _log_report(self) -> None:
        now = time.monotonic()
        if self._tiers is not None and self.counting and now >= self._next_report:
            self._next_report = now + REPORT_SECONDS
            if (report := self._tiers.report()) is not None:
                logger.info("SpeContext tiers: %s.", report)

    def publish(self) -> None:
        """Publish everything, for a scrape in this very process, where an engine does not notice
        that it rests; waits for the device.

        A scrape in another thread than the steps' gets what there is.
        """
        if self._files is not None and threading.get_ident() == self._thread:
            self._publish_now(self._files)

    def _publish_now(self, files: MetricFiles) -> None:
        self._host = self._retriever.counters.host.copy()
        self._publish(files, self._copy.wait())

    def _publish(self, files: MetricFiles, cells: list[np.ndarray]) -> None:
        self._device = cells[0]
        self._publish_host(files)
        if self.counting:
            self._publish_choices(files, np.concatenate([self._host, cells[0]]))
        if self._tiers is not None:
            now = self._tiers.status()
            if self.counting:
                self._publish_fetches(files, now, cells[1])
            self._publish_tiers(files, now)

    def _publish_host(self, files: MetricFiles) -> None:
        """What the host knows, as of now; pages beyond the budget as of the last copy."""
        for name, value in self._retriever.sidecar_figures().items():
            files.set(SIDECAR[name], value)
        if not self.counting:
            return
        counted = np.concatenate([self._retriever.counters.host, self._device])
        files.set(catalog.DECODE_STEPS, counted[decode_counters.STEPS])
        files.set(catalog.DECODE_ROWS, counted[decode_counters.DECODE_ROWS])
        files.set(
            catalog.PAGES_READ,
            counted[decode_counters.PAGES_READ] + counted[decode_counters.FALLBACK_PAGES],
        )
        files.set(catalog.PAGES_HELD, counted[decode_counters.PAGES_HELD])
        for metric, place in OF_REQUESTS.items():
            files.set(metric, counted[place])
        for metric, value in self._rounds.items():
            files.set(metric, value)

    def _publish_choices(self, files: MetricFiles, counted: np.ndarray) -> None:
        """What the device sums up, beside what the host knew when the copy was asked for."""
        if not self._retriever.reads_aux:
            return
        at_most = [
            *counted[decode_counters.KEPT_MASS_BUCKETS],
            counted[decode_counters.CHOOSING_ROWS],
        ]
        files.set_histogram(
            catalog.KEPT_MASS_RATIO,
            np.diff(at_most, prepend=0).tolist(),
            counted[decode_counters.KEPT_MASS],
        )
        if self._retriever.config.confidence_threshold:
            files.set(catalog.FALLBACK_ROWS, counted[decode_counters.FALLBACK_ROWS])
        for metric, watch in (
            (catalog.SELECT_SECONDS, self.select),
            (catalog.LEARN_SECONDS, self.learn),
        ):
            watch.collect()
            files.set_histogram(metric, watch.counts.tolist(), watch.total)

    def _publish_fetches(self, files: MetricFiles, now: TierStatus, counted: np.ndarray) -> None:
        files.set(catalog.HITS, counted[tier_counters.SELECTED] - counted[tier_counters.MISSED])
        files.set(catalog.MISSES, counted[tier_counters.MISSED])
        files.set(catalog.FETCHED_BYTES, counted[tier_counters.FETCHED] * now.head_page_bytes)
        loaded = counted[tier_counters.FILLED] + now.loaded_head_pages
        files.set(catalog.LOADED_BYTES, loaded * now.head_page_bytes)
        files.set(catalog.LAYER_MOVES, now.moved_layers)
        if self._timed_copies:
            files.set(catalog.PREFETCHES, counted[tier_counters.AWAITED])
            files.set(catalog.LATE_PREFETCHES, counted[tier_counters.LATE])
            files.set(catalog.LATE_SECONDS, counted[tier_counters.LATE_NS] / 1e9)

    def _publish_tiers(self, files: MetricFiles, now: TierStatus) -> None:
        files.set(catalog.RESIDENT_LAYERS, now.resident_layers)
        files.set(catalog.OFFLOADED_LAYERS, now.offloaded_layers)
        files.set(catalog.HOT_BUFFER_TOKENS, now.hot_tokens)
        files.set(catalog.HOST_POOL_BYTES, now.host_pool_bytes)
        files.set(catalog.HOST_POOL_USED, now.host_pool_used)
