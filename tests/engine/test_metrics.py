"""The /metrics of real servers against what their workers answer to `specontext_stats`."""

from __future__ import annotations

import json
import time
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from openai import OpenAI
from prometheus_client.parser import text_string_to_metric_families
from typer.testing import CliRunner

from specontext_vllm.cli import app
from specontext_vllm.demo.server import VllmServer, device_arguments
from specontext_vllm.observability import catalog
from specontext_vllm.observability.catalog import PREFIX, Metric
from specontext_vllm.synthetic.tasks import make_problem
from tests.engine.conftest import DEMO_MODEL, GPU_OPTIONS

pytestmark = pytest.mark.skipif(
    not (DEMO_MODEL / "config.json").exists(), reason="models/demo is missing"
)

REST_SECONDS = 10


class Page:
    """One scrape."""

    def __init__(self, url: str) -> None:
        with urllib.request.urlopen(f"{url}/metrics", timeout=30) as answer:
            families = text_string_to_metric_families(answer.read().decode())
        self.samples = {
            (s.name, s.labels.get("tp_rank"), s.labels.get("le")): (s.value, s.labels)
            for family in families
            for s in family.samples
            if s.name.startswith(PREFIX)
        }

    def get(self, metric: Metric, rank: int | None = 0, suffix: str = "") -> float:
        return self.samples[metric.name + suffix, str(rank) if metric.per_rank else None, None][0]

    @property
    def names(self) -> set[str]:
        return {name for name, _, _ in self.samples}


