"""Needle and recitation problems in plain English: training data of the demo model and of heads,
tests and benchmarks.

A text is a list of *pieces*: words with their leading space, digits, punctuation, newlines and chat
markers. Every piece is one token of the demo tokenizer, so a text's length in tokens is known here
without a tokenizer.
"""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass
from random import Random

from specontext_vllm.synthetic import words as W

BOS, USER, ASSISTANT, END, PAD = "<|bos|>", "<|user|>", "<|assistant|>", "<|end|>", "<|pad|>"
SPECIALS = [PAD, BOS, END, USER, ASSISTANT]

PIECE_PATTERN = r" ?[A-Za-z]+| ?[0-9]|\n|[^A-Za-z0-9\s]|\s"
_PIECE = re.compile(r"<\|\w+\|>|" + PIECE_PATTERN)

# In every form one word stands between a name and its value: a small model learns that easily.
FACTS = [
    "The code of {key} is {value}.",
    "The number of {key} is {value}.",
    "Remember that the code of {key} is {value}.",
    "Please note that the number for {key} is {value}.",
    "You should know that {key} has {value} as a code.",
    "Everyone knows that {key} uses {value} as a number.",
    "My friend {key} got {value} as a secret code.",
]
FACT_QUESTIONS = [
    "What is the code of {key}?",
    "What is the number of {key}?",
    "Which number belongs to {key}?",
    "Tell me the code for {key}.",
    "Do you recall the number of {key}?",
    "Please give me the code of {key}.",
    "I need the secret number for {key}.",
]
FACT_ANSWER = "The code of {key} is {value}."
PASSAGE = "Passage {key}: {body}"
PASSAGE_QUESTIONS = [
    "Recite the passage {key}.",
    "Repeat passage {key} word for word.",
    "Please read out the passage called {key}.",
    "What does passage {key} say?",
]
PREAMBLES = [
    "You are a helpful assistant.",
    "Read the text and answer the question.",
    "Here is a long text.",
    "Below you find notes and passages.",
]
ACKNOWLEDGEMENT = "I have read it."
LAYOUTS = ("question_last", "question_first", "question_both", "plain", "split", "multi_turn")

_SENTENCES = [
    (W.SUBJECTS, W.VERBS, W.COUNTS, W.ADJECTIVES, W.NOUNS, W.LINKS, W.ADJECTIVES, W.NOUNS),
    (W.SUBJECTS, W.ADVERBS, W.VERBS, W.ADJECTIVES, W.NOUNS, W.LINKS, W.COUNTS, W.NOUNS),
    (W.SUBJECTS, W.VERBS, W.ADJECTIVES, W.NOUNS, W.ADVERBS, W.LINKS, W.ADJECTIVES, W.NOUNS),
]


@dataclass(frozen=True)
class Problem:
    """One question over a long context.

    Attributes:
        kind: "needle" (the answer is a value) or "recitation" (the answer is a passage).
        layout: one of ``LAYOUTS``.
        messages: OpenAI chat messages; the last is the user's turn to be answered.
        answer: what the reply must contain.
    """

    kind: str
    layout: str
    messages: list[dict[str, str]]
    answer: str


def pieces(text: str) -> list[str]:
    """The text cut into pieces, each of which is one token of the demo tokenizer."""
    return _PIECE.findall(text)


def random_for(seed: int, split: str) -> Random:
    """A generator for (split, seed): different splits give different problems, so test problems do
    not occur in training.
    """
    return Random(hashlib.sha256(f"{split}/{seed}".encode()).digest())


def sentence(rng: Random) -> str:
    """A sentence of eight random words."""
    return " ".join(rng.choice(slot) for slot in rng.choice(_SENTENCES)) + "."


def random_value(rng: Random) -> str:
    """Six digits, or sometimes two words."""
    if rng.random() < 0.15:
        return f"{rng.choice(W.ADJECTIVES)} {rng.choice(W.NOUNS)}"
    return str(rng.randrange(100000, 1000000))


@dataclass(frozen=True)
class Item:
    """Something that can be asked for: a fact or a passage."""

    kind: str
    text: str
    question: str
    answer: str
    target: str


