"""Texts and chats that the scripts make for training: nothing of the test texts, right answers."""

from __future__ import annotations

import struct
import zlib
from pathlib import Path
from random import Random

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture
def texts(monkeypatch):
    """The scripts' package."""
    monkeypatch.syspath_prepend(ROOT / "scripts")
    import texts.chats
    import texts.overlap
    import texts.plain

    return texts


@pytest.fixture
def passages(texts):
    from tokenizers import Tokenizer

    novel = ROOT / "specontext_vllm" / "demo" / "smollm2" / "northanger_abbey.txt"
    pages = [path.read_text() for path in sorted((ROOT / "docs").rglob("*.md"))]
    tokenizer = Tokenizer.from_file(str(ROOT / "models" / "demo" / "tokenizer.json"))
    return texts.chats.Passages([novel.read_text()], pages, tokenizer)


def test_no_thirteen_words_of_a_test_text_are_kept(texts):
    words = [f"word{number}" for number in range(40)]
    seen = texts.overlap.Seen([" ".join(words)])
    twelve, thirteen = " ".join(words[5:17]), " ".join(words[5:18])
    text = f"A start {twelve}\n\nWith {thirteen.upper().replace(' ', ', ')}!\n\nThe end."
    assert seen.fresh(text) == f"A start {twelve}\n\nThe end."
    assert (seen.shared, seen.dropped) == (1, 1)


def test_long_paragraphs_are_kept_once_and_short_ones_always(texts):
    seen = texts.overlap.Seen([])
    long = "All rights are granted to everybody who reads this. " * 4
    assert seen.fresh(f"See also\n\n{long}") == f"See also\n\n{long}"
    assert seen.fresh(f"See also\n\n{long}\n\nNew") == "See also\n\nNew"
    assert seen.twice == 1


def test_strings_of_an_r_package_are_read(texts, tmp_path):
    def packed(kind: int, *strings: bytes) -> bytes:
        data = (
            b"X\n"
            + struct.pack(">iii", 2, 0x30603, 0x20300)
            + struct.pack(">ii", kind, len(strings))
        )
        for string in strings:
            data += struct.pack(">ii", 0x40009, len(string)) + string
        return struct.pack(">i", len(data)) + zlib.compress(data)

    # 13: integers, which are no text.
    file = tmp_path / "data.rdb"
    file.write_bytes(packed(16, b"EMMA", b"", "naïve".encode()) + packed(13) + packed(16, b"Two"))
    assert list(texts.plain.read_r_strings(file)) == ["EMMA\n\nnaïve", "Two"]


def test_perl_documentation_loses_its_codes(texts, tmp_path):
    file = tmp_path / "perl.pod"
    file.write_text(
        "=head1 NAME\n\nUse B<C<-w>> and L<the manual|perlrun>, if 1 E<lt> 2.\n\n=cut\n"
    )
    (text,) = texts.plain.read_pod(file)
    assert text.strip() == "NAME\n\nUse -w and the manual, if 1 < 2."


@pytest.mark.parametrize("kind", ["copied_paragraph", "continued", "mentioned"])
def test_what_is_asked_for_stands_in_the_text(texts, passages, kind):
    for seed in range(20):
        rng = Random(seed)
        made = getattr(texts.chats, kind)(passages.draw(rng, 1500), rng)
        if made is None:
            continue
        text, pairs = made
        assert pairs and all(answer in text for _, answer in pairs)


def test_facts_are_put_into_the_text_and_asked_for(texts, passages):
    for seed in range(20):
        rng = Random(seed)
        plain = passages.draw(rng, 1000)
        text, pairs = texts.chats.look_up(plain, rng)
        assert len(text) > len(plain)
        for _, answer in pairs:
            # "QX-4821", or "It is QX-4821.", or "key: QX-4821" for each of several.
            for line in answer.splitlines():
                value = line.rsplit(": ", 1)[-1]
                for start in ("It is ", "The text says ", "The answer is "):
                    value = value.removeprefix(start)
                assert value.rstrip(".") in text


def test_a_chat_is_as_long_as_wanted_and_always_the_same(texts, passages):
    for tokens in (600, 2000, 4000):
        sizes = []
        for seed in range(6):
            messages = texts.chats.make_chat(passages, Random(seed), tokens)
            assert messages == texts.chats.make_chat(passages, Random(seed), tokens)
            roles = [message["role"] for message in messages]
            assert roles == ["user", "assistant"] * (len(roles) // 2)
            sizes.append(sum(passages.size(message["content"]) for message in messages))
        assert 0.6 * tokens < sorted(sizes)[3] < 1.4 * tokens, sizes


def test_a_passage_stands_again(texts, passages):
    for seed in range(10):
        text = texts.chats.make_repeat(passages, Random(seed), 1500)
        last = " ".join(text[-120:].split())
        assert " ".join(text.split()).count(last) >= 2
