"""What is trained on: the same batches after a resume, documents held out, answers told apart, and
what is refused.
"""

from itertools import islice

import pytest
import torch
from transformers import AutoTokenizer

from specontext_vllm.distillation.data import (
    ANSWER,
    TEXT,
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