def make_items(rng: Random, facts: int, passages: int) -> list[Item]:
    """Facts and passages under distinct names, in random order."""
    keys = rng.sample(W.KEYS, facts + passages)
    items = []
    for key in keys[:facts]:
        value = random_value(rng)
        items.append(
            Item(
                "needle",
                rng.choice(FACTS).format(key=key, value=value),
                rng.choice(FACT_QUESTIONS).format(key=key),
                FACT_ANSWER.format(key=key, value=value),
                value,
            )
        )
    for key in keys[facts:]:
        body = " ".join(sentence(rng) for _ in range(rng.randint(3, 8)))
        question = rng.choice(PASSAGE_QUESTIONS).format(key=key)
        text = PASSAGE.format(key=key, body=body)
        items.append(Item("recitation", text, question, text, body))
    rng.shuffle(items)
    return items


def context_lines(rng: Random, items: list[Item], size: int) -> list[str]:
    """Lines of about ``size`` pieces: the items among random sentences.

    Passages have lines of their own, facts are within paragraphs.
    """
    room = size - sum(len(pieces(item.text)) + 1 for item in items)
    units: list[tuple[bool, str]] = [(item.kind == "recitation", item.text) for item in items]
    # A sentence is nine pieces, and about every eighth ends a line.
    units += [(False, sentence(rng)) for _ in range(int(max(0, room) / 9.13))]
    rng.shuffle(units)
    lines: list[str] = []
    paragraph: list[str] = []
    for alone, text in units:
        if alone or len(paragraph) >= rng.randint(3, 12):
            if paragraph:
                lines.append(" ".join(paragraph))
            paragraph = []
        if alone:
            lines.append(text)
        else:
            paragraph.append(text)
    if paragraph:
        lines.append(" ".join(paragraph))
    return lines


def conversation(
    rng: Random, layout: str, items: list[Item], asked: list[Item], size: int
) -> list[tuple[str, str]]:
    """Turns (role, text) that ask for ``asked``, one after the other, over a context of about
    ``size`` pieces.

    The layout ``plain`` has turns of roles "text" and "answer", without chat markers.
    """
    first = asked[0].question
    lines = context_lines(rng, items, size)
    if rng.random() < 0.4:
        lines.insert(0 if rng.random() < 0.5 else len(lines), rng.choice(PREAMBLES))
    turns: list[tuple[str, str]] = []
    if layout == "plain":
        turns.append(("text", "\n".join([*lines, f"Question: {first}", "Answer:"])))
    elif layout == "split":
        cut = rng.randint(1, max(1, len(lines) - 1))
        turns += [
            ("user", "\n".join(lines[:cut])),
            ("assistant", ACKNOWLEDGEMENT),
            ("user", "\n".join([*lines[cut:], first])),
        ]
    elif layout == "question_first":
        turns.append(("user", "\n".join([first, *lines])))
    elif layout == "question_both":
        turns.append(("user", "\n".join([first, *lines, first])))
    else:
        turns.append(("user", "\n".join([*lines, first])))
    plain = layout == "plain"
    turns.append(("answer" if plain else "assistant", asked[0].answer))
    for item in asked[1:]:
        turns.append(
            ("text", f"\nQuestion: {item.question}\nAnswer:") if plain else ("user", item.question)
        )
        turns.append(("answer" if plain else "assistant", item.answer))
    return turns


def render(turns: list[tuple[str, str]]) -> list[tuple[str, bool]]:
    """Stretches of text, and whether the model is to produce them, in the format of the demo
    tokenizer's chat template.
    """
    out: list[tuple[str, bool]] = [(BOS, False)]
    for role, text in turns:
        if role == "user":
            out.append((f"{USER}{text}{END}", False))
        elif role == "assistant":
            out += [(ASSISTANT, False), (f"{text}{END}", True)]
        elif role == "answer":
            out.append((f" {text}", True))
        else:
            out.append((text, False))
    if turns[-1][0] == "answer":
        out.append((END, True))
    return out


