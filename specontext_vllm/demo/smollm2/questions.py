"""What the demo asks about the first chapters of *Northanger Abbey* (Jane Austen, 1803; public
domain).
"""

from __future__ import annotations

import re
from functools import partial
from pathlib import Path

from specontext_vllm.demo.asking import Question

TEXT = Path(__file__).with_name("northanger_abbey.txt")

FACTS = (
    (
        "The number of Mrs. Allen's locker is 471133.",
        "What is the number of Mrs. Allen's locker?",
        "The number of Mrs. Allen's locker is",
        "471133",
    ),
    (
        "The password of the circulating library is silver lantern.",
        "What is the password of the circulating library?",
        "The password of the circulating library is",
        "silver lantern",
    ),
    (
        "Mr. Pettigrew keeps his umbrella in the stable.",
        "Where does Mr. Pettigrew keep his umbrella?",
        "Mr. Pettigrew keeps his umbrella in",
        "the stable",
    ),
)
"""Sentences that are put into the text, what asks for them, the answer's beginning and its end."""

OF_THE_TEXT = (
    ("What was the name of Catherine Morland's father?", "His name was", "Richard"),
    ("To which town did the Allens take Catherine?", "They took her to", "Bath"),
)
"""Questions that the novel itself answers, the answer's beginning and end."""

COPIED = (1 / 5, 3 / 5)
"""Where in the text the paragraphs stand that are asked for."""

SHOWN, REPEATED = 12, 40
"""Words of a paragraph that the answer begins with, and words that must follow."""

SPARE_TOKENS = 96
"""Of a prompt: the chat template, the question and the answer."""


def excerpt(tokenizer: Path, tokens: int) -> list[str]:
    """Paragraphs of the novel from its beginning on, of ``tokens`` tokens at most."""
    from tokenizers import Tokenizer

    text = TEXT.read_text()
    ends = Tokenizer.from_file(str(tokenizer)).encode(text, add_special_tokens=False).offsets
    if len(ends) <= tokens:
        return text.split("\n\n")
    cut = ends[tokens][0]
    return text[: text.rfind("\n\n", 0, cut)].split("\n\n")


def make_questions(tokenizer: Path, tokens: int) -> list[Question]:
    """All questions, over prompts that share about ``tokens`` tokens of text.

    The model is small and was not trained to quote, so each answer is begun for it.

    Args:
        tokenizer: the model's tokenizer.json.
    """
    paragraphs = excerpt(tokenizer, tokens - SPARE_TOKENS)
    long = [text for text in paragraphs if len(text.split()) > SHOWN + REPEATED]
    copied = [long[int(place * len(long))] for place in COPIED]
    for number, (fact, *_) in enumerate(FACTS):
        at = (2 * number + 1) * len(paragraphs) // (2 * len(FACTS))
        paragraphs.insert(at, fact)
    text = "\n\n".join(paragraphs)
    facts = [
        Question(asked, _messages(text, asked, start), end, partial(_holds, end), 1.0, 16)
        for asked, start, end in [*[fact[1:] for fact in FACTS], *OF_THE_TEXT]
    ]
    return [*facts, *[_copy(text, paragraph) for paragraph in copied]]


def _copy(text: str, paragraph: str) -> Question:
    words = paragraph.split()
    start, rest = " ".join(words[:SHOWN]), words[SHOWN : SHOWN + REPEATED]
    asked = f'Repeat the paragraph that begins with "{" ".join(words[:6])}".'
    return Question(
        asked,
        _messages(text, asked, start),
        " ".join(rest),
        partial(_copied, rest),
        0.9,
        2 * REPEATED,
    )


def _messages(text: str, asked: str, start: str) -> list[dict[str, str]]:
    return [
        {"role": "user", "content": f"{text}\n\n{asked}"},
        {"role": "assistant", "content": start},
    ]


def _holds(end: str, reply: str) -> float:
    """Whether the reply begins with these words."""
    return float(re.sub(r"\W+", " ", reply).strip().startswith(end))


def _copied(expected: list[str], reply: str) -> float:
    """Share of the words that the reply gives before its first mistake."""
    right = 0
    for word, given in zip(expected, reply.split(), strict=False):
        if word != given:
            break
        right += 1
    return right / len(expected)
