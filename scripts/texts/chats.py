"""Questions about real texts whose answers stand in them: looking up, copying, following."""

from __future__ import annotations

import re
from collections.abc import Callable
from itertools import accumulate
from random import Random
from typing import Protocol

from texts import words

Message = dict[str, str]

ANSWER_TOKENS = 320
"""Of the longest copied passage."""

SENTENCE = re.compile(r"(?<=[.!?])[\"')\]]*\s+(?=[A-Z\"'(])")
"""Between two sentences."""


class Encoding(Protocol):
    """A tokenizer, as `tokenizers` has it."""

    def encode(self, text: str, *, add_special_tokens: bool) -> object: ...


class Passages:
    """Windows of texts, half of them prose.

    Args:
        prose, others: documents.
        tokenizer: a `tokenizers.Tokenizer`.
    """

    def __init__(self, prose: list[str], others: list[str], tokenizer: Encoding) -> None:
        self.tokenizer = tokenizer
        self.kinds = [(texts, list(accumulate(map(len, texts)))) for texts in (prose, others)]

    def size(self, text: str) -> int:
        """In tokens."""
        return len(self.tokenizer.encode(text, add_special_tokens=False).ids)  # type: ignore[attr-defined]

    def draw(self, rng: Random, tokens: int) -> str:
        """Whole lines of about ``tokens`` tokens; of several documents where one is too short."""
        parts: list[str] = []
        while tokens > 16:
            texts, ends = rng.choice(self.kinds)
            (text,) = rng.choices(texts, cum_weights=ends)
            at = rng.randrange(max(1, len(text) - 3 * tokens))
            at = text.find("\n", at) + 1 if at else 0
            window = text[at : at + 8 * tokens].strip()
            encoded = self.tokenizer.encode(window, add_special_tokens=False)
            places = encoded.offsets  # type: ignore[attr-defined]
            if len(places) > tokens:
                cut = window[: places[tokens - 1][1]]
                window = cut[: max(cut.rfind("\n"), cut.rfind(". ") + 1)] or cut
            window = window.strip()
            if window:
                parts.append(window)
            tokens -= self.size(window) + 2
        return "\n\n".join(parts)


def quoted_start(text: str, rng: Random) -> str:
    """The first five to ten words."""
    return " ".join(text.split()[: rng.randint(5, 10)])


def insert(text: str, sentences: list[str], rng: Random) -> str:
    """Sentences put between those of a text, or between its paragraphs."""
    places = [match.end() for match in SENTENCE.finditer(text)] or [0]
    places = sorted(rng.choice(places) for _ in sentences)
    parts, before = [], 0
    for place, sentence in zip(places, sentences, strict=True):
        own_line = rng.random() < 0.3
        parts += [text[before:place], f"\n{sentence}\n" if own_line else f"{sentence} "]
        before = place
    return "".join([*parts, text[before:]])


Asked = tuple[str, list[tuple[str, str]]]
"""A text, and questions about it with their answers."""


def look_up(text: str, rng: Random) -> Asked:
    """Facts put into the text, several of one form, of which some are asked for."""
    form, question = rng.choice(words.FACTS)
    key_kind, value_kind = rng.choice(words.KEYS), rng.choice(words.VALUES)
    facts: dict[str, str] = {}
    for _ in range(rng.choice((1, 1, 2, 4, 8, 16))):
        facts.setdefault(key_kind(rng), value_kind(rng))
    made = {key: form.format(key=key, value=value) for key, value in facts.items()}
    for _ in range(rng.choice((0, 0, 1, 3))):
        other, _ = rng.choice(words.FACTS)
        made[other] = other.format(
            key=rng.choice(words.KEYS)(rng), value=rng.choice(words.VALUES)(rng)
        )
    sentences = list(made.values())
    rng.shuffle(sentences)
    chosen = rng.sample(list(facts), min(len(facts), rng.choice((1, 1, 2, 3))))
    answer = rng.choice((None, *words.DIRECT))
    if len(chosen) > 1 and rng.random() < 0.5:
        asked = " ".join(question.format(key=key) for key in chosen)
        pairs = [(asked, "\n".join(f"{key}: {facts[key]}" for key in chosen))]
    else:
        pairs = [
            (
                question.format(key=key),
                made[key] if answer is None else answer.format(value=facts[key]),
            )
            for key in chosen
        ]
    return insert(text, sentences, rng), pairs