def make_problem(
    kind: str,
    *,
    seed: int,
    approx_tokens: int,
    layout: str | None = None,
    distractors: int | None = None,
    split: str = "test",
) -> Problem:
    """One held-out problem.

    Args:
        kind: "needle" or "recitation".
        seed: the same seed and split give the same problem.
        approx_tokens: size of the prompt in tokens of the demo tokenizer, within a few percent.
        layout: one of ``LAYOUTS``; default: by seed. ``multi_turn`` has an answered question before
            the last one. ``plain`` keeps its single chat message, in the "Question: ... Answer:"
            style.
        distractors: other facts of the same form; default one per 128 tokens.

    Raises:
        ValueError: unknown kind or layout, or more distractors than there are names.
    """
    if kind not in ("needle", "recitation"):
        raise ValueError(f'kind: found {kind!r}; use "needle" or "recitation".')
    rng = random_for(seed, split)
    layout = layout or LAYOUTS[seed % len(LAYOUTS)]
    if layout not in LAYOUTS:
        raise ValueError(f"layout: found {layout!r}; use one of {', '.join(LAYOUTS)}.")
    facts = max(2, approx_tokens // 128) if distractors is None else distractors + 1
    passages = max(2, min(12, approx_tokens // 512))
    if facts + passages > len(W.KEYS):
        raise ValueError(
            f"distractors: found {distractors}; there are names for {len(W.KEYS) - passages - 1}."
        )
    items = make_items(rng, facts, passages)
    asked = [rng.choice([i for i in items if i.kind == kind])]
    if layout == "multi_turn":
        asked.insert(0, rng.choice([i for i in items if i.kind == "needle" and i is not asked[0]]))
    overhead = (
        sum(len(pieces(i.question)) for i in asked)
        + sum(len(pieces(i.answer)) for i in asked[:-1])
        + 10
    )
    turns = conversation(rng, layout, items, asked, approx_tokens - overhead)[:-1]
    messages = [
        {"role": "user" if role == "text" else role, "content": text} for role, text in turns
    ]
    return Problem(kind, layout, messages, asked[-1].target)


def score(problem: Problem, reply: str) -> float:
    """Needle: 1.0 if the value is in the reply, else 0.0. Recitation: share of the passage's words
    that are right before the first wrong one; a leading "Passage NAME:" does not count.
    """
    if problem.kind == "needle":
        return float(re.search(rf"(?<!\w){re.escape(problem.answer)}(?!\w)", reply) is not None)
    wanted, got = problem.answer.split(), re.sub(r"^\s*Passage \w+:", "", reply).split()
    right = 0
    while right < min(len(wanted), len(got)) and wanted[right] == got[right]:
        right += 1
    return right / len(wanted)


def training_document(rng: Random, size: int) -> list[tuple[str, bool]]:
    """A conversation of at most ``size`` pieces in the demo's own format."""
    return render(training_turns(rng, size))


def training_turns(rng: Random, size: int) -> list[tuple[str, str]]:
    """Turns (role, text) of at most ``size`` pieces, in a random layout; 1 to 24 questions."""
    layout = rng.choice(
        ("question_last", "question_last", "question_first", "question_both", "plain", "split")
    )
    with_passages = rng.random() < 0.7
    with_facts = not with_passages or rng.random() < 0.85
    passages = rng.randint(1, max(1, min(14, size // 384))) if with_passages else 0
    facts = rng.randint(1, max(1, min(200, size // 48))) if with_facts else 0
    items = make_items(rng, facts, passages)
    budget = (
        int(size * rng.uniform(0.25, 0.6))
        if size <= 1024
        else max(400, int(size * rng.uniform(0.08, 0.2)))
    )
    asked: list[Item] = []
    used = 0
    while len(asked) < 24:
        item = rng.choice(items)
        cost = len(pieces(item.question)) + len(pieces(item.answer)) + 8
        if asked and used + cost > budget:
            break
        asked.append(item)
        used += cost
    body = size - used - 30
    # If not all items fit, drop those that are not asked for, the largest first.
    chosen = {id(item) for item in asked}
    sizes = {id(item): len(pieces(item.text)) + 1 for item in items}
    total = sum(sizes.values())
    for item in sorted(items, key=lambda i: -sizes[id(i)]):
        if total <= body:
            break
        if id(item) not in chosen:
            items.remove(item)
            total -= sizes[id(item)]
    if rng.random() < 0.1:
        body = 0  # no filler at all
    return conversation(rng, layout, items, asked, body)
