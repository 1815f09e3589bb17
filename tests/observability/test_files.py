"""Workers' files as prometheus_client's collector reads them."""

from __future__ import annotations

import glob
import os
import shutil
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor

import pytest
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.multiprocess import MultiProcessCollector
from prometheus_client.parser import text_string_to_metric_families

from specontext_vllm.observability import catalog, files
from specontext_vllm.observability.files import MetricFiles

LABELS = {"model_name": "m", "engine": "0"}


def samples(registry: CollectorRegistry) -> dict[tuple, float]:
    """What a scrape of the registry says: (name, labels as sorted pairs) -> value."""
    families = text_string_to_metric_families(generate_latest(registry).decode())
    return {
        (s.name, tuple(sorted(s.labels.items()))): s.value
        for family in families
        for s in family.samples
    }


def key(name: str, **labels: str) -> tuple:
    return name, tuple(sorted({**LABELS, **labels}.items()))


@pytest.fixture
def registry(tmp_path) -> CollectorRegistry:
    made = CollectorRegistry()
    MultiProcessCollector(made, str(tmp_path))
    return made


def test_ranks_have_series_of_their_own_and_rank_0_speaks_for_all(tmp_path, registry):
    ranks = [MetricFiles(str(tmp_path), LABELS, rank) for rank in range(2)]
    for rank, worker in enumerate(ranks):
        worker.set(catalog.HITS, 10 + rank)
        worker.set(catalog.HITS, 20 + rank)
        worker.set(catalog.DECODE_ROWS, 7)
        worker.set(catalog.RESIDENT_LAYERS, 3 - rank)
    assert samples(registry) == {
        key(catalog.HITS.name, tp_rank="0"): 20,
        key(catalog.HITS.name, tp_rank="1"): 21,
        key(catalog.RESIDENT_LAYERS.name, tp_rank="0"): 3,
        key(catalog.RESIDENT_LAYERS.name, tp_rank="1"): 2,
        key(catalog.DECODE_ROWS.name): 7,
    }


def test_a_histogram_is_cumulative_in_the_scrape(tmp_path, registry):
    worker = MetricFiles(str(tmp_path), LABELS, 0)
    counts = [1, 0, 2, *[0] * (len(catalog.KEPT_MASS_RATIO.edges) - 4), 4, 5]
    worker.set_histogram(catalog.KEPT_MASS_RATIO, counts, 9.5)
    page, name = samples(registry), catalog.KEPT_MASS_RATIO.name
    assert [
        page[key(f"{name}_bucket", tp_rank="0", le=le)]
        for le in ("0.1", "0.2", "0.3", "0.99", "+Inf")
    ] == [1, 1, 3, 7, 12]
    assert (page[key(f"{name}_count", tp_rank="0")], page[key(f"{name}_sum", tp_rank="0")]) == (
        12,
        9.5,
    )


def test_help_and_type_are_the_catalog_s(tmp_path, registry):
    worker = MetricFiles(str(tmp_path), LABELS, 0)
    for metric in catalog.METRICS:
        if metric.kind == "histogram":
            worker.set_histogram(metric, [0] * (len(metric.edges) + 1), 0)
        else:
            worker.set(metric, 0)
    text = generate_latest(registry).decode()
    for metric in catalog.METRICS:
        assert f"# HELP {metric.name} {metric.text}\n" in text
        assert f"# TYPE {metric.name} {metric.kind}\n" in text


def test_the_figures_of_an_engine_go_with_it(tmp_path, registry):
    gone, running = (MetricFiles(str(tmp_path), {**LABELS, "engine": name}, 0) for name in "01")
    gone.set(catalog.HITS, 1)
    running.set(catalog.HITS, 2)
    gone.close()
    gone.close()
    assert samples(registry) == {key(catalog.HITS.name, engine="1", tp_rank="0"): 2}


@pytest.fixture
def front_end(monkeypatch) -> tuple[CollectorRegistry, str]:
    """What /metrics of one API server shows, and the folder of its workers."""
    made = CollectorRegistry()
    monkeypatch.delenv("PROMETHEUS_MULTIPROC_DIR", raising=False)
    monkeypatch.setattr(files, "REGISTRY", made)
    monkeypatch.setattr(files, "_folder", None)
    return made, files.front_end_folder()


def test_several_servers_share_the_folder_that_vllm_reads(monkeypatch, tmp_path):
    monkeypatch.setenv("PROMETHEUS_MULTIPROC_DIR", str(tmp_path))
    assert files.front_end_folder() == str(tmp_path)


