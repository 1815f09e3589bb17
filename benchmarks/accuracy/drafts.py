"""Questions over long texts, drawn from a seed.

Text, facts and questions are those of the bundled demo model (specontext_vllm/synthetic/tasks.py):
plain English that any chat model reads. Every example is drawn from (document, seed) under a split
of its own, so the demo model never saw one. Tasks of the same document share its text up to the
question, and so its pages in the prefix cache.
"""

from __future__ import annotations

from random import Random

from benchmarks.accuracy.writer import Draft
from specontext_vllm.synthetic import tasks as demo
from specontext_vllm.synthetic import words as W

MAX_FACTS = 64
"""Facts of a document; one per 128 tokens up to that."""
VALUES = 4
"""Values of one name in the multi-value tasks, and questions of a multi-query conversation."""
CHAINS, HOPS = 4, 4
"""Chains of variable tracking, and names in each."""
COMMON, TIMES_AS_COMMON = 10, 10
"""Common words to find, and how many times as often as any other each stands in the list (RULER:
ten, 30 times against 3).
"""
QUESTION_PIECES = 96
"""Room for what stands beside the text: the same for all tasks, so that those of one document share
all of it.
"""
LONG_PASSAGE = 30
"""Sentences of the long passage, nine tokens each with the demo's tokenizer."""


# -- documents


def document_random(name: str, seed: int) -> Random:
    """The numbers that a document is drawn from; its split is held out from training."""
    return demo.random_for(seed, f"accuracy/{name}")


def _text(rng: Random, items: list[demo.Item], size: int) -> str:
    return "\n".join(demo.context_lines(rng, items, size - QUESTION_PIECES))


def _facts(seed: int, size: int, count: int) -> tuple[list[demo.Item], str]:
    rng = document_random(f"facts/{count}", seed)
    items = demo.make_items(rng, count, 0)
    return items, _text(rng, items, size)


def _passages(seed: int, size: int) -> tuple[list[demo.Item], str]:
    rng = document_random("passages", seed)
    items = demo.make_items(rng, 4, _few(size))
    return items, _text(rng, items, size)


