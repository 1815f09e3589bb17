"""`specontext top`: a server's figures in a terminal, from its /metrics."""

from __future__ import annotations

import time
import urllib.request
from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from http.client import HTTPException
from urllib.parse import urlsplit

from prometheus_client.parser import text_string_to_metric_families
from rich.console import Console, Group
from rich.live import Live
from rich.table import Table

from specontext_vllm.observability import catalog
from specontext_vllm.observability.catalog import METRICS, PREFIX, Metric

TIMEOUT_SECONDS = 10.0
ABSENT = "–"


class TopError(RuntimeError):
    """A server that cannot be watched; the message is one sentence that says why."""


@dataclass
class EngineSamples:
    """One engine's samples, tensor-parallel ranks taken together.

    Attributes:
        sums: counters, and histograms' _sum and _count: added up over the ranks.
        gauges: each rank's value.
    """

    sums: dict[str, float] = field(default_factory=lambda: defaultdict(float))
    gauges: dict[str, list[float]] = field(default_factory=lambda: defaultdict(list))


Reading = dict[tuple[str, str], EngineSamples]
"""By model name and engine."""


def metrics_url(url: str) -> str:
    """The address of a server's /metrics; users give the server's with or without scheme, /v1 or
    /metrics.

    Raises:
        TopError: not an address.
    """
    try:
        parts = urlsplit(url if "://" in url else f"http://{url}")
    except ValueError as error:
        raise TopError(
            f"{url}: no address ({error}); give that of a running vllm serve, such as "
            "http://127.0.0.1:8000."
        ) from None
    return f"{parts.scheme}://{parts.netloc}/metrics"


def read(address: str) -> Reading:
    """specontext's figures in /metrics now.

    Raises:
        TopError: no answer, no Prometheus text, or no figure of specontext in it.
    """
    try:
        with urllib.request.urlopen(address, timeout=TIMEOUT_SECONDS) as answer:
            text = answer.read().decode()
        reading = parse(text)
    except (OSError, HTTPException, ValueError) as error:
        reason = getattr(error, "reason", error)
        raise TopError(
            f"{address}: no metrics there ({reason}); give the address of a running vllm serve, "
            "such as http://127.0.0.1:8000."
        ) from None
    if not reading:
        raise TopError(
            f"{address}: nothing of specontext there; start the server with --attention-backend "
            "specontext, and without stats false."
        )
    return reading


def parse(text: str) -> Reading:
    """The samples of a /metrics page, by engine.

    Raises:
        ValueError: not Prometheus text, or samples without the labels of model and engine.
    """
    kinds = {sample: metric.kind for metric in METRICS for sample in metric.samples}
    reading: Reading = defaultdict(EngineSamples)
    for family in text_string_to_metric_families(text):
        if not family.name.startswith(PREFIX):
            continue
        for sample in family.samples:
            try:
                figures = reading[sample.labels["model_name"], sample.labels["engine"]]
            except KeyError as error:
                raise ValueError(f"{sample.name} without the label {error}") from None
            if kinds.get(sample.name) == "gauge":
                figures.gauges[sample.name].append(sample.value)
            elif sample.name in kinds and "le" not in sample.labels:
                figures.sums[sample.name] += sample.value
    return dict(reading)


def growth(now: Mapping[str, float], before: Mapping[str, float]) -> dict[str, float]:
    """How much counters grew. One that fell was reset by its engine's restart, and grew by its
    value.
    """
    return {
        name: value - before.get(name, 0.0) if value >= before.get(name, 0.0) else value
        for name, value in now.items()
    }


def show(now: Reading, before: Reading | None, seconds: float) -> Group:
    """A table for each engine: figures since the start and, if there is an earlier reading, of the
    last ``seconds``.
    """
    tables = []
    for (model, engine), figures in sorted(now.items()):
        table = Table(title=f"{model}, engine {engine}", title_justify="left")
        table.add_column("")
        recent = None
        if before is not None:
            earlier = before.get((model, engine), EngineSamples())
            recent = growth(figures.sums, earlier.sums)
            table.add_column(f"last {seconds:.0f} s", justify="right")
        table.add_column("since the start", justify="right")
        for name, cell in _ROWS.items():
            cells = [cell(recent, seconds)] if recent is not None else []
            cells.append(cell(figures.sums, None))
            if any(text != ABSENT for text in cells):
                table.add_row(name, *cells)
        for name, text in _gauge_rows(figures.gauges):
            table.add_row(name, *([text, ""] if recent is not None else [text]))
        tables.append(table)
    return Group(*tables)


def watch(url: str, every: float, once: bool, console: Console) -> None:
    """Print one table, or keep one up to date until Ctrl-C. A server that goes away meanwhile is
    asked again.

    Raises:
        TopError: as ``read``, at the first reading.
    """
    address = metrics_url(url)
    now, at = read(address), time.monotonic()
    if once:
        console.print(show(now, None, 0.0))
        return
    with Live(show(now, None, 0.0), console=console, auto_refresh=False) as live:
        while True:
            time.sleep(every)
            before, begin = now, at
            try:
                now, at = read(address), time.monotonic()
            except TopError as error:
                live.update(f"{error} Trying again; Ctrl-C ends.", refresh=True)
                continue
            live.update(show(now, before, at - begin), refresh=True)