def test_one_server_shows_its_workers_and_forgets_the_killed(front_end):
    registry, folder = front_end
    killed = (
        "import os; from specontext_vllm.observability import catalog; from "
        "specontext_vllm.observability.files import MetricFiles; "
        f"worker = MetricFiles({folder!r}, {LABELS!r}, 0); worker.set(catalog.HITS, 5); "
        "os.kill(os.getpid(), 9)"
    )
    assert subprocess.run([sys.executable, "-c", killed], check=False).returncode == -9
    assert samples(registry) == {key(catalog.HITS.name, tp_rank="0"): 5}
    alive = MetricFiles(folder, LABELS, 0)
    alive.set(catalog.HITS, 1)
    assert files.front_end_folder() == folder
    assert samples(registry) == {key(catalog.HITS.name, tp_rank="0"): 1}


@pytest.fixture
def machine(tmp_path, monkeypatch) -> CollectorRegistry:
    """What `specontext metrics` serves, on a machine whose temporary files are in ``tmp_path``."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.delenv("PROMETHEUS_MULTIPROC_DIR", raising=False)
    made = CollectorRegistry()
    made.register(files.MachineCollector())
    return made


def test_workers_of_a_front_end_elsewhere_write_side_by_side_and_leave_nothing(tmp_path, machine):
    ranks = [MetricFiles("/elsewhere/specontext-metrics-x", LABELS, rank) for rank in (2, 3)]
    for rank, worker in enumerate(ranks, start=2):
        assert worker.is_remote
        worker.set(catalog.HITS, rank)
        worker.set(catalog.RESIDENT_LAYERS, rank)
    folder = tmp_path / "specontext-metrics-x"
    assert folder.stat().st_mode & 0o777 == 0o700
    hits = {key(catalog.HITS.name, tp_rank=str(rank)): rank for rank in (2, 3)}
    layers = {key(catalog.RESIDENT_LAYERS.name, tp_rank=str(rank)): rank for rank in (2, 3)}
    assert samples(machine) == hits | layers
    ranks[0].close()
    assert len(samples(machine)) == 2
    ranks[1].close()
    assert samples(machine) == {} and not folder.exists()


def test_a_machine_shows_every_engine_s_workers_that_run(tmp_path, machine, monkeypatch):
    shared = tmp_path / "vllm"
    shared.mkdir()
    (shared / "counter_1.db").write_bytes(b"vLLM's own, which is not ours to read")
    monkeypatch.setenv("PROMETHEUS_MULTIPROC_DIR", str(shared))
    here = MetricFiles(str(shared), LABELS, 0)
    there = MetricFiles("/elsewhere/tmpabc", {**LABELS, "engine": "1"}, 0)
    here.set(catalog.HITS, 1)
    there.set(catalog.HITS, 2)
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    source = next((tmp_path / "specontext-metrics-tmpabc").glob("counter_*"))
    (source.parent / f"counter_{files.OWNER}-{dead.pid}-0.db").write_bytes(source.read_bytes())
    assert not here.is_remote and there.is_remote
    assert samples(machine) == {
        key(catalog.HITS.name, tp_rank="0"): 1,
        key(catalog.HITS.name, engine="1", tp_rank="0"): 2,
    }


@pytest.mark.parametrize("at", ["front end", "machine"])
def test_a_worker_that_ends_during_a_scrape_is_left_out_of_it(tmp_path, monkeypatch, request, at):
    """Its files are listed, and gone when they are read."""
    registry, folder = (
        (request.getfixturevalue("machine"), "/elsewhere/x")
        if at == "machine"
        else request.getfixturevalue("front_end")
    )
    gone, running = (MetricFiles(folder, {**LABELS, "engine": name}, 0) for name in "01")
    for worker in (gone, running):
        for metric in (catalog.HITS, catalog.RESIDENT_LAYERS):
            worker.set(metric, 2)
    list_files = glob.glob

    def list_and_end(pattern: str) -> list[str]:
        found = list_files(pattern)
        if any(name.endswith(".db") for name in found):
            gone.close()
        return found

    monkeypatch.setattr(glob, "glob", list_and_end)
    assert samples(registry) == {
        key(metric.name, engine="1", tp_rank="0"): 2
        for metric in (catalog.HITS, catalog.RESIDENT_LAYERS)
    }
    assert not gone.close.alive


def test_scrapes_go_on_while_workers_and_their_folder_come_and_go(machine):
    switching, pages = sys.getswitchinterval(), []

    def come_and_go() -> None:
        for _ in range(150):
            worker = MetricFiles("/elsewhere/x", LABELS, 0)
            worker.set(catalog.HITS, 1)
            worker.close()

    # Seconds: the two threads take turns within a scrape.
    sys.setswitchinterval(1e-5)
    try:
        with ThreadPoolExecutor(1) as pool:
            workers = pool.submit(come_and_go)
            while not workers.done():
                pages.append(samples(machine))
            workers.result()
    finally:
        sys.setswitchinterval(switching)
    # A new figure is 0 for a moment.
    assert pages and {value for page in pages for value in page.values()} <= {0, 1}


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\0" * 3,
        struct.pack("ii", 400, 0),
        struct.pack("iii", 48, 0, 400) + b" " * 36,
        struct.pack("iii", 40, 0, 12) + b"not JSON    " + b"\0" * 16,
        struct.pack("iii", 40, 0, 12) + b"3           " + b"\0" * 16,
        struct.pack("iii", 40, 0, 12) + b"\xff" * 12 + b"\0" * 16,
    ],
    ids=["empty", "half a head", "a head alone", "half an entry", "garbage", "a number", "no text"],
)
def test_a_file_that_is_not_whole_does_not_spoil_the_others(front_end, content):
    registry, folder = front_end
    worker = MetricFiles(folder, LABELS, 0)
    worker.set(catalog.HITS, 4)
    with open(f"{folder}/counter_{files.OWNER}-{os.getpid()}-99.db", "wb") as torn:
        torn.write(content)
    assert samples(registry) == {key(catalog.HITS.name, tp_rank="0"): 4}


def test_no_scrape_sees_a_file_before_it_is_whole(tmp_path, monkeypatch):
    make = files.MmapedDict

    def make_unseen(path: str):
        before = set(tmp_path.glob("*.db"))
        made = make(path)
        assert set(tmp_path.glob("*.db")) == before
        return made

    monkeypatch.setattr(files, "MmapedDict", make_unseen)
    worker = MetricFiles(str(tmp_path), LABELS, 0)
    assert len(list(tmp_path.glob("*.db"))) == 3
    worker.close()
    assert not list(tmp_path.iterdir())


def test_a_front_end_whose_folder_was_tidied_away_shows_the_next_engine(front_end):
    registry, folder = front_end
    shutil.rmtree(folder)
    assert samples(registry) == {}
    assert files.front_end_folder() == folder
    worker = MetricFiles(folder, LABELS, 0)
    worker.set(catalog.HITS, 6)
    assert not worker.is_remote
    assert samples(registry) == {key(catalog.HITS.name, tp_rank="0"): 6}


def test_a_folder_that_cannot_be_written_is_an_oserror(tmp_path, machine):
    (tmp_path / "specontext-metrics-x").write_text("a file in its place")
    with pytest.raises(OSError):
        MetricFiles("/elsewhere/x", LABELS, 0)


def test_the_command_serves_them_on_the_loopback_interface(tmp_path):
    environment = {**os.environ, "TMPDIR": str(tmp_path)}
    environment.pop("PROMETHEUS_MULTIPROC_DIR", None)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "specontext_vllm.cli", "metrics", "--port", str(port)]
    writer = (
        "import time; from specontext_vllm.observability import catalog; from "
        "specontext_vllm.observability.files import MetricFiles; "
        f"worker = MetricFiles('/elsewhere/x', {LABELS!r}, 1); worker.set(catalog.HITS, 5); "
        "print('written', flush=True); time.sleep(60)"
    )
    with (
        subprocess.Popen(
            [sys.executable, "-c", writer], env=environment, stdout=subprocess.PIPE, text=True
        ) as worker,
        # A shell's background job, as a test run may be one, hands on that SIGINT is ignored.
        subprocess.Popen(
            command,
            env=environment,
            stdout=subprocess.PIPE,
            text=True,
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        ) as served,
    ):
        try:
            assert served.stdout.readline().startswith(f"http://127.0.0.1:{port}/metrics ")
            assert worker.stdout.readline() == "written\n"
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10) as answer:
                assert (
                    f'{catalog.HITS.name}{{engine="0",model_name="m",tp_rank="1"}} 5.0'
                    in answer.read().decode()
                )
            with pytest.raises(urllib.error.URLError):
                urllib.request.urlopen(f"http://127.0.0.2:{port}/metrics", timeout=10)
            again = subprocess.run(
                command, env=environment, capture_output=True, text=True, check=False, timeout=60
            )
            assert (
                again.returncode == 2
                and f"cannot listen on 127.0.0.1:{port}" in again.stderr
                and "name another" in again.stderr
            )
        finally:
            served.send_signal(signal.SIGINT)
            worker.kill()
        assert served.wait(10) == 0