def worker_stats(url: str, reset: bool = False) -> list[dict]:
    """What each worker answers."""
    body = json.dumps({"method": "specontext_stats", "kwargs": {"reset": reset}}).encode()
    request = urllib.request.Request(
        f"{url}/collective_rpc", body, {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=60) as answer:
        return json.load(answer)["results"]


def ask(url: str, tokens: list[int]) -> None:
    """Needle questions of so many prompt tokens, all at once, each on a connection of its own; a
    scrape every while must never fall.
    """

    def one(seed: int, length: int) -> None:
        with OpenAI(base_url=f"{url}/v1", api_key="none", timeout=120, max_retries=0) as client:
            messages = make_problem("needle", seed=seed, approx_tokens=length).messages
            client.chat.completions.create(
                model="demo",
                messages=messages,
                temperature=0,
                max_tokens=24,
                extra_body={"ignore_eos": True},
            )

    counters = [metric for metric in catalog.METRICS if metric.kind == "counter"]
    with ThreadPoolExecutor(len(tokens)) as pool:
        running = [pool.submit(one, 90 + seed, length) for seed, length in enumerate(tokens)]
        last: dict[str, float] = {}
        while not all(future.done() for future in running):
            page = Page(url)
            now = {
                metric.name: page.get(metric) for metric in counters if metric.name in page.names
            }
            assert all(now[name] >= value for name, value in last.items())
            last = now
            time.sleep(0.2)
        for future in running:
            future.result()


def page_at_rest(url: str, before: Page, stats: list[dict]) -> Page:
    """The scrape that has caught up with the workers, which are idle."""
    deadline = time.monotonic() + REST_SECONDS
    while True:
        page = Page(url)
        rows = page.get(catalog.DECODE_ROWS) - before.get(catalog.DECODE_ROWS)
        if rows == stats[0]["decode_rows"] or time.monotonic() > deadline:
            assert rows == stats[0]["decode_rows"]
            return page
        time.sleep(0.1)


def check_decodes(before: Page, page: Page, stats: list[dict]) -> None:
    for rank, worker in enumerate(stats):

        def grew(metric: Metric, suffix: str = "", rank: int = rank) -> float:
            return page.get(metric, rank, suffix) - before.get(metric, rank, suffix)

        assert grew(catalog.DECODE_STEPS) == worker["steps"] > 0
        assert grew(catalog.PAGES_READ) == worker["pages_read"] > 0
        assert grew(catalog.PAGES_HELD) == worker["pages_total"] > worker["pages_read"]
        observed, total = (
            grew(catalog.KEPT_MASS_RATIO, "_count"),
            grew(catalog.KEPT_MASS_RATIO, "_sum"),
        )
        assert 0 < observed <= worker["decode_rows"]
        assert total / observed == pytest.approx(worker["kept_mass_mean"], rel=1e-5)
        for metric in (catalog.SELECT_SECONDS, catalog.LEARN_SECONDS):
            assert page.get(metric, rank, "_count") > 0 and page.get(metric, rank, "_sum") > 0


def test_one_server_shows_what_its_worker_counts(server):
    # Metrics know no reset; the figures before it are subtracted.
    worker_stats(server.url, reset=True)
    before, quiet = Page(server.url), server.log.read_text().count("SpeContext")
    ask(server.url, [300, 1500, 2000])
    stats = worker_stats(server.url)
    page = page_at_rest(server.url, before, stats)
    check_decodes(before, page, stats)
    assert all(
        labels["model_name"] == "demo" and labels["engine"] == "0"
        for _, labels in page.samples.values()
    )
    one_tier = {
        catalog.DECODE_STEPS,
        catalog.DECODE_ROWS,
        catalog.PAGES_READ,
        catalog.PAGES_HELD,
        catalog.OWN_BUDGET_ROWS,
        catalog.OWN_BUDGET_PAGES,
        catalog.DENSE_ROWS,
        catalog.DENSE_PAGES,
        catalog.KEPT_MASS_RATIO,
        catalog.SELECT_SECONDS,
        catalog.LEARN_SECONDS,
    }
    assert page.names == {sample for metric in one_tier for sample in metric.samples}
    assert server.log.read_text().count("SpeContext") == quiet, (
        "requests must not add lines to the log"
    )


def test_a_step_is_counted_before_its_token_is_sent(server):
    """Token n is made by the decode step n - 1, the first one by the prompt's."""
    before = Page(server.url).get(catalog.DECODE_STEPS)
    with OpenAI(base_url=f"{server.url}/v1", api_key="none", timeout=120, max_retries=0) as client:
        stream = client.completions.create(
            model="demo",
            prompt="A needle",
            temperature=0,
            max_tokens=16,
            stream=True,
            extra_body={"ignore_eos": True},
        )
        seen = [Page(server.url).get(catalog.DECODE_STEPS) - before for _ in stream]
    assert all(steps >= tokens for tokens, steps in enumerate(seen)), seen


def test_top_prints_the_server_s_figures(server):
    ask(server.url, [1500])
    result = CliRunner().invoke(app, ["top", server.url, "--once"])
    assert result.exit_code == 0, result.output
    assert (
        "demo, engine 0" in result.output
        and "kept attention mass" in result.output
        and "select, mean" in result.output
    )
    assert "host pool" not in result.output


@pytest.fixture(scope="module")
def two_of_each(forking_servers) -> Iterator[VllmServer]:
    """Two API servers, two workers, two tiers."""
    settings = {"budget": 256, "host_kv_gib": 0.25, "gpu_kv_gib": 0.0115}
    arguments = [
        "--attention-backend",
        "specontext",
        "--served-model-name",
        "demo",
        "--api-server-count",
        "2",
        "--tensor-parallel-size",
        "2",
        "--distributed-executor-backend",
        "mp",
        "--max-model-len",
        "4096",
        "--max-num-seqs",
        "4",
        "--num-gpu-blocks-override",
        "520",
        "--gpu-memory-utilization",
        "0.3",
        # So that each prompt has a chunk with history, whenever the requests arrive.
        "--max-num-batched-tokens",
        "2048",
        "--additional-config",
        json.dumps({"specontext": settings}),
        *device_arguments(),
        *GPU_OPTIONS,
    ]
    with VllmServer(DEMO_MODEL, arguments) as running:
        yield running


@pytest.mark.skipif(
    torch.cuda.is_available() and torch.cuda.device_count() < 2, reason="needs two GPUs"
)
def test_every_api_server_shows_what_every_worker_counts(two_of_each):
    url = two_of_each.url
    worker_stats(url, reset=True)
    before = Page(url)
    ask(url, [2500, 2500, 2500])
    stats = worker_stats(url)
    assert len(stats) == 2
    page = page_at_rest(url, before, stats)
    check_decodes(before, page, stats)
    for rank, worker in enumerate(stats):

        def grew(metric: Metric, rank: int = rank) -> float:
            return page.get(metric, rank) - before.get(metric, rank)

        missed = grew(catalog.MISSES)
        assert missed == worker["missed_head_pages"] > 0
        assert missed / (missed + grew(catalog.HITS)) == pytest.approx(1 - worker["hit_rate"])
        assert grew(catalog.FETCHED_BYTES) == worker["fetched_bytes"] > 0
        assert grew(catalog.LOADED_BYTES) == worker["loaded_bytes"] > 0
        assert grew(catalog.LAYER_MOVES) == worker["layer_moves"]
        assert page.get(catalog.RESIDENT_LAYERS, rank) == worker["resident_layers"]
        assert (
            page.get(catalog.OFFLOADED_LAYERS, rank)
            == worker["num_layers"] - worker["resident_layers"]
        )
        assert page.get(catalog.HOT_BUFFER_TOKENS, rank) == worker["hot_tokens"]
        assert page.get(catalog.HOST_POOL_BYTES, rank) == worker["host_pool_bytes"] > 0
        assert page.get(catalog.HOST_POOL_USED, rank) == worker["host_pool_used"]
    # The kernel deals each connection to some API server; both read the same files.
    assert all(Page(url).samples == page.samples for _ in range(6))
