"""What a worker publishes, and what it leaves out."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest
import torch
from prometheus_client import CollectorRegistry
from prometheus_client.multiprocess import MultiProcessCollector

from specontext_vllm.config import PAGE_SIZE, SpeContextConfig
from specontext_vllm.engine import metrics, stopwatch
from specontext_vllm.engine.names import METRICS_FOLDER
from specontext_vllm.observability import catalog
from specontext_vllm.observability.files import FolderCollector
from specontext_vllm.retrieval.local import LocalRetriever


@pytest.fixture
def make(tmp_path, monkeypatch, device):
    """Settings -> (exporter of a retriever without a head, scrape of its folder, the retriever)."""
    monkeypatch.setattr(metrics, "get_tensor_model_parallel_rank", lambda: 0)
    registry = CollectorRegistry()
    MultiProcessCollector(registry, str(tmp_path))

    def made(folder=str(tmp_path), retriever=None, **settings):
        retriever = retriever or LocalRetriever(
            SpeContextConfig(retriever="recent", **settings),
            None,
            lambda ids: ids,
            num_kv_heads=2,
            max_model_len=4096,
            table_pages=128,
            device=device,
            max_rows=8,
        )
        config = SimpleNamespace(
            model_config=SimpleNamespace(served_model_name="m"),
            parallel_config=SimpleNamespace(data_parallel_index=3),
            observability_config=SimpleNamespace(**{METRICS_FOLDER: folder}),
        )
        return (
            metrics.Exporter(config, retriever, None, device),
            lambda: {s.name: s for m in registry.collect() for s in m.samples},
            retriever,
        )

    return made


def count_rows(retriever, read, held) -> None:
    """A step of rows that read and hold so many pages of one KV head."""
    retriever.counters.count_step(1, read, held, chooses=False, budgets=())


def count_fallback(retriever, device) -> None:
    """A row that kept nothing and reads a hundred pages beyond its ten."""
    retriever.counters.count_fallback(
        torch.zeros(1, 1, device=device),
        torch.tensor([110 * PAGE_SIZE], dtype=torch.int32, device=device),
        torch.tensor([10], dtype=torch.int32, device=device),
        0.5,
    )


def test_counters_start_at_zero_and_an_engine_at_rest_is_exact(make):
    exporter, scrape, retriever = make()
    start = scrape()[catalog.DECODE_ROWS.name]
    assert (start.value, start.labels) == (0, {"model_name": "m", "engine": "3"})
    count_rows(retriever, [4] * 5, [14] * 5)
    exporter.begin_step(idle=True)
    page = scrape()
    assert (
        page[catalog.DECODE_ROWS.name].value,
        page[catalog.PAGES_READ.name].value,
        page[catalog.PAGES_HELD.name].value,
    ) == (5, 20, 70)
    exporter.close()
    assert not scrape()


def test_what_the_host_counts_is_there_at_once_and_what_the_device_counts_once_in_a_while(
    make, monkeypatch, device
):
    now = [100.0]
    monkeypatch.setattr(metrics.time, "monotonic", lambda: now[0])
    exporter, scrape, retriever = make()

    def step() -> tuple[float, float]:
        """Ten head pages within the budget, known to the host, and a hundred beyond it, known to
        the device.
        """
        exporter.begin_step(idle=False)
        if torch.cuda.is_available():
            torch.cuda.synchronize()
            exporter.begin_step(idle=False)
        count_rows(retriever, [10], [10])
        count_fallback(retriever, device)
        exporter.end_selection()
        page = scrape()
        return page[catalog.DECODE_STEPS.name].value, page[catalog.PAGES_READ.name].value

    assert [step() for _ in range(3)] == [(1, 10), (2, 20), (3, 30)]
    now[0] += metrics.PUBLISH_SECONDS
    assert [step() for _ in range(2)] == [(4, 340), (5, 350)]


def test_a_copy_that_comes_late_lets_no_counter_fall(make):
    exporter, scrape, retriever = make()
    cells = retriever.counters.cells.cpu().numpy()

    class Late:
        """Asked for in the first step, there in the third."""

        asked = 0

        def ask(self) -> bool:
            self.asked += 1
            return True

        def take(self) -> list | None:
            self.asked += 1
            return [cells] if self.asked == 4 else None

    exporter._copy, seen = Late(), []
    for _ in range(4):
        exporter.begin_step(idle=False)
        count_rows(retriever, [10], [10])
        exporter.end_selection()
        seen.append(scrape()[catalog.DECODE_STEPS.name].value)
    assert seen == [1, 2, 3, 4]


def test_a_scrape_in_the_engine_s_own_process_is_exact(make, tmp_path, device):
    """Nobody tells such an engine that it rests. Only in its own thread, since the device's figures
    are read in the order of its work.
    """
    exporter, _, retriever = make()
    registry = CollectorRegistry()
    registry.register(FolderCollector(str(tmp_path)))

    def pages_read() -> float:
        return registry.get_sample_value(
            catalog.PAGES_READ.name, {"model_name": "m", "engine": "3", "tp_rank": "0"}
        )

    def step() -> None:
        count_rows(retriever, [10], [10])
        count_fallback(retriever, device)
        exporter.end_selection()

    step()
    assert pages_read() == 110
    step()
    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(pages_read).result() == 120
    assert pages_read() == 220
    exporter.close()
    assert pages_read() is None


def test_without_stats_what_needs_counting_is_absent(make):
    exporter, scrape, _ = make(stats=False)
    exporter.begin_step(idle=True)
    assert not scrape()


def test_a_worker_that_cannot_reach_the_folder_goes_on(make):
    exporter, scrape, _ = make(folder="/nowhere")
    exporter.begin_step(idle=True)
    exporter.close()
    assert not scrape()


def test_a_sidecars_figures_are_published(make, device):
    """The worker's end of one that was never started: all rows are read whole."""
    from specontext_vllm.retrieval.checkpoint import dummy_checkpoint
    from specontext_vllm.sidecar.remote import RemoteRetriever

    checkpoint = dummy_checkpoint(
        hidden_size=16,
        num_layers=12,
        num_heads=2,
        num_kv_heads=2,
        head_dim=8,
        rope_theta=1e4,
        max_position=4096,
        dtype=torch.float32,
        seed=0,
    )
    remote = RemoteRetriever(
        SpeContextConfig(sidecar="ray"),
        checkpoint,
        lambda ids: ids,
        vocab_size=8,
        num_kv_heads=2,
        max_model_len=4096,
        max_rows=2,
        max_tokens=16,
        dtype=torch.float32,
        device=device,
    )
    exporter, scrape, _ = make(retriever=remote)
    remote.dense_rows, remote.exchange.restarts, remote.exchange.wait_seconds = 7, 3, 1.5
    exporter.begin_step(idle=True)
    found = {name: sample.value for name, sample in scrape().items() if "sidecar" in name}
    assert found == {
        catalog.SIDECAR_UP.name: 0,
        catalog.SIDECAR_RESTARTS.name: 3,
        catalog.SIDECAR_DENSE_ROWS.name: 7,
        catalog.SIDECAR_LOST_PAGES.name: 0,
        catalog.SIDECAR_WAIT_SECONDS.name: 1.5,
    }


def test_a_stopwatch_times_one_lap_in_sixteen(device):
    watch = stopwatch.Stopwatch((1e-9, 1e3), device)
    for _ in range(2 * stopwatch.SAMPLED_STEPS + 1):
        with watch.lap():
            torch.zeros(4, device=device).add_(1)
    if device.type == "cuda":
        torch.cuda.synchronize()
    watch.collect()
    assert watch.counts.tolist() == [0, 3, 0]
    assert 0 < watch.total < 60


def test_laps_that_nobody_collects_do_not_pile_up(monkeypatch):
    """A GPU's events, made up here: finished by the time the next lap is taken."""

    class Event:
        def __init__(self, enable_timing):
            pass

        def record(self):
            pass

        def query(self):
            return True

        def elapsed_time(self, end):
            return 2.0

    monkeypatch.setattr(torch.cuda, "Event", Event)
    watch = stopwatch.Stopwatch((1e-9, 1e3), torch.device("cuda"))
    for _ in range(100 * stopwatch.SAMPLED_STEPS):
        with watch.lap():
            pass
    assert len(watch._running) == 1
    watch.collect()
    assert watch.counts.tolist() == [0, 100, 0] and watch.total == pytest.approx(0.2)
