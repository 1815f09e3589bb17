"""Every table of the README is a committed result, to the digit."""

import json
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
TABLES = {
    "decode-h200": ("cell", ("stock", ".2f"), ("sparse", ".2f"), ("ratio", ".2f"), ("pages_read", ".1%")),
    "capacity-h200": ("name", ("at_once", ""), ("step", ".2f"), ("rate", ",.0f"), ("ratio", ".2f"), ("missed", ".1%")),
    "accuracy-cpu": ("name", ("multi_key", ".2f"), ("recitation", ".2f"), ("perplexity", ".3f"), ("pages_read", ".1%")),
}
QUOTED = {
    "accuracy-cpu": lambda row: row["context"] == 8192 and row.get("name") and (row["retriever"] in ("dense", "dlm") or row["budget"] == 512),
}
"""Which rows, where not all."""


@pytest.mark.parametrize("name", TABLES)
def test_the_readme_quotes_the_result_file(name):
    text = (ROOT / "README.md").read_text()
    table = re.search(rf"<!-- {name} -->\n(.*?)<!-- /{name} -->", text, re.S)[1].strip().splitlines()[2:]
    rows = json.loads((ROOT / "benchmarks" / "results" / f"{name}.json").read_text())["rows"]
    rows = [row for row in rows if QUOTED.get(name, bool)(row)]
    key, *columns = TABLES[name]
    expected = []
    for row in rows:
        cells = ["–" if row.get(column) is None else format(row[column], style) for column, style in columns]
        expected.append("| " + " | ".join([str(row[key]), *cells]) + " |")
    assert table == expected
