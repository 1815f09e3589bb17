"""The vocabulary of the made-up texts."""

from __future__ import annotations

import re

from specontext_vllm.synthetic import tasks
from specontext_vllm.synthetic import words as W


def vocabulary() -> list[str]:
    """Every piece that a made-up text can hold, in a fixed order."""
    found: dict[str, None] = {}
    for group in (W.KEYS, W.SUBJECTS, W.VERBS, W.ADJECTIVES, W.NOUNS, W.LINKS, W.ADVERBS, W.COUNTS):
        found |= dict.fromkeys(f" {word}" for word in group)
    # Line starts have no space before the word.
    found |= dict.fromkeys(
        [*W.SUBJECTS, *W.KEYS, *"0123456789", *(f" {digit}" for digit in range(10)), "\n", " "]
    )
    texts = [
        *tasks.FACTS,
        *tasks.FACT_QUESTIONS,
        *tasks.PASSAGE_QUESTIONS,
        *tasks.PREAMBLES,
        tasks.PASSAGE.split("{body}")[0],
        tasks.ACKNOWLEDGEMENT,
        tasks.FACT_ANSWER,
        "Question:",
        "Answer:",
    ]
    for text in texts:
        text = re.sub(r"\{\w+\}", "", text)
        for part in (text, " " + text):
            found |= dict.fromkeys(tasks.pieces(part))
    return list(found)
