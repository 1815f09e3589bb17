"""The user's texts, and passages drawn from them."""

from __future__ import annotations

import json
import re
from collections import Counter, defaultdict
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from random import Random
from typing import Any

SUFFIXES = (".txt", ".md", ".rst")
"""Files that are read of a folder."""

DRAWS = 200
"""Places that are tried for one passage."""


class TextError(ValueError):
    """Texts that cannot be used; the message is one sentence."""


def read_texts(option: str, paths: Sequence[Path]) -> list[list[str]]:
    """The files' contents for each path: a file, or a folder of files ending in ``SUFFIXES``. A
    JSON file, ``{kind: [text, ...]}``, counts as a path for each kind.

    Raises:
        TextError: a path without any text.
    """
    out = []
    for path in paths:
        if path.suffix == ".json" and path.is_file():
            out += _read_json(option, path)
            continue
        files = (
            sorted(file for file in path.rglob("*") if file.suffix in SUFFIXES and file.is_file())
            if path.is_dir()
            else [path]
        )
        try:
            found = [file.read_text(encoding="utf-8", errors="replace") for file in files]
        except OSError as error:
            raise TextError(f"{option}: {path} cannot be read ({error.strerror}).") from None
        if not any(text.strip() for text in found):
            raise TextError(
                f"{option}: found no text in {path}; give plain text files, or folders of "
                f"{', '.join(SUFFIXES)} files."
            )
        out.append(found)
    return out


def _read_json(option: str, path: Path) -> list[list[str]]:
    try:
        kinds = [[*map(str, texts)] for texts in json.loads(path.read_text()).values()]
    except (ValueError, AttributeError, TypeError) as error:
        raise TextError(
            f"{option}: {path} is not JSON of the form {{kind: [text, ...]}} ({error})."
        ) from None
    if not kinds or not all(any(text.strip() for text in kind) for kind in kinds):
        raise TextError(f"{option}: found a kind without text in {path}.")
    return kinds


class Texts:
    """Passages of the user's texts, as tokens.

    Each source (one path of ``--texts``) has the same share of the passages; within it a passage
    begins anywhere with the same probability, at the beginning of a word.

    Args:
        sources: the files' contents for each path.
        tokenizer: the model's.
    """

    def __init__(self, sources: Sequence[Sequence[str]], tokenizer: Any) -> None:
        self.sources, self._tokenizer = sources, tokenizer
        sample = " ".join(source[0][:20_000] for source in sources)
        self._characters = len(sample) / max(1, len(self.encode(sample)))

    def encode(self, text: str) -> list[int]:
        """Token ids of bare text."""
        return list(self._tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])

    def passage(self, rng: Random, tokens: int) -> list[int]:
        """Token ids of a passage of that length.

        Raises:
            TextError: no text is that long.
        """
        wanted = int(1.1 * tokens * self._characters) + 64
        long_enough = [[text for text in source if len(text) > wanted] for source in self.sources]
        fitting = [source for source in long_enough if source]
        for _ in range(DRAWS if fitting else 0):
            source = rng.choice(fitting)
            (text,) = rng.choices(source, [len(text) - wanted for text in source])
            space = re.compile(r"\s+").search(text, rng.randrange(len(text) - wanted + 1))
            begin = space.end() if space else len(text)
            # Text of long words has more characters a token than the sample.
            for factor in (1, 2, 4):
                ids = self.encode(text[begin : begin + factor * wanted])
                if len(ids) >= tokens:
                    return ids[:tokens]
        raise TextError(
            f"--texts: found no passage of {tokens} tokens; give longer files or shorter "
            "--contexts."
        )

    @cached_property
    def flat(self) -> Texts:
        """The same texts, all white space a single space."""
        return Texts(
            [[" ".join(text.split()) for text in source] for source in self.sources],
            self._tokenizer,
        )

    @cached_property
    def sentences(self) -> dict[str, list[str]]:
        """Sentences of 6 to 30 words, each once, by the words of ``words`` that they hold."""
        known, out = set(self.words[:4000]), defaultdict(list)
        for sentence in dict.fromkeys(
            sentence
            for source in self.flat.sources
            for text in source
            for sentence in re.split(r"(?<=[.!?]) ", text)
            if 5 <= sentence.count(" ") < 30
        ):
            for word in sorted(known.intersection(re.findall(r"\b[a-z]{4,10}\b", sentence))):
                out[word].append(sentence)
        return dict(out)

    @cached_property
    def words(self) -> list[str]:
        """Distinct lower-case words of 4 to 10 letters, the most frequent first."""
        counts: Counter[str] = Counter()
        for source in self.sources:
            for text in source:
                counts.update(re.findall(r"\b[a-z]{4,10}\b", text))
        return [word for word, _ in counts.most_common()]
