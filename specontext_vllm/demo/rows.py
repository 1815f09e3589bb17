"""Training data of the demo model."""

from __future__ import annotations

from random import Random

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset

from specontext_vllm.synthetic import tasks


class Rows(IterableDataset):
    """Endless batches ``(ids [B, T] int16, weights [B, T] uint8 in tenths)`` of rows: one long
    conversation, several short ones packed, or a drill.

    A drill repeats stretches of random words, which teaches copying in general. From sentences of a
    fixed grammar alone the model learns to copy verbs but not nouns.
    """

    def __init__(
        self, ids: dict[str, int], batch: int, length: int, seed: int, drills: float
    ) -> None:
        self.ids, self.batch, self.length, self.seed, self.drills = ids, batch, length, seed, drills
        self.words = np.array(
            [i for piece, i in ids.items() if piece not in tasks.SPECIALS], np.int16
        )

    def drill(self, rng: Random) -> tuple[np.ndarray, np.ndarray]:
        source = np.random.default_rng(rng.getrandbits(63))
        ids = source.choice(self.words, self.length)
        weights = np.full(self.length, 0, np.uint8)
        at = 1
        while at < self.length:
            count = int(source.integers(8, 80))
            again = at + count + int(source.integers(0, 80))
            room = min(count, self.length - again)
            if room > 1:
                ids[again : again + room] = ids[at : at + room]
                # The first word of a repetition cannot be predicted.
                weights[again + 1 : again + room] = 10
            at = again + count
        ids[0] = self.ids[tasks.BOS]
        return ids, weights

    def row(self, rng: Random) -> tuple[np.ndarray, np.ndarray]:
        if rng.random() < self.drills:
            return self.drill(rng)
        ids = np.full(self.length, self.ids[tasks.PAD], np.int16)
        weights = np.zeros(self.length, np.uint8)
        at = 0
        packed = rng.random() < 0.25
        while self.length - at >= 96:
            room = self.length - at
            size = min(room, rng.randint(96, max(96, self.length // 2))) if packed else room
            for text, answer in tasks.training_document(rng, size):
                new = [self.ids[piece] for piece in tasks.pieces(text)][: self.length - at]
                ids[at : at + len(new)] = new
                weights[at : at + len(new)] = 10 if answer else 1
                at += len(new)
            if not packed and self.length - at < 256:
                break
        return ids, weights

    def __iter__(self):
        info = torch.utils.data.get_worker_info()
        worker = info.id if info is not None else 0
        rng = tasks.random_for(self.seed * 1000 + worker, "train")
        while True:
            rows = [self.row(rng) for _ in range(self.batch)]
            yield (
                torch.from_numpy(np.stack([r[0] for r in rows])),
                torch.from_numpy(np.stack([r[1] for r in rows])),
            )


def batches(
    ids: dict[str, int], batch: int, length: int, seed: int, workers: int, drills: float = 0.0
):
    """Iterator of batches made by worker processes."""
    return iter(
        DataLoader(
            Rows(ids, batch, length, seed, drills),
            batch_size=None,
            num_workers=workers,
            prefetch_factor=4,
            pin_memory=torch.cuda.is_available(),
        )
    )


def to_device(batch: tuple[Tensor, Tensor], device: str) -> tuple[Tensor, Tensor]:
    ids, weights = batch
    return ids.to(device, non_blocking=True).long(), weights.to(
        device, non_blocking=True
    ).float() / 10
