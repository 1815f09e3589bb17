"""Training data: packed token sequences out of documents."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from random import Random
from typing import Any, Protocol, cast

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from specontext_vllm.distillation.encoding import Tokens, as_text, encode, encode_turns
from specontext_vllm.distillation.text_files import DataError
from specontext_vllm.synthetic import tasks

ANSWER, TEXT = 1.0, 0.1
"""Weight of a token that answers something asked before, and of any other."""


class Documents(Protocol):
    """Where text comes from."""

    def draw(self, rng: Random, count: int, held_out: bool) -> Tokens:
        """1 to ``count`` tokens, of held-out documents or of the others."""


class Synthetic:
    """Made-up conversations about facts and passages (`specontext_vllm.synthetic`), written in the
    tokenizer's chat format.

    Raises:
        DataError: the format has no place for a question and its answer.
    """

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        words = " ".join(tasks.sentence(Random(0)) for _ in range(64))
        try:
            as_text([("user", words), ("assistant", words)], tokenizer)
        except Exception as error:  # whatever a template raises
            raise DataError(
                f"--data: found synthetic, but the model's chat template refuses a question and "
                f"its answer ({error}); correct the template, or give texts."
            ) from None
        # How many tokens of this tokenizer a piece of those texts takes.
        self._per_piece = len(
            tokenizer(words, add_special_tokens=False, verbose=False)["input_ids"]
        ) / len(tasks.pieces(words))

    def draw(self, rng: Random, count: int, held_out: bool) -> Tokens:
        own = tasks.random_for(rng.getrandbits(62), "held-out" if held_out else "train")
        turns = tasks.training_turns(own, int(count / self._per_piece))
        if turns[0][0] in ("user", "assistant"):
            ids, answers = encode_turns(turns, self.tokenizer)
        else:
            stretches = [
                (f" {text}" if role == "answer" else text, role == "answer") for role, text in turns
            ]
            ids, answers = encode(stretches, self.tokenizer, plain=True)
        return ids[:count], answers[:count]


class Copies:
    """Documents in which passages are written again further down, as in a text that quotes itself.

    What a passage repeats can be read nowhere else, so there a head learns to find things again.
    Documents with answers of their own stay as they are.

    Args:
        documents: where text comes from.
        share: of the documents that are long enough.
        line_break: ids of what stands around a passage.
    """

    MIN_TOKENS = 512
    """Of a document that is changed."""

    def __init__(self, documents: Documents, share: float, line_break: Sequence[int]) -> None:
        self.documents, self.share = documents, share
        self.line_break = np.array(line_break, dtype=np.int32)

    def draw(self, rng: Random, count: int, held_out: bool) -> Tokens:
        """See ``Documents``."""
        ids, answers = self.documents.draw(rng, count, held_out)
        if len(ids) < self.MIN_TOKENS or answers.any() or rng.random() >= self.share:
            return ids, answers
        ids, answers = ids.copy(), answers.copy()
        end, gap = len(ids), len(self.line_break)
        at = rng.randrange(end // 8, end - 100)
        while True:
            size = min(int(rng.lognormvariate(4.6, 0.7)) + 16, end - at - 2 * gap - 24)
            lead = rng.randrange(2, 24)
            latest = at - size - lead
            if size < 16 or latest < 16:
                if end - at < 200:
                    return ids, answers
                at += 100
                continue
            source, words = rng.randrange(1, latest), rng.randrange(end - lead)
            new = [self.line_break, ids[words : words + lead], self.line_break]
            before = np.concatenate([*new, ids[source : source + size]])
            ids[at : at + len(before)] = before
            # Nobody can know where the passage is from before its first tokens stand there.
            known = rng.choice((1, 3, 8))
            answers[at + len(before) - size + known : at + len(before)] = True
            at += len(before) + int(rng.expovariate(1 / 400))
            if end - at < 100:
                return ids, answers


def with_copies(documents: Documents, share: float, tokenizer: Any) -> Documents:
    """The documents, of which a share has ``Copies`` in it; as they are where the share is 0."""
    if not share:
        return documents
    return Copies(documents, share, tokenizer("\n\n", add_special_tokens=False)["input_ids"])


class Sequences(Dataset):
    """Batches of packed sequences. Batch number i is always the same, so that a resumed run trains
    on what it would have trained on.

    Args:
        documents: where text comes from.
        lengths: sequence lengths, taken in turn.
        batch_tokens: tokens of a batch.
        seed: of the whole run.
        shard, shards: this process and how many there are.
        held_out: take the documents that are never trained on.
    """

    def __init__(
        self,
        documents: Documents,
        lengths: Sequence[int],
        batch_tokens: int,
        *,
        seed: int = 0,
        shard: int = 0,
        shards: int = 1,
        held_out: bool = False,
    ) -> None:
        self.documents, self.lengths, self.batch_tokens = documents, list(lengths), batch_tokens
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
        parts: list[Tokens] = []
        while length:
            parts.append(self.documents.draw(rng, length, self.held_out))
            length -= len(parts[-1][0])
        ids, answers = (
            torch.from_numpy(np.concatenate(arrays)) for arrays in zip(*parts, strict=True)
        )
        return ids.long(), torch.where(answers, ANSWER, TEXT)


def sample_positions(
    weights: Tensor,
    count: int,
    generator: torch.Generator,
    first: int = 0,
    *,
    answers_only: bool = True,
) -> tuple[Tensor, Tensor]:
    """``(at [B, S], weight [B, S])``: positions to train or measure on, and their weights.

    Args:
        weights: ``[B, T]`` of the tokens themselves, token 0 left out.
        first: earliest position.
        answers_only: tokens before an answer token are drawn far more often than others; else half
            of the positions are, and the other half lie anywhere.
    """
    # The head drafts a token's successor, and attends to what the successor needs.
    following = torch.roll(weights, -1, 1)
    following[:, -1] = 0.0
    answers = (following >= ANSWER).float()
    chance = answers + 0.02
    if not answers_only:
        share = answers / answers.sum(1, keepdim=True).clamp(min=1)
        chance = share + 1 / weights.shape[1]
    chance[:, :first] = 0.0
    at = torch.multinomial(chance, min(count, weights.shape[1] - first), generator=generator)
    return at, following.gather(1, at).clamp(min=0.02)


Data = Sequences | list[tuple[Tensor, Tensor]]
"""Numbered batches."""


def batches(data: Data, first: int, loaders: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Batches from number ``first`` on, made by ``loaders`` processes, or by this one if 0."""
    loader = DataLoader(
        cast(Dataset, data),
        batch_size=None,
        sampler=range(first, len(data)),
        num_workers=loaders,
        prefetch_factor=4 if loaders else None,
        pin_memory=torch.cuda.is_available(),
    )
    return iter(loader)
