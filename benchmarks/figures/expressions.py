"""Where in a result a figure is found.

An expression over the result's ``rows``, ``details``, ``machine`` and ``date``. Attributes are
keys: ``details.bandwidth``. ``row("24 x 32k")`` is the row whose first value is that;
``row("dlm 128", context=8192)`` has this value too; ``row(context=4096, budget=64)`` goes by keys
alone. Exactly one row must match. ``above(LIST, NUMBER)`` counts the values above a number,
``len(LIST)`` all of them. ``kernel("specontext", "_resolve")`` adds up the microseconds of the
kernels so named in a recorded step. Numbers and + - * / combine them.
"""

from __future__ import annotations

import ast
import json
import operator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

OPERATORS = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
}


class FigureError(ValueError):
    """A figure that cannot be read from its result; the message is one sentence."""


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


def read_result(folder: Path, name: str) -> dict[str, Any]:
    """The result file of a name, without its ending.

    Raises:
        FigureError: there is none.
    """
    path = folder / f"{name}.json"
    if not path.exists():
        raise FigureError(f"{name}: there is no {path}.")
    return json.loads(path.read_text())


def format_value(text: str, result: dict[str, Any]) -> str:
    """The figure that ``EXPRESSION FORMAT`` names, e.g. ``row("24 x 32k").ratio .2f``.

    Raises:
        FigureError: the expression or the format does not fit the result.
    """
    expression, _, style = text.rpartition(" ")
    value = evaluate(expression, result)
    try:
        return format(value, style)
    except (TypeError, ValueError):
        raise FigureError(f"{expression}: {value!r} has no format {style!r}.") from None


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
    """The one row whose first value is the label, if one is given, and has the keys' values."""
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
