"""Metrics from worker processes to the front end's /metrics: prometheus_client's multiprocess files.

With several API servers vLLM reads such files itself, from PROMETHEUS_MULTIPROC_DIR. With one it serves its own process's registry; there
the front end makes a folder of ours and registers prometheus_client's collector for it, beside vLLM's metrics. Workers write the same files
in both cases. A write is a store into mapped memory: no message, no lock, nothing for a step to wait for.
"""

from __future__ import annotations

import os
import tempfile
import time
import weakref
from collections.abc import Sequence
from itertools import count
from pathlib import Path

import psutil
from prometheus_client import REGISTRY
from prometheus_client.mmap_dict import MmapedDict, mmap_key
from prometheus_client.multiprocess import MultiProcessCollector
from prometheus_client.utils import floatToGoString

from specontext_vllm.observability.catalog import Metric

OWNER = "specontext"
GAUGE_MODE = "livemostrecent"

_folder: tempfile.TemporaryDirectory[str] | None = None
_engines = count()


def front_end_folder() -> str:
    """The folder whose metrics this process's /metrics shows; called in the front end, before its workers start.

    What dead workers left in our own folder goes; PROMETHEUS_MULTIPROC_DIR belongs to vLLM.
    """
    global _folder
    if (shared := os.environ.get("PROMETHEUS_MULTIPROC_DIR")) is not None:
        return shared
    if _folder is None:
        _folder = tempfile.TemporaryDirectory(prefix="specontext-metrics-")
        MultiProcessCollector(REGISTRY, _folder.name)
    for file in Path(_folder.name).glob(f"*_{OWNER}-*.db"):
        if not psutil.pid_exists(int(file.stem.split("-")[-2])):
            file.unlink(missing_ok=True)
    return _folder.name


class MetricFiles:
    """One worker's metrics, in files of its own that go when the object does or the process ends in order.

    A metric that is never set is not in /metrics. Values are absolute: what a counter or a bucket has come to, not what is new.

    Args:
        folder: what ``front_end_folder`` said.
        labels: of every metric. tp_rank: label of those that differ between ranks; the others are written by rank 0 alone.

    Raises:
        OSError: the folder is not on this machine.
    """

    def __init__(self, folder: str, labels: dict[str, str], tp_rank: int) -> None:
        self._labels, self._rank = labels, tp_rank
        owner = f"{OWNER}-{os.getpid()}-{next(_engines)}"
        names = {kind: f"{kind}_{owner}.db" for kind in ("counter", "histogram")} | {"gauge": f"gauge_{GAUGE_MODE}_{owner}.db"}
        self._files = {kind: MmapedDict(str(Path(folder, name))) for kind, name in names.items()}
        self.close = weakref.finalize(self, _remove, list(self._files.values()), [Path(folder, name) for name in names.values()])

    def set(self, metric: Metric, value: float) -> None:
        """A counter's or gauge's value."""
        self._write(metric, metric.name, value)

    def set_histogram(self, metric: Metric, counts: Sequence[float], total: float) -> None:
        """A histogram.

        Args:
            counts: observations in each bucket alone, the one above the last edge included.
            total: sum of the observations.
        """
        for edge, number in zip((*metric.edges, float("inf")), counts, strict=True):
            self._write(metric, f"{metric.name}_bucket", number, {"le": floatToGoString(edge)})
        self._write(metric, f"{metric.name}_sum", total)

    def _write(self, metric: Metric, sample: str, value: float, extra: dict[str, str] | None = None) -> None:
        if self._rank and not metric.per_rank:
            return
        labels = {**self._labels, **({"tp_rank": str(self._rank)} if metric.per_rank else {}), **(extra or {})}
        key = mmap_key(metric.family, sample, list(labels), list(labels.values()), metric.text)
        self._files[metric.kind].write_value(key, float(value), time.time() if metric.kind == "gauge" else 0.0)


def _remove(files: list[MmapedDict], paths: list[Path]) -> None:
    for file, path in zip(files, paths, strict=True):
        file.close()
        path.unlink(missing_ok=True)
