"""RULER's thirteen tasks (Hsieh et al. 2024, arXiv 2404.06654) in their official form: prompts, the
answer's beginning, lengths of replies and string match are those of github.com/NVIDIA/RULER
(Apache-2.0), written anew here.

What differs, since nothing is downloaded: the haystack is the user's texts instead of Paul
Graham's essays, words come from these texts instead of the package ``wonderwords``, and sentences
end at full stops instead of where ``nltk`` says. A prompt and its reply have at most ``context``
tokens, as there.
"""

from __future__ import annotations

import math
import re
import string
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from random import Random
from typing import Any

from benchmarks.real.prompts import Prompt, PromptError, Task, Writer

NOISE = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."
DEPTHS = [round(100 * step / 39) for step in range(40)]
"""Percent of the haystack before a needle."""

REPLY_TOKENS = {"niah": 128, "vt": 30, "cwe": 120, "fwe": 50}

WORDS = 4000
"""Words of the texts that keys and lists are made of, the most frequent ones."""


def match_all(prompt: Prompt, replies: list[Any]) -> float:
    """Share of the answers that stand in the reply, in upper or lower case."""
    reply = replies[0].lower()
    return sum(answer.lower() in reply for answer in prompt.answers) / len(prompt.answers)


def match_part(prompt: Prompt, replies: list[Any]) -> float:
    """1 if one of the answers stands in the reply, else 0."""
    reply = replies[0].lower()
    return float(any(answer.lower() in reply for answer in prompt.answers))


Draft = Callable[[Random, int], tuple[list[int], list[str]]]
"""(random numbers, size) -> tokens of the prompt, answers."""


def fit(writer: Writer, name: str, draft: Draft, rng: Random, limit: int) -> Prompt:
    """The draft with the most tokens up to ``limit``, or at most three percent less.

    Raises:
        PromptError: what must be in the prompt takes more.
    """
    # The same random numbers for every size; the size that fitted before nearly always fits again.
    seed, size = rng.getrandbits(64), writer.sizes.get((name, limit), 16)
    best: tuple[list[int], list[str]] | None = None
    for _ in range(16):
        tokens, answers = draft(Random(seed), size)
        if len(tokens) <= limit and (best is None or len(tokens) > len(best[0])):
            best, writer.sizes[name, limit] = (tokens, answers), size
        if best is not None and len(best[0]) >= 0.97 * limit:
            break
        wanted = int(size * 0.985 * limit / len(tokens))
        size = max(1, wanted if wanted != size else size - (len(tokens) > limit))
    if best is None:
        raise PromptError(
            f"--contexts: found {limit} tokens for the prompt, too few for {name}; use a longer "
            "one."
        )
    return Prompt(best[0], answers=best[1])


# -- needles


@dataclass(frozen=True)
class Needles:
    """One of the eight tasks with needles.

    Attributes:
        haystack: "noise", "texts", or "needles" of the same form.
        keys, values: what they are: "words", "numbers" or "uuids".
        key_count, values_of_a_key, queries: how many there are, and are asked for.
    """

    haystack: str
    keys: str = "words"
    values: str = "numbers"
    key_count: int = 1
    values_of_a_key: int = 1
    queries: int = 1


NEEDLES = {
    "niah_single_1": Needles("noise"),
    "niah_single_2": Needles("texts"),
    "niah_single_3": Needles("texts", values="uuids"),
    "niah_multikey_1": Needles("texts", key_count=4),
    "niah_multikey_2": Needles("needles"),
    "niah_multikey_3": Needles("needles", keys="uuids", values="uuids"),
    "niah_multivalue": Needles("texts", values_of_a_key=4),
    "niah_multiquery": Needles("texts", key_count=4, queries=4),
}


def _thing(writer: Writer, rng: Random, kind: str) -> str:
    if kind == "numbers":
        return str(rng.randint(10**6, 10**7 - 1))
    if kind == "uuids":
        return str(uuid.UUID(int=rng.getrandbits(128), version=4))
    words = writer.texts.words[:WORDS]
    return f"{rng.choice(words)}-{rng.choice(words)}"


def _needle(kind: str, key: str, value: str) -> str:
    return f"One of the special magic {kind} for {key} is: {value}."


