"""What is trained on: packed token sequences out of files, or made up."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from random import Random
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from specontext_vllm.demo import tasks

ANSWER, TEXT = 1.0, 0.1
"""Weight of a token that answers something asked before, and of any other."""
HELD_OUT = 50
"""One document in so many is never trained on."""
CHARACTERS = 1 << 16
"""A plain text file is cut into documents of so many bytes."""


class DataError(ValueError):
    """Unusable training data; the message is one sentence."""


class Documents(Protocol):
    """Where text comes from: ``document(rng, tokens, held_out)`` gives stretches of text and whether each answers what was asked."""

    def document(self, rng: Random, tokens: int, held_out: bool) -> list[tuple[str, bool]]: ...


def as_text(turns: Sequence[tuple[str, str]], tokenizer: Any) -> list[tuple[str, bool]]:
    """Chat turns (role, text) in the tokenizer's own chat format, the assistant's as answers; plain text without one."""
    if getattr(tokenizer, "chat_template", None) is None:
        return [(f"\n\n{text}" if i else text, role == "assistant") for i, (role, text) in enumerate(turns)]
    messages = [{"role": role, "content": text} for role, text in turns]
    # The template may end every message with more than its text, so each answer's stretch is found between two renderings.
    stretches: list[tuple[str, bool]] = []
    done = ""
    for i, (role, _) in enumerate(turns):
        if role != "assistant":
            continue
        asked = tokenizer.apply_chat_template(messages[:i], tokenize=False, add_generation_prompt=True)
        answered = tokenizer.apply_chat_template(messages[: i + 1], tokenize=False)
        if not (asked.startswith(done) and answered.startswith(asked)):
            # A template that rewrites earlier turns: the last rendering counts, without telling answers apart.
            return [(tokenizer.apply_chat_template(messages, tokenize=False), False)]
        stretches += [(asked[len(done) :], False), (answered[len(asked) :], True)]
        done = answered
    return stretches or [(tokenizer.apply_chat_template(messages, tokenize=False), False)]


class Synthetic:
    """Facts and passages that are asked for, in the layouts of the demo's tasks, written in the tokenizer's chat format."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        words = " ".join(tasks.sentence(Random(0)) for _ in range(64))
        # Tokens that a piece of the demo's grammar takes in this tokenizer.
        self._per_piece = len(tokenizer(words, add_special_tokens=False)["input_ids"]) / len(tasks.pieces(words))

    def document(self, rng: Random, tokens: int, held_out: bool) -> list[tuple[str, bool]]:
        turns = tasks.training_turns(tasks.random_for(rng.getrandbits(62), "held-out" if held_out else "train"), int(tokens / self._per_piece))
        if turns[0][0] in ("user", "assistant"):
            return as_text(turns, self.tokenizer)
        return [(f" {text}" if role == "answer" else text, role == "answer") for role, text in turns]


class Files:
    """Documents out of text files and of JSON lines (keys ``text``, ``messages`` or ``conversations``), found by their offsets.

    Raises:
        DataError: a file that is missing, empty or has lines of another form.
    """

    def __init__(self, paths: Sequence[Path], tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self._documents: list[tuple[Path, int, int]] = []
        for path in paths:
            if not path.is_file():
                raise DataError(f"--data: {path} is not a file; give text or JSON-lines files, or `synthetic`.")
            self._documents += self._json_lines(path) if path.suffix in (".jsonl", ".json") else self._text(path)
        if len(self._documents) < 2:
            raise DataError(f"--data: found {len(self._documents)} documents; at least two are needed, since one in {HELD_OUT} is held out.")

    @staticmethod
    def _text(path: Path) -> Iterator[tuple[Path, int, int]]:
        size = path.stat().st_size
        for first in range(0, size, CHARACTERS):
            yield path, first, min(CHARACTERS, size - first)

    def _json_lines(self, path: Path) -> Iterator[tuple[Path, int, int]]:
        at = 0
        with path.open("rb") as file:
            for number, line in enumerate(file):
                if line.strip():
                    if number == 0:
                        self._parse(line, path)
                    yield path, at, len(line)
                at += len(line)

    def _parse(self, line: bytes, path: Path) -> list[tuple[str, bool]]:
        try:
            record = json.loads(line)
            if "text" in record:
                return [(record["text"], False)]
            if "messages" in record:
                return as_text([(m["role"], m["content"]) for m in record["messages"]], self.tokenizer)
            if "conversations" in record:
                roles = {"human": "user", "gpt": "assistant", "user": "user", "assistant": "assistant", "system": "system"}
                return as_text([(roles[m["from"]], m["value"]) for m in record["conversations"]], self.tokenizer)
        except (ValueError, TypeError, KeyError) as error:
            raise DataError(f"--data: {path} has a line that cannot be read ({type(error).__name__}: {error}); mend or drop it.") from None
        raise DataError(f"--data: {path} has a line with the keys {sorted(record)}; give `text`, `messages` or `conversations`.")

    def document(self, rng: Random, tokens: int, held_out: bool) -> list[tuple[str, bool]]:
        # With few documents the last one is held out.
        period = min(HELD_OUT, len(self._documents))
        while True:
            index = rng.randrange(len(self._documents))
            if (index % period == period - 1) == held_out:
                break
        path, first, size = self._documents[index]
        with path.open("rb") as file:
            file.seek(first)
            content = file.read(size)
        return self._parse(content, path) if path.suffix in (".jsonl", ".json") else [(content.decode(errors="ignore"), False)]


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


def batches(sequences: Sequences, first: int, workers: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Batches from number ``first`` on, made by worker processes."""
    loader = DataLoader(
        sequences, batch_size=None, sampler=range(first, len(sequences)), num_workers=workers, prefetch_factor=4 if workers else None,
        pin_memory=torch.cuda.is_available(),
    )  # fmt: skip
    return iter(loader)
