"""Case `figures`: every figure of README.md and docs/*.md that a result file has, filled in from
that file.

A table: the heading stays as it is written, the rows are made. Columns are `KEY` or `KEY:FORMAT`,
    of the result's `rows`; `KEY=VALUE|VALUE`
keeps only rows with one of the values (in quotes where one holds a space); rows without a value in
the first column are left out:

    <!-- table decode-h200 cell stock:.2f ratio:.2f -->
    | requests x context | stock, ms | times faster |
    |---|---|---|
    <!-- /table -->

A figure in a sentence: an expression over the result's `rows`, `details`, `machine` and `date`
    (attributes are keys; `row("24 x 32k")` is
the row whose first value is that, `row("dlm 128", context=8192)` the one that has this value too,
and `row(context=4096, budget=64, threshold=0.3)` goes by keys alone; no other row may match;
`above(LIST, NUMBER)` and `len(LIST)` count; `kernel("specontext", "_resolve")` adds up the
microseconds of kernels so named in a recorded step; + - * / and numbers), and a format:

    <!-- fig decode-h200 row("24 x 32k").ratio .2f -->4.26<!-- /fig --> times faster

A picture of the result's decode steps names its source inside the file:

    <!-- picture decode-h200 -->
    ![Decode steps](docs/decode-step.png)
    <!-- /picture -->
"""

from __future__ import annotations

import ast
import hashlib
import json
import operator
import re
import shlex
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from benchmarks.report import RESULTS, Column

ROOT = Path(__file__).parents[1]
MARKERS = re.compile(
    r"<!-- (table|fig|picture) ([\w-]+)(?: (.*?))? -->(.*?)<!-- /\1 -->", re.DOTALL
)
OPERATORS = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
}


class FigureError(ValueError):
    """A marker that cannot be filled; the message is one sentence."""


@dataclass(frozen=True)
class Difference:
    """A place where a document says something else than its result file."""

    path: Path
    line: int
    found: str
    expected: str

    def __str__(self) -> str:
        return (
            f"{self.path}:{self.line}: found {self.found!r}, the result file says {self.expected!r}"
        )


def documents(root: Path) -> list[Path]:
    """The Markdown files that are filled in."""
    return [root / "README.md", *sorted((root / "docs").rglob("*.md"))]


def evaluate(expression: str, result: dict[str, Any]) -> Any:
    """The value of a marker's expression in a result.

    Raises:
        FigureError: no such key or row, or something that is not allowed.
    """
    try:
        return _value(ast.parse(expression, mode="eval").body, result)
    except (
        SyntaxError,
        KeyError,
        IndexError,
        TypeError,
        ZeroDivisionError,
        StopIteration,
    ) as error:
        raise FigureError(
            f"{expression}: cannot be read from the result ({type(error).__name__}: {error})."
        ) from None


def _value(node: ast.expr, result: dict[str, Any]) -> Any:
    match node:
        case ast.Constant(value=int() | float() | str() as value):
            return value
        case ast.Name(id="rows" | "details" | "machine" | "date" as name):
            return result[name]
        case ast.Call(
            func=ast.Name(id="row"), args=[] | [ast.Constant(value=str())], keywords=keys
        ) if node.args or keys:
            return _row(
                [_value(label, result) for label in node.args],
                {key.arg: _value(key.value, result) for key in keys},
                result,
            )
        case ast.Call(func=ast.Name(id="len"), args=[values], keywords=[]):
            return len(_value(values, result))
        case ast.Call(func=ast.Name(id="above"), args=[values, mark], keywords=[]):
            return sum(value > _value(mark, result) for value in _value(values, result))
        case ast.Call(
            func=ast.Name(id="kernel"),
            args=[ast.Constant(value=str(engine)), ast.Constant(value=str(part))],
            keywords=[],
        ):
            return sum(
                duration
                for name, _, _, duration in result["details"]["timeline"][engine]
                if part in name
            )
        case ast.Attribute(value=owner, attr=key):
            return _value(owner, result)[key]
        case ast.Subscript(value=owner, slice=key):
            return _value(owner, result)[_value(key, result)]
        case ast.BinOp(left=left, op=op, right=right) if type(op) in OPERATORS:
            return OPERATORS[type(op)](_value(left, result), _value(right, result))
    raise FigureError(
        f"{ast.unparse(node)}: only rows, details, machine, date, row(...), above(...), len(...), "
        "kernel(...), keys, numbers and + - * / are understood."
    )


def _row(label: list[str], keys: dict[str | None, Any], result: dict[str, Any]) -> dict[str, Any]:
    """The one row whose first value is the label, if there is one, and that has the keys' values."""
    found = [row for row in result["rows"] if not label or next(iter(row.values())) == label[0]]
    found = [
        row for row in found if all(key in row and row[key] == value for key, value in keys.items())
    ]
    if len(found) != 1:
        asked = ", ".join([*map(repr, label), *(f"{key}={value!r}" for key, value in keys.items())])
        raise FigureError(
            f"row({asked}): {len(found)} rows of the result match; name keys and values that only "
            "one has."
        )
    return found[0]


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
        "Source": f"{result['case']}, {result['date']}, sha256 of its rows {hashlib.sha256(text.encode()).hexdigest()}"
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
        begun = len(re.findall(r"<!-- (?:table|fig|picture) ", self.text))
        ended = len(re.findall(r"<!-- /(?:table|fig|picture) -->", self.text))
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
            path = self.results / f"{name}.json"
            if not path.exists():
                raise FigureError(f"{name}: there is no {path}.")
            make: Callable[..., str] = {
                "table": self._table,
                "fig": self._figure,
                "picture": self._picture,
            }[kind]
            expected = make(found, argument or "", body, json.loads(path.read_text()))
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

    def _table(self, found: re.Match[str], argument: str, body: str, result: dict[str, Any]) -> str:
        heading = body.strip("\n").splitlines()[:2]
        if len(heading) < 2 or not heading[1].startswith("|--"):
            raise FigureError("a table's marker is followed by the table's two heading lines.")
        return "\n" + make_table(argument, heading, result) + "\n"

    def _figure(
        self, found: re.Match[str], argument: str, body: str, result: dict[str, Any]
    ) -> str:
        # Such a line would be taken for HTML as a whole, and its Markdown shown as it is written.
        if self.text[self.text.rfind("\n", 0, found.start()) + 1 : found.start()].strip() == "":
            raise FigureError("a line must not begin with a marker; move a word before it.")
        expression, _, style = argument.rpartition(" ")
        value = evaluate(expression, result)
        try:
            return format(value, style)
        except (TypeError, ValueError):
            raise FigureError(f"{expression}: {value!r} has no format {style!r}.") from None

    def _picture(
        self, found: re.Match[str], argument: str, body: str, result: dict[str, Any]
    ) -> str:
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


def main(
    check: Annotated[
        bool, typer.Option("--check", help="Change nothing; exit code 1 if something differs.")
    ] = False,
) -> None:
    """Fill the figures, tables and the picture of README.md and docs/*.md from the result files."""
    differences: list[Difference] = []
    count = 0
    for path in documents(ROOT):
        filler = Filler(path, RESULTS, redraw=not check)
        try:
            filled = filler.fill()
        except FigureError as error:
            typer.echo(str(error), err=True)
            raise typer.Exit(2) from None
        if not check and filled != filler.text:
            path.write_text(filled)
        differences += filler.differences
        count += filler.count
    for difference in differences:
        print(difference)
    print(f"{count} markers, {len(differences)} {'differ' if check else 'changed'}.")
    raise typer.Exit(1 if check and differences else 0)
