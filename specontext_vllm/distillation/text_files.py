"""Training documents out of text files and JSON lines, with a cache of their tokens."""

from __future__ import annotations

import codecs
import hashlib
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from random import Random
from typing import Any

import numpy as np

from specontext_vllm.distillation.encoding import Tokens, as_text, encode, encode_turns
from specontext_vllm.retrieval.checkpoint.whole_file import whole_file

HELD_OUT = 50
"""One document in this many is never trained on."""
PIECE_BYTES = 1 << 17
"""A plain text file is cut into documents of this many bytes, some 32k tokens. Short documents are
made into tokens in groups of this size.
"""
CACHE_FORMAT = 1
"""Part of the cached tokens' names; raise it when the same text gets other tokens."""

ROLES = {
    "system": "system",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
}
"""A turn's speaker in chat data -> in chat templates."""


class DataError(ValueError):
    """Unusable training data; the message is one sentence."""


class Files:
    """Documents out of text files and JSON lines (keys ``text``, ``messages`` or
    ``conversations``).

    The constructor checks every line, so that nothing fails hours later. Text becomes tokens when
    it is first drawn, some 128 KiB at a time; they stay in the cache, which all processes of a run
    share.

    Args:
        cache: folder for the tokens, five bytes each.
    Raises:
        DataError: a file that is missing, empty or of another form; fewer than two documents.
    """

    def __init__(self, paths: Sequence[Path], tokenizer: Any, cache: Path) -> None:
        self.tokenizer, self.paths = tokenizer, list(paths)
        self._rendered: set[tuple[str, ...]] = set()
        found: list[tuple[int, int, int]] = []
        for number, path in enumerate(self.paths):
            if not path.is_file():
                raise DataError(
                    f"--data: {path} is not a file; give text or JSON-lines files, or `synthetic` "
                    "alone."
                )
            before = len(found)
            found += (
                (number, first, size)
                for first, size in (self._lines(path) if _has_lines(path) else _pieces(path))
            )
            if len(found) == before:
                raise DataError(f"--data: {path} is empty; leave it out.")
        # An array, since loader processes would copy a list when they count references.
        self._documents = np.array(found, dtype=np.int64)
        if len(found) < 2:
            raise DataError(
                f"--data: found {len(found)} document in {self.paths[0]}, and one is held out to "
                "measure on; give more (a text file is cut "
                f"into documents of {PIECE_BYTES >> 10} KiB, a JSON line is one)."
            )
        # Of few documents the last one is held out.
        period = min(HELD_OUT, len(found))
        held_out = np.arange(len(found)) % period == period - 1
        self._kinds = {kind: np.flatnonzero(held_out == kind) for kind in (False, True)}
        self._ends = {
            kind: np.cumsum(self._documents[chosen, 2]) for kind, chosen in self._kinds.items()
        }
        self._groups = _groups(self._documents)
        key = _fingerprint(tokenizer)
        self._caches = [
            cache / hashlib.sha256(f"{key} {_identity(path)}".encode()).hexdigest()[:16]
            for path in self.paths
        ]

    def _lines(self, path: Path) -> Iterator[tuple[int, int]]:
        at = 0
        with path.open("rb") as file:
            for number, line in enumerate(file, 1):
                if line.strip():
                    try:
                        self._check(line)
                    except DataError as error:
                        raise DataError(f"--data: {path}, line {number}: {error}") from None
                    yield at, len(line)
                at += len(line)

    def _check(self, line: bytes) -> None:
        turns = _turns(line)
        if turns is None:
            return
        roles = tuple(role for role, _ in turns)
        if roles not in self._rendered:
            # What a template refuses is an order of roles: a system turn, two of one role.
            try:
                as_text(turns, self.tokenizer)
            except Exception as error:  # whatever a template raises
                raise DataError(
                    f"the model's chat template refuses turns by {', '.join(roles)} ({error}); "
                    "correct or drop it."
                ) from None
            self._rendered.add(roles)

    def draw(self, rng: Random, count: int, held_out: bool) -> Tokens:
        """Consecutive documents of a file, from a random one on; a random window of a document that
        is longer than ``count``.
        """
        documents, ends = self._kinds[held_out], self._ends[held_out]
        while True:
            # By bytes, so that a long document is drawn as often as it has windows.
            place = int(np.searchsorted(ends, rng.randrange(int(ends[-1])), side="right"))
            group = int(np.searchsorted(self._groups, documents[place], side="right")) - 1
            stop = int(np.searchsorted(documents, self._groups[group + 1]))
            drawn = self._windows(group, documents[place:stop].tolist(), count, rng)
            if len(drawn[0]):
                return drawn

    def _windows(self, group: int, chosen: list[int], count: int, rng: Random) -> Tokens:
        """``count`` tokens of a group's documents, or all that they have."""
        parts: list[Tokens] = []
        start = self.tokenizer.bos_token_id
        with self._tokens_file(group) as file:
            ids, answers = file.get_slice("ids"), file.get_slice("answers")
            ends = [0, *file.get_tensor("ends").tolist()]
            for document in chosen:
                first, end = ends[document - int(self._groups[group]) :][:2]
                size = min(count, end - first)
                if not size:
                    continue
                # Every token is in equally many windows; windows beyond an end are moved inside,
                # so tokens near the ends are in more.
                at = first + min(max(rng.randrange(1 - size, end - first), 0), end - first - size)
                own = np.array(ids[at : at + size])
                if at > first and int(ids[first : first + 1][0]) == start:
                    # Models attend to the first token when nothing else matters: as in a prompt, it
                    # is the bos token.
                    own[0] = start
                parts.append((own, np.array(answers[at : at + size])))
                count -= size
                if not count:
                    break
        return np.concatenate([own for own, _ in parts] or [np.empty(0, np.int32)]), np.concatenate(
            [flags for _, flags in parts] or [np.empty(0, bool)]
        )

    def _tokens_file(self, group: int) -> Any:
        """The opened file of a group's tokens, made where it is not there or was damaged."""
        from safetensors import SafetensorError, safe_open
        from safetensors.numpy import save

        number, first, _ = self._documents[self._groups[group]].tolist()
        path = self._caches[number] / f"{first}.safetensors"
        try:
            return safe_open(path, "np")
        except (FileNotFoundError, SafetensorError):
            documents = [
                self._encode(*row)
                for row in self._documents[self._groups[group] : self._groups[group + 1]].tolist()
            ]
        tensors = {
            "ids": np.concatenate([ids for ids, _ in documents]),
            "answers": np.concatenate([answers for _, answers in documents]),
            "ends": np.cumsum([len(ids) for ids, _ in documents]),
        }
        path.parent.mkdir(parents=True, exist_ok=True)
        with whole_file(path, contended=True) as part:
            part.write_bytes(save(tensors))
        return safe_open(path, "np")

    def _encode(self, number: int, first: int, size: int) -> Tokens:
        """Tokens of a document."""
        path = self.paths[number]
        with path.open("rb") as file:
            file.seek(first)
            content = file.read(size)
        if not _has_lines(path):
            # A piece may begin or end within a character.
            return encode([(content.decode(errors="ignore"), False)], self.tokenizer, plain=True)
        turns = _turns(content)
        return (
            encode([(json.loads(content)["text"], False)], self.tokenizer, plain=True)
            if turns is None
            else encode_turns(turns, self.tokenizer)
        )


