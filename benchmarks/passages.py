"""Prompts out of real texts: a passage, or a passage that stands twice."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from random import Random
from typing import Any

CHARACTERS = 6
"""Characters of a text that surely hold a token each; the rest is cut off."""
SEPARATOR = "\n\n----\n\nHere is an excerpt from the text above, repeated:\n\n"
LEAD = 12
"""Tokens of an excerpt before those that are forced."""
KINDS = ("text", "copy")


class TextsError(ValueError):
    """Unusable texts; the message is one sentence."""


def read_texts(path: Path) -> dict[str, list[str]]:
    """Texts by kind: a folder of text files, of which each is a kind of its own, one text file, or
    JSON, ``{kind: [text, ...]}``.

    Raises:
        TextsError: none there.
    """
    if path.suffix == ".json":
        return json.loads(path.read_text())
    files = sorted(path.glob("*.txt")) if path.is_dir() else [path] if path.is_file() else []
    if not files:
        raise TextsError(f"--texts: found no text in {path}; give a folder of .txt files.")
    return {file.stem: [file.read_text(errors="replace")] for file in files}


class Passages:
    """Draws prompts of one length, the same for the same texts, seed and tokenizer.

    Args:
        texts: by kind; a kind is drawn first, then one of its texts.
        forced: tokens at a prompt's end that are scored.

    Raises:
        TextsError: no text is long enough.
    """

    def __init__(
        self,
        texts: Mapping[str, Sequence[str]],
        tokenizer: Any,
        length: int,
        forced: int,
        random: Random,
    ) -> None:
        self.texts, self.tokenizer, self.random = texts, tokenizer, random
        self.length, self.forced, self.characters = length, forced, CHARACTERS * length
        if not any(len(text) >= self.characters for many in texts.values() for text in many):
            raise TextsError(
                f"--texts: none has the {self.characters} characters that a passage of {length} "
                "tokens is drawn from; give longer texts or a smaller --context."
            )

    def draw(self, kind: str) -> list[int]:
        """Token ids of a prompt of ``KINDS``."""
        return self.text() if kind == "text" else self.copy()

    def text(self) -> list[int]:
        """A passage."""
        while True:
            text = self.random.choice(self.texts[self.random.choice(list(self.texts))])
            if len(text) < self.characters:
                continue
            at = self.random.randrange(len(text) - self.characters + 1)
            ids = self._encode(text[at : at + self.characters])
            if len(ids) >= self.length:
                return ids[: self.length]

    def copy(self) -> list[int]:
        """A passage with an excerpt of itself at the end, from neither its beginning nor its end;
        all of the excerpt but its first ``LEAD`` tokens is scored.
        """
        between, excerpt = self._encode(SEPARATOR), LEAD + self.forced
        body = self.text()[: self.length - excerpt - len(between)]
        first, last = min(200, len(body) // 5), len(body) - min(700, len(body) // 2)
        at = self.random.randrange(first, max(first + 1, last))
        return body + between + body[at : at + excerpt]

    def _encode(self, text: str) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False)["input_ids"]
