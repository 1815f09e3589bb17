"""Many-shot labels: each example is a sentence and the label of its kind; the last one's is asked.

A kind is all sentences that hold a certain word, its label is another word, drawn for it. So the
label can be known from the examples alone. The labels' log-probabilities are compared; what stands
between the prompt and the label is emitted by force as well, so that the label is a decode step's.
"""

from __future__ import annotations

from collections.abc import Sequence
from random import Random
from typing import Any

from benchmarks.real.prompts import Prompt, PromptError, Task, Writer

KINDS = 8
COMMON_WORDS = 100
"""The texts' most frequent words, which say nothing of a sentence."""

EXAMPLE_TOKENS = 25
"""What an example takes at least, about."""

ASK = "\nKind"


def most_probable(prompt: Prompt, replies: list[Any]) -> float:
    """1 if no other label is as probable as the first, which is the right one."""
    right, *others = [sum(reply[prompt.unscored :]) for reply in replies]
    return float(right > max(others))


def _kinds(writer: Writer, rng: Random, least: int) -> dict[str, list[str]]:
    """At least so many sentences each by the only one of the kinds' words that they hold."""
    index = writer.texts.sentences
    often = set(writer.texts.words[:COMMON_WORDS])
    known = [w for w, found in index.items() if len(found) >= least and w not in often]
    for _ in range(50 if len(known) >= KINDS else 0):
        words = rng.sample(known, KINDS)
        alone = {
            word: [s for s in index[word] if not any(w in s for w in words if w != word)]
            for word in words
        }
        if all(len(found) >= least for found in alone.values()):
            return alone
    raise PromptError(
        f"--texts: found no {KINDS} words with {least} sentences each, which labels needs; give "
        "more text."
    )


def _labels(writer: Writer, rng: Random, kinds: Sequence[str]) -> dict[str, list[int]]:
    """For each kind a word of as few tokens as the others', as the tokens that follow ``ASK``."""
    ask = writer.encode(ASK)
    found: dict[int, dict[str, list[int]]] = {}
    words = [word for word in writer.texts.words[:4000] if word not in kinds]
    rng.shuffle(words)
    for word in words:
        ids = writer.encode(f"{ASK}: {word}")
        if ids[: len(ask)] != ask:
            continue
        same = found.setdefault(len(ids), {})
        same[word] = ids[len(ask) :]
        if len(same) == KINDS and len(ids) <= min(found):
            break
    enough = [length for length, same in found.items() if len(same) >= KINDS]
    if not enough:
        raise PromptError(
            f"--texts: found no {KINDS} words for labels; give more text, or leave labels out of "
            "--tasks."
        )
    return dict(list(found[min(enough)].items())[:KINDS])


def _make(writer: Writer, rng: Random, context: int, number: int) -> Prompt:
    sentences = _kinds(writer, rng, max(4, context // (EXAMPLE_TOKENS * KINDS)))
    labels = _labels(writer, rng, list(sentences))
    label_of = dict(zip(sentences, labels, strict=True))
    pool = [(kind, text) for kind, found in sentences.items() for text in found]
    rng.shuffle(pool)
    kind, asked = pool.pop()
    question = writer.encode(f"Sentence: {asked}{ASK}")
    room = context - len(question) - max(map(len, labels.values())) - len(writer.begin)
    body: list[int] = []
    for other, text in pool:
        example = writer.encode(f"Sentence: {text}{ASK}: {label_of[other]}\n\n")
        if len(body) + len(example) > room:
            break
        body += example
    right = label_of[kind]
    forced = [labels[right], *(ids for label, ids in labels.items() if label != right)]
    shared = 0
    while len({ids[shared] for ids in forced}) == 1:
        shared += 1
    # The first forced token is prefill's and has no score.
    return Prompt([*writer.begin, *body, *question], forced, unscored=max(0, shared - 1))


TASKS = {
    "labels": Task(
        "labels",
        "right",
        _make,
        most_probable,
        f"the label of a sentence among {KINDS}, as many examples as fit; right if it is the most "
        "probable one",
    )
}
