"""What is trained on: packed token sequences out of files, or made up."""

from __future__ import annotations

import codecs
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from random import Random
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from specontext_vllm.demo import tasks

ANSWER, TEXT = 1.0, 0.1
"""Weight of a token that answers something asked before, and of any other."""
HELD_OUT = 50
"""One document in so many is never trained on."""
PIECE_BYTES = 1 << 17
"""A plain text file is cut into documents of so many bytes, some 32k tokens."""
ROLES = {"system": "system", "user": "user", "human": "user", "assistant": "assistant", "gpt": "assistant"}
"""Names of a turn's speaker in chat data -> in chat templates."""


class DataError(ValueError):
    """Unusable training data; the message is one sentence."""


class Documents(Protocol):
    """Where text comes from: ``document(rng, tokens, held_out)`` gives stretches of it and whether each answers what was asked."""

    def document(self, rng: Random, tokens: int, held_out: bool) -> list[tuple[str, bool]]: ...


def as_text(turns: Sequence[tuple[str, str]], tokenizer: Any) -> list[tuple[str, bool]]:
    """Chat turns (role, text) in the tokenizer's own chat format, the assistant's as answers; plain text without one."""
    if getattr(tokenizer, "chat_template", None) is None:
        return [(f"\n\n{text}" if i else text, role == "assistant") for i, (role, text) in enumerate(turns)]
    whole = tokenizer.apply_chat_template([{"role": role, "content": text} for role, text in turns], tokenize=False)
    # Templates trim what is said and wrap it in markers of their own, so each turn is looked for where the one before ended.
    stretches: list[tuple[str, bool]] = []
    done = at = 0
    for role, text in turns:
        first = whole.find(text.strip(), at)
        if first < 0:
            continue
        at = first + len(text.strip())
        if role == "assistant":
            if tokenizer.eos_token and whole.startswith(tokenizer.eos_token, at):
                at += len(tokenizer.eos_token)
            stretches += [(whole[done:first], False), (whole[first:at], True)]
            done = at
    return [*stretches, (whole[done:], False)]


