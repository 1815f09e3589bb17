"""`specontext top`: what it makes of a page of metrics, and what it says where there are none."""

from __future__ import annotations

import io
import re

import pytest
from prometheus_client import CollectorRegistry, Counter, start_http_server
from rich.console import Console
from typer.testing import CliRunner

from specontext_vllm.cli import app
from specontext_vllm.observability import catalog, top
from specontext_vllm.observability.top import growth, metrics_url, parse, show


def page(scale: int, engine: str = "0") -> str:
    """A page of two ranks whose counters are ``scale`` times some base."""
    lines = []
    for metric in catalog.METRICS:
        lines.append(f"# TYPE {metric.name} {metric.kind}")
        for rank in range(2 if metric.per_rank else 1):
            labels = f'model_name="m",engine="{engine}"' + (
                f',tp_rank="{rank}"' if metric.per_rank else ""
            )
            if metric.kind == "histogram":
                lines.append(f'{metric.name}_bucket{{{labels},le="+Inf"}} {10 * scale}')
                lines.append(f"{metric.name}_count{{{labels}}} {10 * scale}")
                lines.append(f"{metric.name}_sum{{{labels}}} {5 * scale}")
            else:
                value = {
                    catalog.HITS: 90,
                    catalog.MISSES: 10,
                    catalog.RESIDENT_LAYERS: 4 - rank,
                    catalog.OFFLOADED_LAYERS: 2 + rank,
                    catalog.SIDECAR_UP: rank,
                }.get(metric, 20)
                lines.append(
                    f"{metric.name}{{{labels}}} "
                    f"{value * (scale if metric.kind == 'counter' else 1)}"
                )
    return "\n".join(lines) + "\n"


def text_of(*args) -> str:
    console = Console(width=120)
    with console.capture() as capture:
        console.print(show(*args))
    return capture.get()


def row(text: str, name: str) -> list[str]:
    line = next(line for line in text.splitlines() if re.match(rf"│ {name}\b", line))
    return [cell.strip() for cell in line.strip("│").split("│")[1:]]


def test_rates_come_from_two_readings_and_totals_from_the_last():
    text = text_of(parse(page(3)), parse(page(1)), 4.0)
    assert "m, engine 0" in text
    assert row(text, "decode rows") == ["10.0/s", "60"]  # (60 - 20) / 4
    assert row(text, "hot buffer hit rate") == ["90.0%", "90.0%"]
    assert row(text, "kept attention mass, mean") == ["50.0%", "50.0%"]
    assert row(text, "layers moved") == ["20.0/s", "120"]  # both ranks
    assert row(text, "resident layers")[0] == "3 of 6"
    assert row(text, "sidecar")[0] == "away, does not know 20 pages"
    assert row(text, "read whole for want of the sidecar") == [
        "200.0%",
        "200.0%",
    ]  # 20 rows of each rank, of 20 in all


def test_one_reading_has_no_rates():
    text = text_of(parse(page(1)), None, 0.0)
    assert "last" not in text
    assert row(text, "decode rows") == ["20"]


def test_engines_have_tables_of_their_own_and_other_metrics_are_left_out():
    other = (
        "# TYPE vllm:num_requests_running gauge\n"
        'vllm:num_requests_running{engine="0",model_name="m"} 1\n'
    )
    assert list(parse(page(1, "0") + other)) == [("m", "0")]
    assert list(parse(page(1, "1"))) == [("m", "1")]


def test_a_metric_that_is_absent_has_no_row():
    gone = (catalog.FALLBACK_ROWS.name, catalog.RESIDENT_LAYERS.name, "sidecar")
    lines = [line for line in page(1).splitlines() if not any(name in line for name in gone)]
    text = text_of(parse("\n".join(lines) + "\n"), None, 0.0)
    assert (
        "fell back" not in text
        and "resident" not in text
        and "sidecar" not in text
        and "decode rows" in text
    )


def test_counters_that_fell_have_begun_anew():
    assert growth({"a": 5.0, "b": 9.0, "c": 1.0}, {"a": 7.0, "b": 4.0}) == {
        "a": 5.0,
        "b": 5.0,
        "c": 1.0,
    }


def test_a_server_that_goes_away_is_waited_for(monkeypatch):
    readings = iter(
        [parse(page(1)), top.TopError("h: no metrics there."), parse(page(1)), KeyboardInterrupt()]
    )
    said = []

    def read(address: str) -> dict:
        if isinstance(found := next(readings), BaseException):
            raise found
        return found

    monkeypatch.setattr(top, "read", read)
    monkeypatch.setattr(top.time, "sleep", lambda seconds: None)
    monkeypatch.setattr(top.Live, "update", lambda live, shown, refresh: said.append(shown))
    with pytest.raises(KeyboardInterrupt):
        top.watch("h", 2.0, False, Console(file=io.StringIO()))
    assert said[0] == "h: no metrics there. Trying again; Ctrl-C ends." and len(said) == 2


@pytest.mark.parametrize(
    "given", ["http://h:1", "h:1", "http://h:1/", "http://h:1/metrics", "http://h:1/v1"]
)
def test_any_address_of_a_server_will_do(given):
    assert metrics_url(given) == "http://h:1/metrics"


@pytest.fixture(scope="module")
def other_server():
    """A Prometheus endpoint without specontext."""
    registry = CollectorRegistry()
    Counter("vllm:other", "Some other metric.", registry=registry)
    server, thread = start_http_server(0, "127.0.0.1", registry)
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    thread.join()


def refusal(url: str) -> str:
    result = CliRunner().invoke(app, ["top", url, "--once"])
    assert result.exit_code == 2 and result.stdout == ""
    return result.stderr.strip()


def test_a_server_without_specontext_is_refused(other_server):
    assert refusal(other_server).startswith(
        f"{other_server}/metrics: nothing of specontext there; start the server with "
        "--attention-backend"
    )


@pytest.mark.parametrize(
    "url", ["http://127.0.0.1:9", "no such host", "ftp://127.0.0.1", "http://127.0.0.1:port"]
)
def test_no_server_is_refused(url):
    message = refusal(url)
    assert "no metrics there" in message and "\n" not in message
