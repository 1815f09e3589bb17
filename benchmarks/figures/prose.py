"""Figures in sentences: listed in docs/figures.toml, checked against the results and the documents.

Each entry quotes a few words of a document with `{}` in place of each figure, and says what the
figures are:

    [["docs/results/speed.md"]]
    text = "at 24 x 32k it is {} times faster than stock vLLM, at 1 x 1k {} times"
    result = "speed-steps-h200"
    values = ['row("24 x 32k").ratio .1f', 'row("1 x 1k").ratio .2f']

A value is an expression (see ``expressions``) and a format. The words must occur once in the
document, wherever its lines are broken, and stand on both sides of every figure.
"""

from __future__ import annotations

import re
import tomllib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.figures.expressions import Difference, FigureError, format_value, read_result

FIGURE = r"\S+?(?:\s+to\s+\S+?)?"
"""What may stand where a figure was: a number with its signs, or an interval."""


@dataclass(frozen=True)
class Sentence:
    """A piece of a document with figures in it.

    Attributes:
        document: path from the root of the repository.
        text: words of it, `{}` for each figure.
        result: name of a result file, without its ending.
        values: `EXPRESSION FORMAT` of each figure.
    """

    document: str
    text: str
    result: str
    values: tuple[str, ...]

    def pattern(self, figures: Sequence[str] | None = None) -> re.Pattern[str]:
        """Finds the words with these figures, or with any; a group is a figure.

        Raises:
            FigureError: a figure without words on both sides, or another number of values.
        """
        words = self.text.split("{}")
        if len(words) != len(self.values) + 1:
            raise FigureError(
                f"{self.text!r}: {len(words) - 1} times {{}} and {len(self.values)} values."
            )
        if len(words) < 2 or not all(word.strip() for word in words):
            raise FigureError(f"{self.text!r}: needs {{}} with words on both sides.")
        parts = [_any_spaces(words[0])]
        for number, word in enumerate(words[1:]):
            parts += [f"({_any_spaces(figures[number]) if figures else FIGURE})", _any_spaces(word)]
        return re.compile("".join(parts))

    def figures(self, results: Path) -> list[str]:
        """What the result says."""
        result = read_result(results, self.result)
        return [format_value(value, result) for value in self.values]


def _any_spaces(text: str) -> str:
    return r"\s+".join(map(re.escape, re.split(r"\s+", text)))


def read_sentences(path: Path) -> list[Sentence]:
    """The entries of figures.toml; none where there is no such file.

    Raises:
        FigureError: it cannot be read.
    """
    if not path.exists():
        return []
    try:
        found = tomllib.loads(path.read_text())
        return [
            Sentence(document, entry["text"], entry["result"], tuple(entry["values"]))
            for document, entries in found.items()
            for entry in entries
        ]
    except (tomllib.TOMLDecodeError, KeyError, TypeError) as error:
        raise FigureError(f"{path}: {type(error).__name__}: {error}.") from None


def fill_sentence(
    sentence: Sentence, text: str, path: Path, results: Path
) -> tuple[str, list[Difference]]:
    """The document's text with the sentence's figures, and those that were otherwise.

    Args:
        path: of the document, for messages.

    Raises:
        FigureError: the words are not in the document, or more than once, or a figure cannot be
            read from the result.
    """
    try:
        expected = sentence.figures(results)
        # Its own figures first: words around another figure may match more than was meant.
        right = list(sentence.pattern(expected).finditer(text))
        if len(right) == 1:
            return text, []
        places = right or list(sentence.pattern().finditer(text))
        if len(places) != 1:
            raise FigureError(
                f"the words {sentence.text!r} occur {len(places)} times; quote words that occur "
                "once."
            )
    except FigureError as error:
        raise FigureError(f"{path}, {sentence.result}: {error}") from None
    differences = []
    # From the last to the first, so that earlier places stay where they are.
    for group, figure in reversed(list(enumerate(expected, 1))):
        begin, end = places[0].span(group)
        if text[begin:end].split() != figure.split():
            line = text.count("\n", 0, begin) + 1
            differences.append(Difference(path, line, text[begin:end], figure))
            text = text[:begin] + figure + text[end:]
    return text, differences[::-1]