def _haystack(writer: Writer, rng: Random, form: Needles, size: int, needles: list[str]) -> str:
    """The needles in a haystack of ``size`` sentences, or tokens of the texts."""
    if form.haystack == "texts":
        text = writer.tokenizer.decode(writer.texts.flat.passage(rng, size))
        sentences = re.split(r"(?<=[.!?]) ", text)
        places = sorted(len(sentences) * depth // 100 for depth in rng.sample(DEPTHS, len(needles)))
        for place, needle in reversed(list(zip(places, needles, strict=True))):
            sentences.insert(place, needle)
        return " ".join(sentences)
    sentences = [
        NOISE
        if form.haystack == "noise"
        else _needle(form.values, _thing(writer, rng, form.keys), _thing(writer, rng, form.values))
        for _ in range(max(size, len(needles)))
    ]
    places = sorted(rng.sample(range(len(sentences)), len(needles)), reverse=True)
    for place, needle in zip(places, needles, strict=True):
        sentences.insert(place, needle)
    return "\n".join(sentences)


def _needles_draft(
    writer: Writer, form: Needles, rng: Random, size: int
) -> tuple[list[int], list[str]]:
    values: dict[str, list[str]] = {}
    while len(values) < form.key_count:
        values[_thing(writer, rng, form.keys)] = [
            _thing(writer, rng, form.values) for _ in range(form.values_of_a_key)
        ]
    needles = [_needle(form.values, key, value) for key in values for value in values[key]]
    rng.shuffle(needles)
    asked = rng.sample(list(values), form.queries)
    answers = [value for key in asked for value in values[key]]
    query = ", ".join(asked[:-1]) + f", and {asked[-1]}" if len(asked) > 1 else asked[0]
    text = _haystack(writer, rng, form, size, needles)
    one = len(answers) == 1
    kind = form.values.removesuffix("s") if one else form.values
    content = (
        f"{'A' if one else 'Some'} special magic {kind} {'is' if one else 'are'} hidden within the "
        f"following text. Make sure to memorize it. I will quiz you about the {kind} afterwards.\n"
        f"{text}\n"
        f"What {'is' if one else 'are all'} the special magic {kind} for {query} mentioned in the "
        "provided text?"
    )
    prefix = (
        f"The special magic {kind} for {query} mentioned in the provided text "
        f"{'is' if one else 'are'}"
    )
    return writer.question(content, prefix), answers


# -- variables, words


def _variables(rng: Random, noises: int, letters: int) -> tuple[str, str, list[str]]:
    """Message, the answer's beginning, and the five names that a chain of four hops leads to."""
    names: list[str] = []
    while len(names) < 5:
        name = "".join(rng.choices(string.ascii_uppercase, k=letters))
        names += [name] if name not in names else []
    value = str(rng.randint(10000, 99999))
    chain = [f"VAR {names[0]} = {value}"]
    chain += [f"VAR {name} = VAR {before} " for before, name in zip(names, names[1:])]
    sentences = [NOISE + "\n"] * noises
    if noises <= len(chain):
        sentences = [f"{part.strip()}." for part in NOISE.split(".") if part.strip()] * noises
    places = sorted(rng.sample(range(len(sentences)), len(chain)))
    for offset, (place, assignment) in enumerate(zip(places, chain, strict=True)):
        sentences.insert(place + offset, assignment)
    text = " ".join(sentences).replace(". \n", ".\n")
    content = (
        "Memorize and track the chain(s) of variable assignment hidden in the following text.\n\n"
        f"{text}\nQuestion: Find all variables that are assigned the value {value} in the text "
        "above."
    )
    prefix = (
        "Answer: According to the chain(s) of variable assignment in the text above, "
        f"{len(names)} variables are assigned the value {value}, they are:"
    )
    return content, prefix, names


def _variables_draft(writer: Writer, rng: Random, size: int) -> tuple[list[int], list[str]]:
    shown, shown_prefix, shown_names = _variables(rng, 5, letters=3)
    content, prefix, names = _variables(rng, size, letters=5)
    example = f"{shown} {shown_prefix} {' '.join(shown_names)}\n\n\n\n"
    return writer.question(example + content, prefix), names


def _common_words(
    writer: Writer, rng: Random, words: int, common: int, uncommon: int
) -> tuple[str, str, list[str]]:
    """Message, the answer's beginning, and the ten words that are listed ``common`` times; the
    others are listed ``uncommon`` times.
    """
    known = writer.texts.words[:WORDS]
    picked = rng.sample(known, min(words, len(known)))
    often, seldom = picked[:10], picked[10:]
    listed = often * common + seldom * uncommon
    rng.shuffle(listed)
    content = (
        "Below is a numbered list of words. In these words, some appear more often than others. "
        f"Memorize the ones that appear most often.\n{_numbered(listed)}\n"
        "Question: What are the 10 most common words in the above list?"
    )
    return content, "Answer: The top 10 words that appear most often in the list are:", often


def _numbered(words: list[str]) -> str:
    return " ".join(f"{number}. {word}" for number, word in enumerate(words, 1))


def _common_words_draft(
    writer: Writer, short: bool, rng: Random, size: int
) -> tuple[list[int], list[str]]:
    shown, prefix, answer = _common_words(writer, rng, *((20, 3, 1) if short else (40, 10, 3)))
    content, _, often = _common_words(writer, rng, size + 10, *((6, 1) if short else (30, 3)))
    example = f"{shown} {prefix} {_numbered(answer)}\n"
    return writer.question(example + content, prefix), often


def _frequent_words_draft(
    writer: Writer, vocabulary: int, rng: Random, size: int
) -> tuple[list[int], list[str]]:
    coded: list[str] = []
    while len(coded) < vocabulary:
        word = "".join(rng.choices(string.ascii_lowercase, k=6))
        coded += [word] if word not in coded else []
    coded[0] = "..."  # the most frequent one is noise
    zeta = math.pi**2 / 6  # of 2, the exponent of the words' frequencies
    listed = [word for rank, word in enumerate(coded, 1) for _ in range(int(size / rank**2 / zeta))]
    rng.shuffle(listed)
    content = (
        "Read the following coded text and track the frequency of each coded word. Find the three "
        f"most frequently appeared coded words. {' '.join(listed)}\n"
        "Question: Do not provide any explanation. Please ignore the dots '....'. What are the "
        "three most frequently appeared words in the above coded text?"
    )
    prefix = (
        "Answer: According to the coded text above, the three most frequently appeared words are:"
    )
    return writer.question(content, prefix), coded[1:4]


# -- the tasks


def _make(name: str, writer: Writer, rng: Random, context: int, number: int) -> Prompt:
    family = name.split("_")[0]
    limit = context - REPLY_TOKENS[family]
    drafts: dict[str, Draft] = {
        "vt": partial(_variables_draft, writer),
        "cwe": partial(_common_words_draft, writer, context < 4096),
        "fwe": partial(_frequent_words_draft, writer, limit // 50),
    }
    draft = drafts.get(name) or partial(_needles_draft, writer, NEEDLES[name])
    made = fit(writer, name, draft, rng, limit)
    return Prompt(made.tokens, answers=made.answers, reply_tokens=REPLY_TOKENS[family])


_ABOUT = {
    "niah_single_1": "a number among repeated sentences",
    "niah_single_2": "a number in real text",
    "niah_single_3": "a UUID in real text",
    "niah_multikey_1": "one of four numbers in real text",
    "niah_multikey_2": "one of many numbers, nothing else",
    "niah_multikey_3": "one of many UUIDs by UUIDs, nothing else",
    "niah_multivalue": "the four numbers of one key in real text; share found",
    "niah_multiquery": "four numbers of four keys in real text; share found",
    "vt": "the five variables of a chain of assignments; share found",
    "cwe": "the ten most frequent words of a list; share found",
    "fwe": "the three most frequent coded words; share found",
}

ONE_ANSWER = [name for name, form in NEEDLES.items() if form.values_of_a_key * form.queries == 1]

TASKS = {
    name: Task(
        name,
        "right" if name in ONE_ANSWER else "share",
        partial(_make, name),
        match_all,
        f"RULER: {about}",
    )
    for name, about in _ABOUT.items()
}
