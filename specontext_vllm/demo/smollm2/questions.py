"""What the demo asks about the first chapters of *Northanger Abbey* (Jane Austen, 1803; public
domain).
"""

from __future__ import annotations

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
    (
        "What was the name of Catherine Morland's father?",
        "Catherine Morland's father was a clergyman, and his name was",
        "Richard",
    ),
    (
        "What was Catherine three months in learning?",
        'Her mother was three months in teaching her only to repeat the "',
        "Beggar's Petition",
    ),
    (
        "In which village do the Morlands live?",
        "The Morlands live in a village called",
        "Fullerton",
    ),
    (
        "Where in Bath did they lodge?",
        "They were settled in comfortable lodgings in",
        "Pulteney Street",
    ),
)
"""What the novel itself answers, in its order: a question, the answer's beginning and its end."""

QUOTED = (
    "Mr. Allen, who owned the chief of the property about Fullerton, the",
    "It is now expedient to give some description of Mrs. Allen, that",
)
"""Beginnings of passages that are to be repeated. At 4,000 tokens dense attention gives each word
that follows at least 0.1 nats more than any other; where it is less sure, reading less may turn the
choice.
"""

REPEATED = 16
"""Words of a passage that must follow."""

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
    """All questions that the text of the prompt answers; they share about ``tokens`` tokens.

    The model is small and was not trained to quote, so each answer is begun for it.

    Args:
        tokenizer: the model's tokenizer.json.
    """
    paragraphs = excerpt(tokenizer, tokens - SPARE_TOKENS)
    for number, (fact, *_) in enumerate(FACTS):
        at = (2 * number + 1) * len(paragraphs) // (2 * len(FACTS))
        paragraphs.insert(at, fact)
    text = "\n\n".join(paragraphs)
    facts = [
        Question(asked, _messages(text, asked, start), end, partial(_holds, end), 1.0, 12)
        for asked, start, end in [*[fact[1:] for fact in FACTS], *OF_THE_TEXT]
        if end in text
    ]
    return [*facts, *[_quotation(text, start) for start in QUOTED if start in text]]


def _quotation(text: str, start: str) -> Question:
    following = text[text.index(start) + len(start) :].split()[:REPEATED]
    # A question that quotes makes the model talk about the quotation; this one it follows.
    begun = f"Here is an excerpt from the text above, repeated:\n\n{start}"
    return Question(
        f"Repeat the passage. Here is an excerpt from the text above, repeated: {start}",
        _messages(text, "Repeat the passage.", begun),
        " ".join(following),
        partial(_copied, following),
        0.9,
        round(1.6 * REPEATED),
    )


def _messages(text: str, asked: str, start: str) -> list[dict[str, str]]:
    return [
        {"role": "user", "content": f"{text}\n\n{asked}"},
        {"role": "assistant", "content": start},
    ]


def _holds(end: str, reply: str) -> float:
    """Whether the reply begins with these words."""
    return float(reply.lstrip(' "').startswith(end))


def _copied(expected: list[str], reply: str) -> float:
    """Share of the words that the reply gives before its first mistake."""
    right = 0
    for word, given in zip(expected, reply.split(), strict=False):
        if word != given:
            break
        right += 1
    return right / len(expected)