def several_values(text: str, rng: Random) -> Asked:
    """A key that the text gives several values."""
    key, value_kind = rng.choice(words.KEYS)(rng), rng.choice(words.VALUES)
    values = [value_kind(rng) for _ in range(rng.randint(2, 5))]
    form = rng.choice(
        (
            "{key} was seen with {value}.",
            "One of the marks of {key} is {value}.",
            "Add {value} to the list of {key}.",
        )
    )
    question = rng.choice(
        (
            "Name everything that the text connects with {key}.",
            "Which values does the text give for {key}?",
        )
    )
    answer = rng.choice((", ", "\n")).join(values)
    return insert(text, [form.format(key=key, value=value) for value in values], rng), [
        (question.format(key=key), answer)
    ]


def copied_paragraph(text: str, rng: Random) -> Asked | None:
    """A paragraph that is asked for by its first words."""
    found = [part.strip() for part in re.split(r"\n\s*\n", text) if 150 < len(part) < 1200]
    for paragraph in rng.sample(found, min(len(found), 8)):
        start = quoted_start(paragraph, rng)
        if text.count(start) == 1:
            return text, [(rng.choice(words.COPY_REQUESTS).format(start=start), paragraph)]
    return None


def continued(text: str, rng: Random) -> Asked | None:
    """What follows a sentence: the next one, or several."""
    sentences = SENTENCE.split(text)
    for _ in range(8):
        at = rng.randrange(max(1, len(sentences) - 4))
        start, after = sentences[at], sentences[at + 1 : at + 1 + rng.randint(1, 3)]
        if after and 30 < len(start) < 200 and text.count(start) == 1 and sum(map(len, after)) > 40:
            first = text.index(start) + len(start)
            following = text[first : text.index(after[-1], first) + len(after[-1])].strip()
            if len(following) < 1200:
                return text, [(rng.choice(words.CONTINUE_REQUESTS).format(start=start), following)]
    return None


def mentioned(text: str, rng: Random) -> Asked | None:
    """A sentence that is asked for by a word that stands nowhere else."""
    sentences = [s.strip() for s in SENTENCE.split(text) if 40 < len(s) < 400 and "\n\n" not in s]
    pairs = []
    for sentence in rng.sample(sentences, min(len(sentences), 12)):
        rare = [w for w in re.findall(r"[A-Za-z]{6,}", sentence) if text.count(w) == 1]
        if rare:
            pairs.append(
                (rng.choice(words.MENTION_REQUESTS).format(word=rng.choice(rare)), sentence)
            )
    return (text, pairs[: rng.randint(1, 3)]) if pairs else None


def records(text: str, rng: Random) -> Asked:
    """A list of keys and values, beside a part of the text or instead of it."""
    key_kind, value_kind = rng.choice(words.KEYS), rng.choice(words.VALUES)
    form = rng.choice(
        ("{}: {}", "{} = {}", "{} -> {}", '"{}": "{}",', "| {} | {} |", "{}, {}", "- {} ({})")
    )
    share = rng.choice((0.3, 0.6, 0.95))
    facts: dict[str, str] = {}
    size = 0
    for _ in range(2000):
        facts.setdefault(key_kind(rng), value_kind(rng))
        size += len(form) + 24
        if size > share * len(text):
            break
    listing = "\n".join(form.format(key, value) for key, value in facts.items())
    kept = text[: max(0, len(text) - 2 * len(listing))]  # numbers take more tokens than words
    cut = kept.rfind("\n", 0, rng.randint(0, len(kept))) + 1
    whole = f"{kept[:cut]}\n{listing}\n\n{kept[cut:]}".strip()
    chosen = rng.sample(list(facts), min(len(facts), rng.randint(1, 4)))
    question = rng.choice(("Which value has {}?", "Look up {}.", "What is listed for {}?", "{}?"))
    return whole, [(question.format(key), facts[key]) for key in chosen]


