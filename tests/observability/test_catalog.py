"""Code, dashboard and documentation name the same metrics."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from specontext_vllm.observability.catalog import METRICS, PREFIX

ROOT = Path(__file__).parents[2]


def test_the_dashboard_shows_every_metric_and_no_other():
    dashboard = json.loads((ROOT / "configs" / "grafana.json").read_text())
    expressions = [
        target["expr"] for panel in dashboard["panels"] for target in panel.get("targets", ())
    ]
    shown = {name for text in expressions for name in re.findall(rf"{PREFIX}\w+", text)}
    known = {sample: metric for metric in METRICS for sample in metric.samples}
    assert shown <= known.keys(), "the dashboard names metrics that do not exist"
    assert {known[name].name for name in shown} == {metric.name for metric in METRICS}, (
        "metrics that no panel shows"
    )
    for variable in dashboard["templating"]["list"]:
        for name in re.findall(rf"{PREFIX}\w+", str(variable.get("query", ""))):
            assert name in known


def test_the_dashboard_asks_for_its_data_source():
    dashboard = json.loads((ROOT / "configs" / "grafana.json").read_text())
    assert dashboard["templating"]["list"][0]["type"] == "datasource"
    sources = {
        json.dumps(panel["datasource"]) for panel in dashboard["panels"] if "datasource" in panel
    }
    assert sources == {json.dumps({"type": "prometheus", "uid": "${datasource}"})}


@pytest.mark.parametrize("page", ["docs/metrics.md", "docs/guides/operations.md"])
def test_pages_name_only_metrics_that_exist(page):
    named = set(re.findall(rf"{PREFIX}\w+", (ROOT / page).read_text()))
    assert named
    assert named <= {sample for m in METRICS for sample in (*m.samples, m.name)}


@pytest.mark.parametrize("metric", METRICS, ids=lambda m: m.name.removeprefix(PREFIX))
def test_names_follow_prometheus(metric):
    assert (metric.kind == "counter") == metric.name.endswith("_total")
    assert metric.text.endswith(".")
    stem = metric.name.removesuffix("_total")
    for unit in ("bytes", "seconds", "ratio"):
        assert (metric.unit == unit) == stem.endswith(f"_{unit}")
    assert list(metric.edges) == sorted(set(metric.edges)) and bool(metric.edges) == (
        metric.kind == "histogram"
    )
