"""What is trained on: the same batches after a resume, documents held out, answers told apart, and what is refused."""

import json
from itertools import islice
from random import Random

import pytest
import torch
from transformers import AutoTokenizer

from specontext_vllm.distillation.data import (
    ANSWER,
    HELD_OUT,
    PIECE_BYTES,
    TEXT,
    DataError,
    Files,
    Sequences,
    Synthetic,
    as_text,
    batches,
    sample_positions,
)
from tests.engine.conftest import DEMO_MODEL


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(DEMO_MODEL)


def write(folder, name, *records):
    path = folder / name
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def test_batch_i_is_always_the_same_and_shards_differ(tokenizer):
    own = dict(documents=Synthetic(tokenizer), tokenizer=tokenizer, lengths=[256, 128], batch_tokens=256)
    stream = [ids for ids, _ in islice(batches(Sequences(**own), 0, workers=0), 5)]
    later = [ids for ids, _ in islice(batches(Sequences(**own), 3, workers=1), 2)]
    assert [tuple(ids.shape) for ids in stream[:2]] == [(1, 256), (2, 128)]
    assert torch.equal(stream[3], later[0]) and torch.equal(stream[4], later[1])
    other = Sequences(**own, shard=1, shards=2)[0][0]
    held = Sequences(**own, held_out=True)[0][0]
    assert not torch.equal(stream[0], other) and not torch.equal(stream[0], held)
    # Two shards see together what one would see alone.
    assert torch.equal(Sequences(**own, shard=0, shards=2)[2][0].flatten()[:128], stream[4].flatten()[:128])


def test_answers_are_the_assistants_words(tokenizer):
    ids, weights = Sequences(Synthetic(tokenizer), tokenizer, [1024], 1024)[3]
    texts = tokenizer.decode(ids[0][weights[0] == ANSWER])
    assert set(weights.unique().tolist()) <= {float(torch.tensor(TEXT)), ANSWER}
    assert 0 < (weights == ANSWER).float().mean() < 0.7 and tokenizer.eos_token in texts


def test_chat_turns_are_rendered_once_and_answers_found(tokenizer):
    turns = [("user", "Hello"), ("assistant", " Hello "), ("user", "Hello"), ("assistant", "Bye")]
    stretches = as_text(turns, tokenizer)
    assert "".join(text for text, _ in stretches) == tokenizer.apply_chat_template(
        [{"role": r, "content": t} for r, t in turns], tokenize=False
    )
    assert [text.removesuffix(tokenizer.eos_token).strip() for text, answer in stretches if answer] == ["Hello", "Bye"]


def test_one_document_in_fifty_is_held_out(tmp_path, tokenizer):
    documents = Files([write(tmp_path, "a.jsonl", *({"text": f"{i}"} for i in range(100)))], tokenizer)
    rng = Random(0)
    seen = {held: {documents.document(rng, 10, held)[0][0] for _ in range(2000)} for held in (True, False)}
    assert seen[True] == {"49", "99"} and len(seen[False]) == 100 - 100 // HELD_OUT and not seen[True] & seen[False]


def test_all_forms_of_files_are_read(tmp_path, tokenizer):
    chat = write(
        tmp_path, "chat.jsonl", {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho"}]},
        {"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Ho"}]},
    )  # fmt: skip
    text = tmp_path / "book.txt"
    # Pieces cut characters of three bytes apart.
    text.write_text("€" * (PIECE_BYTES // 2), encoding="utf-8")
    documents = Files([chat, text], tokenizer)
    found = {"".join(t for t, _ in documents.document(Random(i), 10, False))[:200] for i in range(60)}
    assert any("Hi" in t and "Ho" in t for t in found) and any(t.startswith("€") for t in found)


CHAT = {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho"}]}
BAD = {
    "empty": ("a.jsonl", b"", "is empty"),
    "empty-text": ("a.txt", b"", "is empty"),
    "not-json": ("a.jsonl", b'{"text": "x"}\n{"text": \n', "line 2: not JSON"),
    "array": ("a.json", b'["x"]', "line 1: found a list"),
    "keys": ("a.jsonl", b'{"text": "x"}\n\n{"prompt": 1, "answer": 2}\n', "line 3: found the keys answer, prompt"),
    "text-is-no-string": ("a.jsonl", b'{"text": ["x"]}\n', "line 1: `text`"),
    "no-turns": ("a.jsonl", b'{"messages": []}\n', "line 1: `messages`"),
    "turn-without-role": ("a.jsonl", b'{"messages": [{"content": "x"}]}\n', "line 1: `messages` has a turn without 'role'"),
    "unknown-role": ("a.jsonl", b'{"conversations": [{"from": "tool", "value": "x"}]}\n', "line 1: `conversations`"),
    "content-parts": ("a.jsonl", b'{"messages": [{"role": "user", "content": [{"type": "text"}]}]}\n', "turns that are no text"),
    "binary": ("a.txt", bytes(range(256)), "not UTF-8 text"),
    "binary-lines": ("a.jsonl", b"\xff\xfe\x00\x01\n", "line 1: not JSON"),
    "one-document": ("a.txt", b"words", "found 1 document"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_files_are_refused_before_training(tmp_path, tokenizer, name):
    file, content, why = BAD[name]
    (tmp_path / file).write_bytes(content)
    with pytest.raises(DataError) as caught:
        Files([tmp_path / file], tokenizer)
    assert str(caught.value).startswith("--data: ") and why in str(caught.value)


def test_a_missing_file_is_refused(tmp_path, tokenizer):
    with pytest.raises(DataError, match="is not a file"):
        Files([tmp_path / "none.jsonl"], tokenizer)


def test_turns_that_the_template_refuses_are_refused(tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(DEMO_MODEL)
    refusal = "{% if messages[0].role == 'system' %}{{ raise_exception('no system turn') }}{% endif %}"
    tokenizer.chat_template = refusal + tokenizer.chat_template
    path = write(tmp_path, "a.jsonl", CHAT, {"messages": [{"role": "system", "content": "Be kind."}, *CHAT["messages"]]})
    with pytest.raises(DataError, match="line 2: the model's chat template refuses turns by system, user, assistant"):
        Files([path], tokenizer)


def test_positions_prefer_answers_and_keep_off_the_beginning():
    weights = torch.full((1, 400), TEXT)
    weights[:, 300:320] = ANSWER
    at, following = sample_positions(weights, 20, torch.Generator().manual_seed(0), first=100)
    assert at.min() >= 100 and len(at.unique()) == 20
    assert ((at >= 299) & (at < 319)).float().mean() > 0.5
    assert torch.equal(following, weights[0, at + 1])
