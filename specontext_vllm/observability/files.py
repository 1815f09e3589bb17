"""Metrics from worker processes to the front end's /metrics: prometheus_client's multiprocess
files.

With several API servers vLLM reads such files itself, from PROMETHEUS_MULTIPROC_DIR. With one API
server it serves its own process's registry; there the front end makes a folder and registers a
collector for it (``FolderCollector``). Workers write the same files in both cases. A write is a
store into mapped memory: a step waits for no message and no lock.

Workers on another machine than the front end's write files on theirs, which `specontext metrics`
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
"""Prefix of our folders, in the machine's folder for temporary files."""
FILES = f"*_{OWNER}-*.db"
"""Pattern of our files: kind, our name, process id and a number."""
GAUGE_MODE = "livemostrecent"

_folder: tempfile.TemporaryDirectory[str] | None = None
_engines = count()


def front_end_folder() -> str:
    """The folder that this process's /metrics reads; called in the front end, before its workers
    start.

    Files of dead workers in our own folder are removed; PROMETHEUS_MULTIPROC_DIR is left to vLLM.
    """
    global _folder
    if (shared := os.environ.get("PROMETHEUS_MULTIPROC_DIR")) is not None:
        return shared
    if _folder is None:
        _folder = tempfile.TemporaryDirectory(prefix=FOLDER)
        REGISTRY.register(FolderCollector(_folder.name))
    # A cleaner of temporary files may have removed it.
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
    """prometheus_client collector of the figures of all running workers of this user on this
    machine, of any engine.
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
    """Something that writes its figures some time after it counts them."""

    def publish(self) -> None:
        """Write everything counted so far, if the calling thread is the one that counts."""


PUBLISHERS: weakref.WeakSet[Publisher] = weakref.WeakSet()
"""Those in this process: a scrape here asks them to write first."""


def _files_in(folder: str) -> list[str]:
    """Our files in the folder; none if it does not exist."""
    return glob.glob(str(Path(glob.escape(folder), FILES)))


def _merge(files: list[str]) -> Iterable[Family]:
    """The files' metrics together, without files that cannot be read: a worker that ends removes
    its files, also between our listing and reading them.
    """
    for _ in range(len(files) + 1):
        try:
            return MultiProcessCollector.merge(files)
        except Exception:  # prometheus_client raises all kinds for a file that is gone or cut off
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
    """Whether the worker that writes the file still runs."""
    return psutil.pid_exists(int(Path(file).stem.split("-")[-2]))


class MetricFiles:
    """One worker's metrics, in files of its own, which are removed with the object or at an orderly
    end of the process.

    A metric that is never set is not in /metrics. Values are totals, not increments.

    Args:
        folder: of ``front_end_folder``. If it does not exist here, the front end is on another
            machine, and a folder of that name among this machine's temporary files is used.
        labels: of every metric.
        tp_rank: label of metrics that differ between ranks; rank 0 alone writes the others.

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
            counts: observations of each bucket, not cumulative; the last one has no upper edge.
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
    """An empty file, which no scrape sees before it is complete."""
    unseen = path.with_suffix(".new")
    file = MmapedDict(str(unseen))
    unseen.rename(path)
    return file


def _remove(files: list[MmapedDict], paths: list[Path], with_folder: bool) -> None:
    for file, path in zip(files, paths, strict=True):
        file.close()
        path.unlink(missing_ok=True)
    if with_folder:
        # Not empty while another worker's files are in it; the last worker removes it.
        with suppress(OSError):
            paths[0].parent.rmdir()