class Synthetic:
    """Facts and passages that are asked for, in the layouts of the demo's tasks, written in the tokenizer's chat format."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        words = " ".join(tasks.sentence(Random(0)) for _ in range(64))
        # Tokens that a piece of the demo's grammar takes in this tokenizer.
        self._per_piece = len(tokenizer(words, add_special_tokens=False)["input_ids"]) / len(tasks.pieces(words))

    def document(self, rng: Random, tokens: int, held_out: bool) -> list[tuple[str, bool]]:
        own = tasks.random_for(rng.getrandbits(62), "held-out" if held_out else "train")
        turns = tasks.training_turns(own, int(tokens / self._per_piece))
        if turns[0][0] in ("user", "assistant"):
            return as_text(turns, self.tokenizer)
        return [(f" {text}" if role == "answer" else text, role == "answer") for role, text in turns]


class Files:
    """Documents out of text files and of JSON lines (keys ``text``, ``messages`` or ``conversations``), found by their offsets.

    Every line is looked at once, here, so that nothing can fail hours later.

    Raises:
        DataError: a file that is missing, empty or of another form; fewer than two documents.
    """

    def __init__(self, paths: Sequence[Path], tokenizer: Any) -> None:
        self.tokenizer, self.paths = tokenizer, list(paths)
        self._rendered: set[tuple[str, ...]] = set()
        found: list[tuple[int, int, int]] = []
        for number, path in enumerate(self.paths):
            if not path.is_file():
                raise DataError(f"--data: {path} is not a file; give text or JSON-lines files, or `synthetic`.")
            before = len(found)
            found += ((number, first, size) for first, size in (self._lines(path) if _has_lines(path) else _pieces(path)))
            if len(found) == before:
                raise DataError(f"--data: {path} is empty; leave it out.")
        # Worker processes share an array; a list they would copy, reference count by reference count.
        self._documents = np.array(found, dtype=np.int64)
        if len(found) < 2:
            raise DataError(
                f"--data: found {len(found)} document in {self.paths[0]}, and one is held out to measure on; give more (a text file is cut "
                f"into documents of {PIECE_BYTES >> 10} KiB, a JSON line is one)."
            )

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
            # Templates refuse by the order of roles (no system turn, turns that do not alternate).
            try:
                as_text(turns, self.tokenizer)
            except Exception as error:  # whatever a template raises
                raise DataError(f"the model's chat template refuses turns by {', '.join(roles)} ({error}); mend or drop it.") from None
            self._rendered.add(roles)

    def document(self, rng: Random, tokens: int, held_out: bool) -> list[tuple[str, bool]]:
        # With few documents the last one is held out.
        period = min(HELD_OUT, len(self._documents))
        while True:
            index = rng.randrange(len(self._documents))
            if (index % period == period - 1) == held_out:
                break
        number, first, size = self._documents[index].tolist()
        path = self.paths[number]
        with path.open("rb") as file:
            file.seek(first)
            content = file.read(size)
        if not _has_lines(path):
            # A piece may begin or end inside a character.
            return [(content.decode(errors="ignore"), False)]
        turns = _turns(content)
        return [(json.loads(content)["text"], False)] if turns is None else as_text(turns, self.tokenizer)


def _has_lines(path: Path) -> bool:
    return path.suffix in (".jsonl", ".json", ".ndjson")


def _pieces(path: Path) -> Iterator[tuple[int, int]]:
    """Where the documents of a text file begin, and their sizes."""
    decoder = codecs.getincrementaldecoder("utf-8")()
    at = 0
    with path.open("rb") as file:
        while piece := file.read(PIECE_BYTES):
            try:
                text = decoder.decode(piece)
            except UnicodeDecodeError:
                text = "\0"
            if "\0" in text:
                raise DataError(f"--data: {path} is not UTF-8 text (near byte {at}); give text, or JSON lines in a file called *.jsonl.")
            if text.strip():
                yield at, len(piece)
            at += len(piece)


def _turns(line: bytes) -> list[tuple[str, str]] | None:
    """Turns (role, text) of a line of chat data; None where the line is plain ``text``.

    Raises:
        DataError: another form; the sentence does not say which line.
    """
    try:
        record = json.loads(line)
    except ValueError as error:
        raise DataError(f"not JSON ({error}); give one object a line.") from None
    if not isinstance(record, dict):
        raise DataError(f"found a {type(record).__name__}; give one object a line.")
    if "text" in record:
        if not isinstance(record["text"], str) or not record["text"].strip():
            raise DataError("`text` is empty or no string; mend or drop it.")
        return None
    for key, speaker, said in (("messages", "role", "content"), ("conversations", "from", "value")):
        if key in record:
            try:
                turns = [(ROLES[turn[speaker]], turn[said]) for turn in record[key]]
            except (KeyError, TypeError) as error:
                raise DataError(
                    f"`{key}` has a turn without {speaker!r} (one of {', '.join(ROLES)}) and {said!r} ({type(error).__name__}: {error}); "
                    "mend or drop it."
                ) from None
            if not turns or not all(isinstance(text, str) for _, text in turns) or not any(text.strip() for _, text in turns):
                raise DataError(f"`{key}` has no turns, or turns that are no text; mend or drop it.")
            return turns
    raise DataError(f"found the keys {', '.join(sorted(record)) or 'none'}; give `text`, `messages` or `conversations`.")


class Sequences(Dataset):
    """Batches of packed sequences; batch number i is always the same, so that a resumed run goes on where it stopped.

    Args:
        documents: where text comes from.
        tokenizer: of the target, a fast one.
        lengths: sequence lengths, taken in turn.
        batch_tokens: tokens of a batch.
        seed: of the whole run.
        shard, shards: this process and how many there are.
        held_out: give documents that are never trained on.
    """

    def __init__(
        self, documents: Documents, tokenizer: Any, lengths: Sequence[int], batch_tokens: int, *, seed: int = 0, shard: int = 0,
        shards: int = 1, held_out: bool = False,
    ) -> None:  # fmt: skip
        self.documents, self.tokenizer, self.lengths, self.batch_tokens = documents, tokenizer, list(lengths), batch_tokens
        self.seed, self.shard, self.shards, self.held_out = seed, shard, shards, held_out

    def __len__(self) -> int:
        return 1 << 40

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        """``(ids [B, T] int64, weights [B, T])``."""
        length = self.lengths[index % len(self.lengths)]
        rng = Random(f"{self.seed}/{self.held_out}/{index * self.shards + self.shard}")
        rows = [self._row(rng, length) for _ in range(max(1, self.batch_tokens // length))]
        return torch.stack([ids for ids, _ in rows]), torch.stack([weights for _, weights in rows])

    def _row(self, rng: Random, length: int) -> tuple[Tensor, Tensor]:
        start = self.tokenizer.bos_token_id
        ids: list[int] = []
        weights: list[float] = []
        while len(ids) < length:
            new, own = self._encode(self.documents.document(rng, length - len(ids), self.held_out))
            if start is not None and (not new or new[0] != start):
                new, own = [start, *new], [TEXT, *own]
            ids += new
            weights += own
            if self.tokenizer.eos_token_id is not None and ids[-1] != self.tokenizer.eos_token_id:
                ids.append(self.tokenizer.eos_token_id)
                weights.append(TEXT)
        return torch.tensor(ids[:length]), torch.tensor(weights[:length])

    def _encode(self, stretches: list[tuple[str, bool]]) -> tuple[list[int], list[float]]:
        text = "".join(part for part, _ in stretches)
        encoded = self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        ends, at = [], 0
        for part, answer in stretches:
            at += len(part)
            ends.append((at, ANSWER if answer else TEXT))
        weights, stretch = [], 0
        for first, _ in encoded["offset_mapping"]:
            while stretch < len(ends) - 1 and first >= ends[stretch][0]:
                stretch += 1
            weights.append(ends[stretch][1])
        return encoded["input_ids"], weights


def sample_positions(weights: Tensor, count: int, generator: torch.Generator, first: int = 0) -> tuple[Tensor, Tensor]:
    """``(at [B, S], weight [B, S])``: tokens to look at, those before an answer token far more often.

    Args:
        weights: ``[B, T]`` of the tokens themselves, token 0 left out. first: earliest position.
    """
    # A token's pair drafts its successor, and its attention finds what the successor needs.
    following = torch.roll(weights, -1, 1)
    following[:, -1] = 0.0
    chance = (following >= ANSWER).float() + 0.02
    chance[:, :first] = 0.0
    at = torch.multinomial(chance, min(count, weights.shape[1] - first), generator=generator)
    return at, following.gather(1, at).clamp(min=0.02)


def batches(sequences: Sequences, first: int, workers: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Batches from number ``first`` on, made by worker processes."""
    loader = DataLoader(
        sequences, batch_size=None, sampler=range(first, len(sequences)), num_workers=workers, prefetch_factor=4 if workers else None,
        pin_memory=torch.cuda.is_available(),
    )  # fmt: skip
    return iter(loader)
