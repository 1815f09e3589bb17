"""Documents out of files, and which files are refused."""

from random import Random

import pytest
import torch
from transformers import AutoTokenizer

from specontext_vllm.distillation.data import (
    TEXT,
    Sequences,
    Synthetic,
)
from specontext_vllm.distillation.text_files import HELD_OUT, PIECE_BYTES, DataError
from tests.distillation.made_texts import WORDS, Counting, files, make_words, text_of, write
from tests.engine.conftest import DEMO_MODEL


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(DEMO_MODEL)


def test_one_document_in_fifty_is_held_out(tmp_path):
    words = make_words(bos=False, eos=None)
    documents = files(
        tmp_path, words, write(tmp_path, "a.jsonl", *({"text": WORDS[i]} for i in range(100)))
    )
    rng = Random(0)
    seen = {
        held: {int(i) for _ in range(120) for i in documents.draw(rng, 10, held)[0]}
        for held in (True, False)
    }
    assert (
        seen[True] == {49, 99}
        and len(seen[False]) == 100 - 100 // HELD_OUT
        and not seen[True] & seen[False]
    )


@pytest.mark.parametrize("bos", [True, False])
def test_every_token_of_a_long_document_is_trained_on_and_none_that_is_held_out(tmp_path, bos):
    """Windows of two lengths, out of a document that no batch could hold."""
    words = make_words(bos)
    start = words.bos_token_id
    path = write(
        tmp_path, "a.jsonl", {"text": " ".join(WORDS[:2000])}, {"text": " ".join(WORDS[2000:2600])}
    )
    sequences = Sequences(files(tmp_path, words, path), [128, 64], 128)
    seen = torch.zeros(len(WORDS), dtype=torch.int64)
    for index in range(200):
        ids, weights = sequences[index]
        assert ids.shape == weights.shape and weights.eq(TEXT).all()
        for row in ids.tolist():
            # One stretch, behind the token that any prompt begins with; where the document ends
            # another one follows.
            first = row.index(words.eos_token_id) if words.eos_token_id in row else len(row)
            assert (row[0] == start) == bos
            assert row[bos:first] == list(range(row[bos], row[bos] + first - bos))
            seen += torch.bincount(
                torch.tensor([i for i in row if i < len(WORDS)]), minlength=len(WORDS)
            )
    assert seen[:2000].min() > 0 and seen[2000:].sum() == 0
    # 25,600 tokens over 2,000: no part is left for seldom.
    assert seen[:2000].min() >= 2 and seen[:2000].max() < 60