def _groups(documents: np.ndarray) -> np.ndarray:
    """The first document of each group, then the number of documents.

    A group is consecutive ``documents [N, 3]`` of a file, up to 128 KiB together, or one that is
    longer.
    """
    firsts: list[int] = []
    held = 0
    for index, (number, _, size) in enumerate(documents.tolist()):
        held += size
        if not firsts or held > PIECE_BYTES or number != documents[index - 1, 0]:
            firsts.append(index)
            held = size
    return np.array([*firsts, len(documents)])


def _fingerprint(tokenizer: Any) -> str:
    """Hash of everything that decides which tokens a text becomes."""
    template = getattr(tokenizer, "chat_template", None)
    parts = (
        CACHE_FORMAT,
        PIECE_BYTES,
        tokenizer.backend_tokenizer.to_str(),
        template,
        tokenizer.bos_token,
        tokenizer.eos_token,
    )
    return hashlib.sha256(repr(parts).encode()).hexdigest()


def _identity(path: Path) -> str:
    """A name for a file's contents, without reading them."""
    found = path.stat()
    return f"{path.resolve()} {found.st_size} {found.st_mtime_ns}"


def _has_lines(path: Path) -> bool:
    return path.suffix in (".jsonl", ".json", ".ndjson")


def _pieces(path: Path) -> Iterator[tuple[int, int]]:
    """Offsets and sizes of a text file's documents."""
    decoder = codecs.getincrementaldecoder("utf-8")()
    at = 0
    with path.open("rb") as file:
        while piece := file.read(PIECE_BYTES):
            try:
                text = decoder.decode(piece)
            except UnicodeDecodeError:
                text = "\0"
            if "\0" in text:
                raise DataError(
                    f"--data: {path} is not UTF-8 text (near byte {at}); give text, or JSON lines "
                    "in a file called *.jsonl."
                )
            if text.strip():
                yield at, len(piece)
            at += len(piece)


def _check_encodes(key: str, text: str) -> None:
    """JSON can spell what is in no text: one half of a surrogate pair, which no tokenizer takes."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise DataError(
            f"`{key}` has {text[error.start]!a} at character {error.start}, which is half of a "
            "surrogate pair and no text; correct or drop it."
        ) from None


def _turns(line: bytes) -> list[tuple[str, str]] | None:
    """Turns (role, text) of a line of chat data; None if the line is plain ``text``.

    Raises:
        DataError: the line has another form; the sentence does not say which line it is.
    """
    try:
        record = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise DataError(f"not JSON ({error}); give one object a line.") from None
    if not isinstance(record, dict):
        raise DataError(f"found a {type(record).__name__}; give one object a line.")
    if "text" in record:
        if not isinstance(record["text"], str) or not record["text"].strip():
            raise DataError("`text` is empty or no string; correct or drop it.")
        _check_encodes("text", record["text"])
        return None
    for key, speaker, said in (("messages", "role", "content"), ("conversations", "from", "value")):
        if key in record:
            try:
                turns = [(ROLES[turn[speaker]], turn[said]) for turn in record[key]]
            except (KeyError, TypeError) as error:
                raise DataError(
                    f"`{key}` has a turn without {speaker!r} (one of {', '.join(ROLES)}) and "
                    f"{said!r} ({type(error).__name__}: {error}); "
                    "correct or drop it."
                ) from None
            if (
                not turns
                or not all(isinstance(text, str) for _, text in turns)
                or not any(text.strip() for _, text in turns)
            ):
                raise DataError(
                    f"`{key}` has no turns, or turns that are no text; correct or drop it."
                )
            for _, text in turns:
                _check_encodes(key, text)
            return turns
    raise DataError(
        f"found the keys {', '.join(sorted(record)) or 'none'}; give `text`, `messages` or "
        "`conversations`."
    )
