"""Metrics from worker processes to the front end's /metrics: prometheus_client's multiprocess
files.

With several API servers vLLM reads such files itself, from PROMETHEUS_MULTIPROC_DIR. With one it
serves its own process's registry; there the front end makes a folder of ours and registers a
collector for it (``FolderCollector``), beside vLLM's metrics. Workers write the same files in both
cases. A write is a store into mapped memory: no message, no lock, nothing for a step to wait for.

Workers on other machines than the front end write such files there, which `specontext metrics`
serves (``MachineCollector``).
"""

from __future__ import annotations

import glob
import os
import tempfile
import time
import weakref
from collections.abc import Iterable, Sequence
from contextlib import suppress
from itertools import count
from pathlib import Path
from typing import Protocol

import psutil
from prometheus_client import REGISTRY
from prometheus_client.metrics_core import Metric as Family
from prometheus_client.mmap_dict import MmapedDict, mmap_key
from prometheus_client.multiprocess import MultiProcessCollector
from prometheus_client.utils import floatToGoString

from specontext_vllm.observability.catalog import Metric

OWNER = "specontext"
FOLDER = "specontext-metrics-"
"""How our folders' names begin; they lie in the machine's folder for temporary files."""
FILES = f"*_{OWNER}-*.db"
"""Our files in a folder: kind, our name, process and a number."""
GAUGE_MODE = "livemostrecent"

_folder: tempfile.TemporaryDirectory[str] | None = None
_engines = count()


def front_end_folder() -> str:
    """The folder whose metrics this process's /metrics shows; called in the front end, before its
    workers start.

    What dead workers left in our own folder goes; PROMETHEUS_MULTIPROC_DIR belongs to vLLM.
    """
    global _folder
    if (shared := os.environ.get("PROMETHEUS_MULTIPROC_DIR")) is not None:
        return shared
    if _folder is None:
        _folder = tempfile.TemporaryDirectory(prefix=FOLDER)
        REGISTRY.register(FolderCollector(_folder.name))
    # Whatever tidies up temporary files may have taken it.
    Path(_folder.name).mkdir(mode=0o700, exist_ok=True)
    for file in _files_in(_folder.name):
        if not _is_written(file):
            Path(file).unlink(missing_ok=True)
    return _folder.name


class FolderCollector:
    """prometheus_client collector of the figures that workers write into a folder."""

    def __init__(self, folder: str) -> None:
        self._folder = folder

    def collect(self) -> Iterable[Family]:
        for publisher in list(PUBLISHERS):
            publisher.publish()
        return _merge(_files_in(self._folder))


class MachineCollector:
    """prometheus_client collector of all figures that running workers of this user write on this
    machine, whatever engine they belong to.
    """

    def collect(self) -> Iterable[Family]:
        folders = [
            folder
            for folder in glob.glob(str(Path(tempfile.gettempdir(), f"{FOLDER}*")))
            if _is_ours(folder)
        ]
        if (shared := os.environ.get("PROMETHEUS_MULTIPROC_DIR")) is not None:
            folders.append(shared)
        return _merge(
            [file for folder in folders for file in _files_in(folder) if _is_written(file)]
        )


class Publisher(Protocol):
    """Who writes figures later than it counts them."""

    def publish(self) -> None:
        """Write all that has been counted, if the calling thread is the one that counts."""


PUBLISHERS: weakref.WeakSet[Publisher] = weakref.WeakSet()
"""Those in this process, where a scrape need not do with what they have written so far."""


def _files_in(folder: str) -> list[str]:
    """Our files in the folder; none where it is not there, or goes meanwhile."""
    return glob.glob(str(Path(glob.escape(folder), FILES)))


def _merge(files: list[str]) -> Iterable[Family]:
    """What the files say together, but for those that cannot be read: a worker that ends takes its
    files along, listed or not.
    """
    for _ in range(len(files) + 1):
        try:
            return MultiProcessCollector.merge(files)
        except Exception:  # prometheus_client has no class of its own for what a file that is gone or not whole leads to
            files = [file for file in files if _is_readable(file)]
    return []


def _is_readable(file: str) -> bool:
    try:
        MultiProcessCollector.merge([file])
    except Exception:  # see _merge
        return False
    return True


def _is_ours(folder: str) -> bool:
    try:
        return os.stat(folder).st_uid == os.getuid()
    except FileNotFoundError:
        return False


def _is_written(file: str) -> bool:
    """Whether the worker whose file it is still runs."""
    return psutil.pid_exists(int(Path(file).stem.split("-")[-2]))


class MetricFiles:
    """One worker's metrics, in files of its own that go when the object does or the process ends in
    order.

    A metric that is never set is not in /metrics. Values are absolute: what a counter or a bucket
    has come to, not what is new.

    Args:
        folder: what ``front_end_folder`` said. Where it is not there the front end is on another
            machine, and a folder of its name among this machine's temporary files takes its place.
        labels: of every metric. tp_rank: label of those that differ between ranks; the others are
            written by rank 0 alone.

    Attributes:
        is_remote: whether the front end is on another machine.

    Raises:
        OSError: the folder cannot be written to.
    """

    def __init__(self, folder: str, labels: dict[str, str], tp_rank: int) -> None:
        self._labels, self._rank = labels, tp_rank
        self._keys: dict[tuple[str, str | None], str] = {}
        self.is_remote = not Path(folder).is_dir()
        if self.is_remote:
            folder = str(
                Path(tempfile.gettempdir(), FOLDER + Path(folder).name.removeprefix(FOLDER))
            )
            Path(folder).mkdir(mode=0o700, exist_ok=True)
        owner = f"{OWNER}-{os.getpid()}-{next(_engines)}"
        names = {kind: f"{kind}_{owner}.db" for kind in ("counter", "histogram")} | {
            "gauge": f"gauge_{GAUGE_MODE}_{owner}.db"
        }
        self._files = {kind: _new_file(Path(folder, name)) for kind, name in names.items()}
        self.close = weakref.finalize(
            self,
            _remove,
            list(self._files.values()),
            [Path(folder, name) for name in names.values()],
            self.is_remote,
        )

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
            self._write(metric, f"{metric.name}_bucket", number, floatToGoString(edge))
        self._write(metric, f"{metric.name}_sum", total)

    def _write(self, metric: Metric, sample: str, value: float, edge: str | None = None) -> None:
        if self._rank and not metric.per_rank:
            return
        if (key := self._keys.get((sample, edge))) is None:
            labels = {
                **self._labels,
                **({"tp_rank": str(self._rank)} if metric.per_rank else {}),
                **({} if edge is None else {"le": edge}),
            }
            key = self._keys[sample, edge] = mmap_key(
                metric.family, sample, list(labels), list(labels.values()), metric.text
            )
        self._files[metric.kind].write_value(
            key, float(value), time.time() if metric.kind == "gauge" else 0.0
        )


def _new_file(path: Path) -> MmapedDict:
    """An empty file, which no scrape sees before it is whole."""
    unseen = path.with_suffix(".new")
    file = MmapedDict(str(unseen))
    unseen.rename(path)
    return file


def _remove(files: list[MmapedDict], paths: list[Path], with_folder: bool) -> None:
    for file, path in zip(files, paths, strict=True):
        file.close()
        path.unlink(missing_ok=True)
    if with_folder:
        # Another worker's files may be in it; the last one takes it along.
        with suppress(OSError):
            paths[0].parent.rmdir()