def test_a_held_out_document_is_found_however_small_it_is(tmp_path):
    words = Counting(make_words())
    path = tmp_path / "book.txt"
    path.write_text(("w1 " * (2 * PIECE_BYTES // 3)).ljust(2 * PIECE_BYTES) + "w2")
    ids, _ = Sequences(files(tmp_path, words, path), [128], 128, held_out=True)[0]
    assert set(ids.flatten().tolist()) == {2, words.bos_token_id, words.eos_token_id}
    # Nothing else had to become tokens for it.
    assert len(words.texts) == 1


def test_a_long_document_counts_for_as_many_as_its_windows_are(tmp_path):
    words = make_words()
    lines = [{"text": " ".join(WORDS[:1500])}, *({"text": WORDS[1500 + i]} for i in range(300))]
    sequences = Sequences(files(tmp_path, words, write(tmp_path, "a.jsonl", *lines)), [64], 64)
    ids = torch.cat([sequences[i][0].flatten() for i in range(150)])
    assert 0.5 < (ids < 1500).sum() / (ids < len(WORDS)).sum() < 0.95


def test_a_text_becomes_tokens_once(tmp_path):
    words = Counting(make_words())
    path = write(
        tmp_path, "a.jsonl", *({"text": " ".join(WORDS[i * 100 : i * 100 + 90])} for i in range(20))
    )
    sequences = Sequences(files(tmp_path, words, path), [256], 256)
    first = [sequences[i][0] for i in range(20)]
    assert len(words.texts) == len(set(words.texts)) == 20
    # A later run, or another process, finds them.
    later = Sequences(files(tmp_path, words, path), [256], 256)
    assert (
        all(torch.equal(later[i][0], ids) for i, ids in enumerate(first)) and len(words.texts) == 20
    )
    assert not list(tmp_path.rglob("*.part"))


@pytest.mark.parametrize("kept", [0, 40, -1], ids=["empty", "header", "cut"])
def test_a_damaged_file_of_tokens_is_made_anew(tmp_path, kept):
    words = make_words()
    path = write(tmp_path, "a.jsonl", *({"text": " ".join(WORDS[:90])} for _ in range(3)))
    before = files(tmp_path, words, path).draw(Random(0), 200, False)
    (made,) = tmp_path.rglob("*.safetensors")
    whole = made.read_bytes()
    made.write_bytes(whole[:kept])
    after = files(tmp_path, words, path).draw(Random(0), 200, False)
    assert all((a == b).all() for a, b in zip(before, after, strict=True))
    assert made.read_bytes() == whole


def test_tokens_of_another_text_or_tokenizer_are_not_taken_for_these(tmp_path):
    path = write(tmp_path, "a.jsonl", {"text": WORDS[0]}, {"text": WORDS[1]})
    assert text_of(files(tmp_path, make_words(), path), make_words(), 0) == WORDS[0]
    with_none = files(tmp_path, make_words(bos=False, eos=None), path).draw(Random(0), 9, False)[0]
    assert with_none.tolist() == [0]
    write(tmp_path, "a.jsonl", {"text": WORDS[7]}, {"text": WORDS[1]}, {"text": WORDS[2]})
    assert text_of(files(tmp_path, make_words(), path), make_words(), 0) in (
        WORDS[7],
        WORDS[1],
        f"{WORDS[7]} {WORDS[1]}",
    )


def test_all_forms_of_files_are_read(tmp_path, tokenizer):
    chat = write(
        tmp_path,
        "chat.jsonl",
        {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho"}]},
        {"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Ho"}]},
    )
    text = tmp_path / "book.txt"
    # Pieces cut characters of three bytes apart.
    text.write_text("€" * 1000, encoding="utf-8")
    documents = files(tmp_path, tokenizer, chat, text)
    found = {text_of(documents, tokenizer, seed) for seed in range(200)}
    assert any("Hi" in t and "Ho" in t for t in found)
    # The book, the last document, is held out.
    assert text_of(documents, tokenizer, 0, held_out=True) == "€" * 1000


def test_pieces_of_a_text_file_lose_no_whole_character(tmp_path, tokenizer):
    text = tmp_path / "book.txt"
    text.write_text("€" * (PIECE_BYTES // 2), encoding="utf-8")
    documents = files(tmp_path, tokenizer, text)
    pieces = [
        text_of(documents, tokenizer, 0, count=1 << 20, held_out=held) for held in (False, True)
    ]
    # One is cut apart by the border.
    assert {len(piece) for piece in pieces} == {
        PIECE_BYTES // 3,
        PIECE_BYTES // 2 - PIECE_BYTES // 3 - 1,
    } and set("".join(pieces)) == {"€"}


CHAT = {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho"}]}

BAD = {
    "empty": ("a.jsonl", b"", "is empty"),
    "empty-text": ("a.txt", b"", "is empty"),
    "not-json": ("a.jsonl", b'{"text": "x"}\n{"text": \n', "line 2: not JSON"),
    "array": ("a.json", b'["x"]', "line 1: found a list"),
    "keys": (
        "a.jsonl",
        b'{"text": "x"}\n\n{"prompt": 1, "answer": 2}\n',
        "line 3: found the keys answer, prompt",
    ),
    "text-is-no-string": ("a.jsonl", b'{"text": ["x"]}\n', "line 1: `text`"),
    "no-turns": ("a.jsonl", b'{"messages": []}\n', "line 1: `messages`"),
    "turn-without-role": (
        "a.jsonl",
        b'{"messages": [{"content": "x"}]}\n',
        "line 1: `messages` has a turn without 'role'",
    ),
    "unknown-role": (
        "a.jsonl",
        b'{"conversations": [{"from": "tool", "value": "x"}]}\n',
        "line 1: `conversations`",
    ),
    "content-parts": (
        "a.jsonl",
        b'{"messages": [{"role": "user", "content": [{"type": "text"}]}]}\n',
        "turns that are no text",
    ),
    "nested-too-deep": ("a.jsonl", b'{"text": ' + b"[" * 100_000 + b"\n", "line 1: not JSON"),
    "half-a-surrogate-pair": (
        "a.jsonl",
        b'{"text": "x"}\n{"text": "a \\ud800 b"}\n',
        "line 2: `text` has '\\ud800' at character 2",
    ),
    "half-a-surrogate-pair-said": (
        "a.jsonl",
        b'{"messages": [{"role": "user", "content": "\\udfff"}]}\n',
        "line 1: `messages` has '\\udfff' at character 0",
    ),
    "binary": ("a.txt", bytes(range(256)), "not UTF-8 text"),
    "binary-lines": ("a.jsonl", b"\xff\xfe\x00\x01\n", "line 1: not JSON"),
    "one-document": ("a.txt", b"words", "found 1 document"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_files_are_refused_before_training(tmp_path, tokenizer, name):
    file, content, why = BAD[name]
    (tmp_path / file).write_bytes(content)
    with pytest.raises(DataError) as caught:
        files(tmp_path, tokenizer, tmp_path / file)
    assert str(caught.value).startswith("--data: ") and why in str(caught.value)


def test_a_missing_file_is_refused(tmp_path, tokenizer):
    with pytest.raises(DataError, match="is not a file"):
        files(tmp_path, tokenizer, tmp_path / "none.jsonl")


def test_turns_that_the_template_refuses_are_refused(tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(DEMO_MODEL)
    refusal = (
        "{% if messages[0].role == 'system' %}{{ raise_exception('no system turn') }}{% endif %}"
    )
    tokenizer.chat_template = refusal + tokenizer.chat_template
    path = write(
        tmp_path,
        "a.jsonl",
        CHAT,
        {"messages": [{"role": "system", "content": "Be kind."}, *CHAT["messages"]]},
    )
    with pytest.raises(
        DataError,
        match="line 2: the model's chat template refuses turns by system, user, assistant",
    ):
        files(tmp_path, tokenizer, path)


def test_made_up_conversations_that_the_template_refuses_are_refused():
    tokenizer = AutoTokenizer.from_pretrained(DEMO_MODEL)
    tokenizer.chat_template = "{{ raise_exception('no answers') }}"
    with pytest.raises(
        DataError, match=r"^--data: found synthetic, but .* refuses .* \(no answers\); "
    ):
        Synthetic(tokenizer)