Cell = Callable[[Mapping[str, float], float | None], str]
"""Text of a figure, from sums over some seconds; None for sums since the start, which have no rate.
"""


def _share(part: Metric, *whole: str) -> Cell:
    def text(sums: Mapping[str, float], seconds: float | None) -> str:
        total = sum(sums.get(name, 0.0) for name in whole)
        return f"{sums[part.name] / total:.1%}" if total and part.name in sums else ABSENT

    return text


def _rate(metric: Metric, scale: float = 1.0, unit: str = "") -> Cell:
    def text(sums: Mapping[str, float], seconds: float | None) -> str:
        if metric.name not in sums:
            return ABSENT
        value = sums[metric.name] * scale
        return f"{value:,.0f}{unit}" if seconds is None else f"{value / seconds:,.1f}{unit}/s"

    return text


def _mean(total: str, number: str, scale: float, style: str, unit: str) -> Cell:
    def text(sums: Mapping[str, float], seconds: float | None) -> str:
        return (
            f"{sums[total] / sums[number] * scale:{style}}{unit}"
            if total in sums and sums.get(number)
            else ABSENT
        )

    return text


def _observed(metric: Metric, scale: float, style: str, unit: str) -> Cell:
    return _mean(f"{metric.name}_sum", f"{metric.name}_count", scale, style, unit)


_ROWS: dict[str, Cell] = {
    "decode rows": _rate(catalog.DECODE_ROWS),
    "decode steps": _rate(catalog.DECODE_STEPS),
    "pages read, of those held": _share(catalog.PAGES_READ, catalog.PAGES_HELD.name),
    "kept attention mass, mean": _observed(catalog.KEPT_MASS_RATIO, 1, ".1%", ""),
    "rows that fell back, of those that chose": _share(
        catalog.FALLBACK_ROWS, f"{catalog.KEPT_MASS_RATIO.name}_count"
    ),
    "select, mean of sampled steps": _observed(catalog.SELECT_SECONDS, 1e3, ".2f", " ms"),
    "learn, mean of sampled steps": _observed(catalog.LEARN_SECONDS, 1e3, ".2f", " ms"),
    "hot buffer hit rate": _share(catalog.HITS, catalog.HITS.name, catalog.MISSES.name),
    "fetched": _rate(catalog.FETCHED_BYTES, 1e-6, unit=" MB"),
    "loaded besides": _rate(catalog.LOADED_BYTES, 1e-6, unit=" MB"),
    "late prefetches": _share(catalog.LATE_PREFETCHES, catalog.PREFETCHES.name),
    "late by, mean": _mean(
        catalog.LATE_SECONDS.name, catalog.LATE_PREFETCHES.name, 1e6, ".0f", " us"
    ),
    "layers moved": _rate(catalog.LAYER_MOVES),
    "lossless steps with drafts": _share(
        catalog.LOSSLESS_VERIFIED_STEPS, catalog.LOSSLESS_STEPS.name
    ),
    "drafts of a row there": _mean(
        catalog.LOSSLESS_DRAFTS.name, catalog.LOSSLESS_VERIFIED_STEPS.name, 1, ".1f", ""
    ),
    "read whole for want of the sidecar": _share(
        catalog.SIDECAR_DENSE_ROWS, catalog.DECODE_ROWS.name
    ),
    "wait for the sidecar, a step": _mean(
        catalog.SIDECAR_WAIT_SECONDS.name, catalog.DECODE_STEPS.name, 1e3, ".2f", " ms"
    ),
    "restarts of the sidecar": _rate(catalog.SIDECAR_RESTARTS),
}


def _gauge_rows(gauges: Mapping[str, list[float]]) -> list[tuple[str, str]]:
    """The worst of the ranks: the least memory, or a sidecar that is away."""
    rows = []
    if catalog.SIDECAR_UP.name in gauges:
        up, lost = (
            min(gauges[catalog.SIDECAR_UP.name]),
            max(gauges[catalog.SIDECAR_LOST_PAGES.name]),
        )
        rows.append(("sidecar", f"{'up' if up else 'away'}, does not know {lost:,.0f} pages"))
    if catalog.RESIDENT_LAYERS.name not in gauges:
        return rows
    resident = min(gauges[catalog.RESIDENT_LAYERS.name])
    layers = resident + max(gauges[catalog.OFFLOADED_LAYERS.name])
    pool, used = sum(gauges[catalog.HOST_POOL_BYTES.name]), max(gauges[catalog.HOST_POOL_USED.name])
    return [
        *rows,
        ("resident layers", f"{resident:.0f} of {layers:.0f}"),
        ("hot buffer", f"{min(gauges[catalog.HOT_BUFFER_TOKENS.name]):,.0f} tokens"),
        ("host pool in use", f"{used:.1%} of {pool / 2**30:.2f} GiB"),
    ]
