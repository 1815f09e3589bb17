"""Texts and turns as tokens."""

import logging
from random import Random

import pytest
import torch
from transformers import AutoTokenizer

from specontext_vllm.distillation.data import (
    ANSWER,
    TEXT,
    Sequences,
    Synthetic,
)
from specontext_vllm.distillation.encoding import as_text, encode_turns
from tests.distillation.made_texts import WORDS, files, make_words, write
from tests.engine.conftest import DEMO_MODEL


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(DEMO_MODEL)


def test_answers_are_the_assistants_words(tokenizer):
    ids, weights = Sequences(Synthetic(tokenizer), [1024], 1024)[3]
    texts = tokenizer.decode(ids[0][weights[0] == ANSWER])
    assert set(weights.unique().tolist()) <= {float(torch.tensor(TEXT)), ANSWER}
    assert 0 < (weights == ANSWER).float().mean() < 0.7 and tokenizer.eos_token in texts


def test_chat_turns_are_rendered_once_and_answers_found(tokenizer):
    turns = [("user", "Hello"), ("assistant", " Hello "), ("user", "Hello"), ("assistant", "Bye")]
    stretches = as_text(turns, tokenizer)
    assert "".join(text for text, _ in stretches) == tokenizer.apply_chat_template(
        [{"role": r, "content": t} for r, t in turns], tokenize=False
    )
    assert [
        text.removesuffix(tokenizer.eos_token).strip() for text, answer in stretches if answer
    ] == ["Hello", "Bye"]


TEMPLATE = "{% for message in messages %}{{ message.content + ' ' }}{% endfor %}"

STARTS = {
    "added to plain text": (make_words, {"bos": True}, {"text": "w1 w2"}, [3000, 1, 2, 3001]),
    "known but not added": (make_words, {"bos": False}, {"text": "w1 w2"}, [1, 2, 3001]),
    "a template without one": (
        make_words,
        {"bos": True, "chat_template": TEMPLATE},
        {"messages": [{"role": "user", "content": "w1 w2"}]},
        [1, 2, 3001],
    ),
    "a template with one": (
        make_words,
        {"bos": False, "chat_template": "{{ bos_token + ' ' }}" + TEMPLATE},
        {"messages": [{"role": "user", "content": "w1"}]},
        [3000, 1, 3001],
    ),
    "turns without a template": (
        make_words,
        {"bos": True},
        {"messages": [{"role": "user", "content": "w1"}]},
        [3000, 1, 3001],
    ),
}


@pytest.mark.parametrize("name", STARTS)
def test_a_bos_token_stands_where_the_tokenizer_or_the_template_puts_it(tmp_path, name):
    make, options, record, expected = STARTS[name]
    documents = files(tmp_path, make(**options), write(tmp_path, "a.jsonl", record, record))
    assert documents.draw(Random(0), 100, False)[0].tolist() == expected


def test_plain_text_is_encoded_as_the_tokenizer_does(tmp_path, tokenizer):
    """What a server makes of the same text as a prompt."""
    text = "Bakers sold seven apples. Queens sang."
    documents = files(
        tmp_path, tokenizer, write(tmp_path, "a.jsonl", {"text": text}, {"text": text})
    )
    assert documents.draw(Random(0), 100, False)[0].tolist() == [
        *tokenizer(text)["input_ids"],
        tokenizer.eos_token_id,
    ]


def test_answers_of_plain_turns_are_the_assistants_words():
    ids, answers = encode_turns(
        [("user", "w1 w2"), ("assistant", "w3"), ("user", "w4")], make_words()
    )
    assert ids.tolist() == [3000, 1, 2, 3, 4, 3001] and answers.tolist() == [
        False,
        False,
        False,
        True,
        False,
        False,
    ]


def test_long_documents_are_no_matter_for_a_warning(tmp_path, caplog):
    words = make_words(longest=16)
    log = logging.getLogger("transformers")
    log.addHandler(caplog.handler)
    try:
        words(" ".join(WORDS[:100]), verbose=True)
        assert "longer than" in caplog.text, "transformers no longer warns; nothing is shown"
        caplog.clear()
        words.deprecation_warnings.clear()
        documents = files(
            tmp_path,
            words,
            write(tmp_path, "a.jsonl", *({"text": " ".join(WORDS[:100])} for _ in range(2))),
        )
        assert len(documents.draw(Random(0), 100, False)[0]) == 100
    finally:
        log.removeHandler(caplog.handler)
    assert not caplog.records
