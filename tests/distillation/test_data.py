"""What is trained on: the same batches after a resume, documents held out, answers told apart, and
what is refused.
"""

from itertools import islice
from random import Random

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer

from specontext_vllm.distillation.data import (
    ANSWER,
    TEXT,
    Copies,
    Sequences,
    Synthetic,
    batches,
    sample_positions,
)
from tests.distillation.made_texts import WORDS, files, make_words, write
from tests.engine.conftest import DEMO_MODEL


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(DEMO_MODEL)


def test_batch_i_is_always_the_same_and_shards_differ(tokenizer):
    own = dict(documents=Synthetic(tokenizer), lengths=[256, 128], batch_tokens=256)
    stream = [ids for ids, _ in islice(batches(Sequences(**own), 0, loaders=0), 5)]
    later = [ids for ids, _ in islice(batches(Sequences(**own), 3, loaders=1), 2)]
    assert [tuple(ids.shape) for ids in stream[:2]] == [(1, 256), (2, 128)]
    assert torch.equal(stream[3], later[0]) and torch.equal(stream[4], later[1])
    other = Sequences(**own, shard=1, shards=2)[0][0]
    held = Sequences(**own, held_out=True)[0][0]
    assert not torch.equal(stream[0], other) and not torch.equal(stream[0], held)
    # Two shards see together what one would see alone.
    assert torch.equal(
        Sequences(**own, shard=0, shards=2)[2][0].flatten()[:128], stream[4].flatten()[:128]
    )


def test_batches_from_files_depend_on_their_number_alone(tmp_path):
    """Whatever is in the cache, and whoever makes them."""
    words = make_words()
    lines = [{"text": " ".join(WORDS[i : i + 700])} for i in range(0, 2000, 100)]
    paths = write(tmp_path, "a.jsonl", *lines), tmp_path / "b.txt"
    paths[1].write_text(" ".join(WORDS * 10))
    own = dict(lengths=[256, 128], batch_tokens=256)
    stream = [
        ids
        for ids, _ in islice(
            batches(Sequences(files(tmp_path / "one", words, *paths), **own), 0, loaders=0), 12
        )
    ]
    cold = [
        ids
        for ids, _ in islice(
            batches(Sequences(files(tmp_path / "two", words, *paths), **own), 8, loaders=2), 4
        )
    ]
    warm = [
        ids
        for ids, _ in islice(
            batches(Sequences(files(tmp_path / "one", words, *paths), **own), 8, loaders=2), 4
        )
    ]
    assert all(
        torch.equal(a, b) and torch.equal(a, c)
        for a, b, c in zip(stream[8:], cold, warm, strict=True)
    )
    assert len({tuple(ids.flatten().tolist()) for ids in stream}) == len(stream)


def test_positions_prefer_answers_and_keep_off_the_beginning():
    weights = torch.full((1, 400), TEXT)
    weights[:, 300:320] = ANSWER
    at, following = sample_positions(weights, 20, torch.Generator().manual_seed(0), first=100)
    assert at.min() >= 100 and len(at.unique()) == 20
    assert ((at >= 299) & (at < 319)).float().mean() > 0.5
    assert torch.equal(following, weights[0, at + 1])


class Counting:
    """A document of ascending ids, which tell where a token is from."""

    def __init__(self, length, answers=False):
        self.length, self.answers = length, answers

    def draw(self, rng, count, held_out):
        ids = np.arange(1000, 1000 + min(count, self.length), dtype=np.int32)
        return ids, np.full(len(ids), self.answers)


@pytest.mark.parametrize("seed", range(20))
def test_copies_stand_further_down_than_what_they_copy(seed):
    ids, answers = Copies(Counting(4000), 1.0, [7, 7]).draw(Random(seed), 4000, False)
    assert len(ids) == len(answers) == 4000 and answers.any()
    copied = np.flatnonzero(answers)
    # What is marked follows from what stands further up: the token before it and the token itself
    # stand there side by side.
    for place in copied:
        pairs = zip(ids[: place - 1], ids[1:place], strict=True)
        assert (ids[place - 1], ids[place]) in set(pairs)
    kept = ids == np.arange(1000, 5000)
    assert 0.05 < kept.mean() < 1.0 and not answers[kept].any()


def test_copies_leave_answers_and_short_documents_alone():
    for documents in (Counting(4000, answers=True), Counting(Copies.MIN_TOKENS - 1)):
        ids, _ = Copies(documents, 1.0, [7]).draw(Random(0), 4000, False)
        assert (ids == 1000 + np.arange(len(ids))).all()
    untouched = sum(
        bool((Copies(Counting(4000), 0.5, [7]).draw(Random(s), 4000, False)[0] >= 1000).all())
        for s in range(200)
    )
    assert 70 < untouched < 130


def test_half_of_the_positions_lie_anywhere():
    weights = torch.full((1, 4000), TEXT)
    weights[:, 1000:1040] = ANSWER
    generator = torch.Generator().manual_seed(0)
    at, _ = sample_positions(weights, 60, generator, answers_only=False)
    before_answers = ((at >= 999) & (at < 1039)).float().mean()
    assert 0.3 < before_answers < 0.7