def _user(text: str, question: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": f"{text}\n{question}"}]


def _many(size: int) -> int:
    return max(VALUES + 1, min(MAX_FACTS, size // 128))


def _few(size: int) -> int:
    return max(2, min(12, size // 512))


# -- drafts


def _ask(items: list[demo.Item], text: str) -> Draft:
    """Ask for the last item, the ones before it asked and answered earlier in the conversation."""
    messages = _user(text, items[0].question)
    for answered, item in zip(items, items[1:]):
        messages += [
            {"role": "assistant", "content": answered.answer},
            {"role": "user", "content": item.question},
        ]
    return Draft(messages, (items[-1].target,), items[-1].answer)


def single(seed: int, size: int) -> Draft:
    items, text = _facts(seed, size, 1)
    return _ask(items, text)


def multi_key(seed: int, size: int) -> Draft:
    items, text = _facts(seed, size, _many(size))
    return _ask([_key_item(seed, items)], text)


def _key_item(seed: int, items: list[demo.Item]) -> demo.Item:
    return document_random("multi_key", seed).sample(items, 1)[0]


def multi_query(seed: int, size: int) -> Draft:
    items, text = _facts(seed, size, _many(size))
    # Without multi_key's question: its answer would be in the prefix cache, from KV that sparse
    # attention made.
    others = [item for item in items if item is not _key_item(seed, items)]
    return _ask(document_random("multi_query", seed).sample(others, VALUES), text)


def key_among_passages(seed: int, size: int) -> Draft:
    """As ``multi_key``, with passages among the facts: a retriever that takes both for what is
    asked has to share its budget between them.
    """
    rng = document_random("key_among_passages", seed)
    items = demo.make_items(rng, _many(size), _few(size))
    text = _text(rng, items, size)
    return _ask([rng.choice([item for item in items if item.kind == "needle"])], text)


def demo_needle(seed: int, size: int) -> Draft:
    """The needle problem of the demo and the tests, in one of its six layouts by seed: as many
    facts and passages as in ``key_among_passages``.
    """
    problem = demo.make_problem(
        "needle",
        seed=seed,
        approx_tokens=size,
        distractors=_many(size) - 1,
        split="accuracy/demo_needle",
    )
    return Draft(
        problem.messages, (problem.answer,), demo.FACT_ANSWER.format(key="", value=problem.answer)
    )


def list_facts(seed: int, size: int) -> Draft:
    items, text = _facts(seed, size, _many(size))
    lines = [item.answer for item in items]
    pairs = tuple(f"{_name(item)} {item.target}" for item in items)
    return Draft(
        _user(text, "List all names that have a code, each with its code, one in a line."),
        pairs,
        "\n".join(lines),
    )


def _name(item: demo.Item) -> str:
    return next(word for word in item.answer.replace(".", " ").split() if word in KEYS)


KEYS = frozenset(W.KEYS)
"""Names that facts and passages are about."""


def multi_value(seed: int, size: int, every: bool) -> Draft:
    """One name with several values in facts of their own; ``every``: the question asks for all of
    them.
    """
    rng = document_random("multi_value", seed)
    others = demo.make_items(rng, _many(size), 0)
    key = _name(others[0])
    values = rng.sample(range(100000, 1000000), VALUES)
    asked = [
        demo.Item(
            "needle",
            form.format(key=key, value=value),
            rng.choice(demo.FACT_QUESTIONS).format(key=key),
            "",
            str(value),
        )
        for form, value in zip(rng.sample(demo.FACTS, VALUES), values)
    ]
    text = _text(rng, others[1:] + asked, size)
    question = (
        f"{key} has {VALUES} different codes. List all codes of {key}."
        if every
        else asked[0].question
    )
    answers = tuple(item.target for item in asked)
    reply = " ".join(
        demo.FACT_ANSWER.format(key=key, value=value)
        for value in (answers if every else answers[:1])
    )
    return Draft(_user(text, question), answers, reply)


def variables(seed: int, size: int) -> Draft:
    """Chains of "let Y be the same as X"; asked for are the names of the first chain's number."""
    rng = document_random("variables", seed)
    names = rng.sample(W.KEYS, CHAINS * HOPS)
    numbers = rng.sample(range(10000, 100000), CHAINS)
    fillers = (size - CHAINS * HOPS * 9 - QUESTION_PIECES) // 9
    places: list[tuple[float, str]] = [(rng.random(), demo.sentence(rng)) for _ in range(fillers)]
    for chain, number in enumerate(numbers):
        own = names[chain * HOPS : (chain + 1) * HOPS]
        steps = [
            f"Let {own[0]} be {number}.",
            *(f"Let {after} be the same as {before}." for before, after in zip(own, own[1:])),
        ]
        # A name must be set before it is used.
        places += list(zip(sorted(rng.random() for _ in steps), steps))
    text = " ".join(line for _, line in sorted(places))
    answers = tuple(names[:HOPS])
    return Draft(
        _user(text, f"Which names stand for the number {numbers[0]}? List all {HOPS} of them."),
        answers,
        ", ".join(answers) + ".",
    )


def common_words(seed: int, size: int) -> Draft:
    """A list of words of which some stand there ten times as often as the others."""
    rng = document_random("common_words", seed)
    pool = list(dict.fromkeys([*W.NOUNS, *W.ADJECTIVES, *W.VERBS]))
    rng.shuffle(pool)
    common, rare = pool[:COMMON], pool[COMMON:]
    total = (size - QUESTION_PIECES) // 2  # a word and its comma
    # As few times as the pool allows.
    times = -(-total // (COMMON * TIMES_AS_COMMON + len(rare)))
    rare = rare[: max(1, total // times - COMMON * TIMES_AS_COMMON)]
    words = [word for word in common for _ in range(times * TIMES_AS_COMMON)] + [
        word for word in rare for _ in range(times)
    ]
    rng.shuffle(words)
    question = (
        "The list above holds some words more often than the others. "
        f"What are the {COMMON} most common words in it?"
    )
    return Draft(_user(", ".join(words) + ".", question), tuple(common), ", ".join(common) + ".")


def recitation(seed: int, size: int) -> Draft:
    items, text = _passages(seed, size)
    return _ask(
        [document_random("recitation", seed).choice([i for i in items if i.kind == "recitation"])],
        text,
    )


def long_recitation(seed: int, size: int) -> Draft:
    rng = document_random("long_recitation", seed)
    items = demo.make_items(rng, 4, 2)
    keys = KEYS - {word for item in items for word in item.text.replace(":", " ").split()}
    key, body = rng.choice(sorted(keys)), " ".join(demo.sentence(rng) for _ in range(LONG_PASSAGE))
    text = demo.PASSAGE.format(key=key, body=body)
    asked = demo.Item(
        "recitation", text, rng.choice(demo.PASSAGE_QUESTIONS).format(key=key), text, body
    )
    return _ask([asked], _text(rng, [*items, asked], size))
