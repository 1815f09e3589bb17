"""Tables and pictures that are made from a result, each between two marker lines.

A table: the heading stays as it is written, the rows are made. Columns are `KEY` or `KEY:FORMAT`,
of the result's `rows`. `KEY=VALUE|VALUE` keeps only rows with one of the values, in quotes where
one holds a space. Rows without a value in the first column are left out:

    <!-- table decode-h200 cell stock:.2f ratio:.2f -->
    | requests x context | stock, ms | times faster |
    |---|---|---|
    <!-- /table -->

A picture of the result's decode steps. Its file says which result it was drawn from:

    <!-- picture decode-h200 -->
    ![Decode steps](docs/images/decode-step.png)
    <!-- /picture -->
"""

from __future__ import annotations

import hashlib
import json
import re
import shlex
from pathlib import Path
from typing import Any

from benchmarks.figures.expressions import Difference, FigureError, read_result
from benchmarks.report import Column

MARKERS = re.compile(r"<!-- (table|picture) ([\w.-]+)(?: (.*?))? -->(.*?)<!-- /\1 -->", re.DOTALL)


def make_table(columns: str, heading: list[str], result: dict[str, Any]) -> str:
    """The lines of a table: its heading, then one line per row of the result."""
    try:
        words = shlex.split(columns)
    except ValueError as error:
        raise FigureError(f"{columns}: {error}; a value in quotes ends with one.") from None
    filters = [word.split("=", 1) for word in words if "=" in word]
    parsed = [
        Column(key, "", style)
        for key, _, style in (word.partition(":") for word in words if "=" not in word)
    ]
    rows = [row for row in result["rows"] if row.get(parsed[0].key) is not None]
    for key, values in filters:
        rows = [row for row in rows if str(row.get(key)) in values.split("|")]
    lines = [
        "| " + " | ".join(column.cell(row).replace("|", "\\|") for column in parsed) + " |"
        for row in rows
    ]
    return "\n".join([*heading, *lines])


def source_of(result: dict[str, Any]) -> dict[str, str]:
    """What a picture made from a result keeps in its file."""
    text = json.dumps(result["rows"], sort_keys=True)
    return {
        "Source": f"{result['case']}, {result['date']}, sha256 of its rows "
        + hashlib.sha256(text.encode()).hexdigest()
    }


class Filler:
    """Fills the markers of one document.

    Args:
        results: folder of the result files.
        redraw: whether pictures that are not their result's are drawn anew.
    """

    def __init__(self, path: Path, results: Path, *, redraw: bool) -> None:
        self.path, self.results, self.redraw = path, results, redraw
        self.text = path.read_text()
        self.differences: list[Difference] = []
        self.count = 0

    def fill(self) -> str:
        """The document with its results' figures; ``differences`` then holds what was otherwise.

        Raises:
            FigureError: a marker that cannot be filled, with the document and the line.
        """
        begun = len(re.findall(r"<!-- (?:table|picture) ", self.text))
        ended = len(re.findall(r"<!-- /(?:table|picture) -->", self.text))
        filled = MARKERS.sub(self._replace, self.text)
        if not begun == ended == self.count:
            raise FigureError(
                f"{self.path}: {begun} markers begin, {ended} end and {self.count} can be read; "
                "each needs its own end."
            )
        return filled

    def _replace(self, found: re.Match[str]) -> str:
        kind, name, argument, body = found.groups()
        self.count += 1
        try:
            if not self._stands_alone(found):
                raise FigureError(f"a {kind}'s markers stand on lines of their own.")
            result = read_result(self.results, name)
            expected = (
                self._table(argument or "", body, result)
                if kind == "table"
                else self._picture(found, body, result)
            )
        except FigureError as error:
            raise FigureError(f"{self.path}:{self._line(found)}: {error}") from None
        if expected != body:
            self.differences.append(
                Difference(self.path, self._line(found), body.strip(), expected.strip())
            )
        begin, end = (place - found.start() for place in found.span(4))
        return found[0][:begin] + expected + found[0][end:]

    def _line(self, found: re.Match[str]) -> int:
        return self.text.count("\n", 0, found.start()) + 1

    def _stands_alone(self, found: re.Match[str]) -> bool:
        begin, end = found.start(), found.end()
        body = found[4]
        return (
            self.text[:begin].rpartition("\n")[2] == ""
            and body.startswith("\n")
            and body.endswith("\n")
            and self.text[end:].partition("\n")[0] == ""
        )

    def _table(self, argument: str, body: str, result: dict[str, Any]) -> str:
        heading = body.strip("\n").splitlines()[:2]
        if len(heading) < 2 or not heading[1].startswith("|--"):
            raise FigureError("a table's marker is followed by the table's two heading lines.")
        return "\n" + make_table(argument, heading, result) + "\n"

    def _picture(self, found: re.Match[str], body: str, result: dict[str, Any]) -> str:
        from benchmarks.picture import draw_steps, drawn_from

        link = re.search(r"!\[.*?\]\((.+?)\)", body)
        if not link:
            raise FigureError("a picture's marker is followed by the picture's link.")
        path, source = self.path.parent / link[1], source_of(result)
        if drawn_from(path) != source["Source"]:
            self.differences.append(
                Difference(self.path, self._line(found), link[1], f"drawn from {source['Source']}")
            )
            if self.redraw:
                draw_steps(result["rows"], result["title"], path, source)
        return body
