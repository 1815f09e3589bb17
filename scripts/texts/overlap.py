"""Paragraphs that stand twice: in training and test texts, or twice in training texts."""

from __future__ import annotations

import re
from collections.abc import Iterable

SIZE = 13
"""Words of a shingle. Thirteen equal words in a row are hardly ever chance."""

LONG_PARAGRAPH = 120
"""Characters; shorter paragraphs (headings, list items) may stand in several documents."""


def shingles(text: str) -> Iterable[int]:
    """Hashes of every ``SIZE`` successive words, without case and punctuation."""
    words = re.findall(r"\w+", text.lower())
    return (hash(tuple(words[at : at + SIZE])) for at in range(len(words) - SIZE + 1))


def paragraphs(text: str) -> list[str]:
    """Parts between empty lines."""
    return re.split(r"\n\s*\n", text)


class Seen:
    """What a training text may not hold: shingles of test texts, paragraphs that were written
    before.
    """

    def __init__(self, test: Iterable[str]) -> None:
        self.test = {shingle for text in test for shingle in shingles(text)}
        self._written: set[int] = set()
        self.shingles = self.shared = self.dropped = self.twice = 0

    def fresh(self, text: str) -> str:
        """The text without those paragraphs. Counts what it drops."""
        kept = []
        for paragraph in paragraphs(text):
            found = list(shingles(paragraph))
            shared = sum(shingle in self.test for shingle in found)
            self.shingles, self.shared = self.shingles + len(found), self.shared + shared
            if shared:
                self.dropped += 1
                continue
            if len(paragraph) >= LONG_PARAGRAPH:
                key = hash(" ".join(paragraph.split()))
                if key in self._written:
                    self.twice += 1
                    continue
                self._written.add(key)
            kept.append(paragraph)
        return "\n\n".join(kept)