def tracked(text: str, rng: Random) -> Asked:
    """Names that are given a value, or that of another name, in sentences all over the text."""
    forms = rng.choice(
        (
            ("Let {a} be {v}.", "Let {a} be the same as {b}."),
            ("{a} is worth {v}.", "{a} is worth as much as {b}."),
            ("(set {a} to {v})", "(set {a} to {b})"),
            ("{a} carries the number {v}.", "{a} took its number from {b}."),
        )
    )
    names = rng.sample(words.NOUNS, rng.randint(4, 12))
    chains: list[list[str]] = []
    values: dict[str, str] = {}
    sentences = []
    for name in names:
        if not chains or rng.random() < 0.35:
            chains.append([name])
            values[name] = words.number(rng)
            sentences.append(forms[0].format(a=name, v=values[name]))
        else:
            chain = rng.choice(chains)
            sentences.append(forms[1].format(a=name, b=chain[-1]))
            values[name] = values[chain[0]]
            chain.append(name)
    whole = insert(text, sentences, rng)
    chain = max(chains, key=len)
    if rng.random() < 0.5:
        return whole, [
            (f"Which names have the value {values[chain[0]]} in the end?", ", ".join(chain))
        ]
    steps = " ".join(sentences[names.index(name)] for name in chain)
    return whole, [
        (
            f"What value has {chain[-1]}? Say why.",
            f"{steps} So {chain[-1]} has {values[chain[-1]]}.",
        )
    ]


def labelled(text: str, rng: Random) -> Asked | None:
    """Lines of the text with labels; one of them is asked for again, or one with a mark that
    decides its label.
    """
    lines = [" ".join(s.split()) for s in SENTENCE.split(text) if 40 < len(s) < 220]
    if len(lines) < 8:
        return None
    names = rng.sample(words.NOUNS, rng.randint(2, 6))
    form = rng.choice(
        ("{line}\nLabel: {label}", "Input: {line}\nOutput: {label}", "{line} => {label}")
    )
    lines = list(dict.fromkeys(lines))
    labels = {line: names[len(line.split()[0]) % len(names)] for line in lines}
    # The mark: how long the first word is.
    shown, new = lines[:-1], lines[-1]
    asked = rng.choice(shown) if rng.random() < 0.75 else new
    whole = "\n\n".join(form.format(line=line, label=labels[line]) for line in shown)
    question = form.format(line=asked, label="").rstrip()
    return whole, [(f"Give the label of the last one.\n\n{question}", labels[asked])]


KINDS: dict[Callable[[str, Random], Asked | None], int] = {
    look_up: 30,
    several_values: 6,
    copied_paragraph: 16,
    continued: 12,
    mentioned: 12,
    records: 10,
    tracked: 8,
    labelled: 6,
}
"""Makers of questions, and how often each is taken."""


def make_chat(passages: Passages, rng: Random, tokens: int) -> list[Message]:
    """Messages of about ``tokens`` tokens."""
    while True:
        kind = rng.choices(list(KINDS), weights=list(KINDS.values()))[0]
        copies = kind in (copied_paragraph, continued)
        text = passages.draw(rng, max(128, tokens - 120 - (ANSWER_TOKENS // 2 if copies else 0)))
        made = kind(text, rng)
        if made is None:
            continue
        text, pairs = made
        before, after = rng.choice(words.INTRODUCTIONS)
        (question, answer), *more = pairs
        if rng.random() < 0.2:
            asked = f"{question}\n\n{before}{text}{after}"
        else:
            asked = f"{before}{text}{after}\n\n{question}"
        messages = [("user", asked), ("assistant", answer)]
        for question, answer in more:
            messages += [("user", question), ("assistant", answer)]
        return [{"role": role, "content": content} for role, content in messages]


def make_repeat(passages: Passages, rng: Random, tokens: int) -> str:
    """A text of about ``tokens`` tokens in which a passage stands again at the end, or twice."""
    copied = rng.randint(40, min(400, tokens // 4))
    text = passages.draw(rng, tokens - copied - 20)
    for _ in range(rng.choice((1, 1, 1, 2))):
        at = rng.randrange(max(1, len(text) - 5 * copied))
        at = text.find(" ", at) + 1
        passage = text[at : at + 5 * copied]
        text = f"{text}{rng.choice(words.SEPARATORS)}{rng.choice(words.LEAD_INS)}{passage}"
    return text
