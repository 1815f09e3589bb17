"""Scores of one reply, all in 0..1: ours for the made-up tasks, LongBench's own for its datasets.

LongBench's definitions (Bai et al. 2024, arXiv 2308.14508, and the evaluation script published with
it) are implemented here anew: token F1 of SQuAD, ROUGE-L as the ``rouge`` package computes it,
``fuzz.ratio`` of fuzzywuzzy.
"""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Sequence
from difflib import SequenceMatcher

# -- made-up tasks


def states(reply: str, answer: str) -> bool:
    """Whether the reply holds the answer as a word of its own."""
    return re.search(rf"(?<!\w){re.escape(answer)}(?!\w)", reply) is not None


def any_stated(reply: str, answers: Sequence[str]) -> float:
    """1 if one of the answers stands in the reply, else 0."""
    return float(any(states(reply, answer) for answer in answers))


def share_stated(reply: str, answers: Sequence[str]) -> float:
    """Share of the answers that stand in the reply (RULER's string match of all references)."""
    return sum(states(reply, answer) for answer in answers) / len(answers)


def pairs_listed(reply: str, answers: Sequence[str]) -> float:
    """Share of the "name value" pairs of which the value follows the name in the reply, before any
    other digit or line.
    """

    def listed(pair: str) -> bool:
        name, value = pair.split(" ", 1)
        return (
            re.search(rf"(?<!\w){re.escape(name)}\b[^\n\d]*?(?<!\w){re.escape(value)}(?!\w)", reply)
            is not None
        )

    return sum(listed(pair) for pair in answers) / len(answers)


def recited(reply: str, answers: Sequence[str]) -> float:
    """Words right from the start, as a share of the passage's; a leading "Passage NAME:" does not
    count.
    """
    wanted, got = answers[0].split(), re.sub(r"^\s*Passage \w+:", "", reply).split()
    right = 0
    while right < min(len(wanted), len(got)) and wanted[right] == got[right]:
        right += 1
    return right / len(wanted)


# -- LongBench


def qa_f1(reply: str, answers: Sequence[str]) -> float:
    """SQuAD's token F1 after dropping case, punctuation and articles; the best of the answers."""
    return max(_f1(_plain_words(reply), _plain_words(answer)) for answer in answers)


def _plain_words(text: str) -> list[str]:
    text = "".join(c for c in text.lower() if c not in string.punctuation)
    return re.sub(r"\b(a|an|the)\b", " ", text).split()


def _f1(got: list[str], wanted: list[str]) -> float:
    same = sum((Counter(got) & Counter(wanted)).values())
    return 2 * same / (len(got) + len(wanted)) if same else 0.0


def rouge_l(reply: str, answers: Sequence[str]) -> float:
    """Summary-level ROUGE-L F1, the best of the answers: sentences end at full stops, and the union
    of the common subsequences of all pairs of sentences counts distinct words."""
    return max(_rouge_l(reply, answer) for answer in answers)


def _rouge_l(reply: str, answer: str) -> float:
    got, wanted = ([part.split() for part in text.split(".") if part] for text in (reply, answer))
    got_words, wanted_words = (
        {word for sentence in sentences for word in sentence} for sentences in (got, wanted)
    )
    common = {
        word for theirs in wanted for ours in got for word in _common_subsequence(theirs, ours)
    }
    return 2 * len(common) / (len(got_words) + len(wanted_words)) if common else 0.0


def _common_subsequence(a: Sequence[str], b: Sequence[str]) -> list[str]:
    """A longest common subsequence."""
    lengths = [[0] * (len(b) + 1) for _ in range(len(a) + 1)]
    for i, x in enumerate(a, 1):
        for j, y in enumerate(b, 1):
            lengths[i][j] = (
                lengths[i - 1][j - 1] + 1 if x == y else max(lengths[i - 1][j], lengths[i][j - 1])
            )
    out, i, j = [], len(a), len(b)
    while i and j:
        if a[i - 1] == b[j - 1]:
            out.append(a[i - 1])
            i, j = i - 1, j - 1
        elif lengths[i - 1][j] > lengths[i][j - 1]:
            i -= 1
        else:
            j -= 1
    return out[::-1]


def classification(reply: str, answers: Sequence[str], classes: Sequence[str]) -> float:
    """1 / (class names in the reply) if the right one is among them, else 0. Names that are only a
    part of the right one don't count.
    """
    best = 0.0
    for answer in answers:
        found = [
            name for name in classes if name in reply and not (name in answer and name != answer)
        ]
        best = max(best, 1 / len(found) if answer in found else 0.0)
    return best


def number_share(reply: str, answers: Sequence[str]) -> float:
    """Share of the reply's numbers that are the answer's (LongBench's retrieval and counts)."""
    numbers = re.findall(r"\d+", reply)
    wanted = {number for answer in answers for number in re.findall(r"\d+", answer)}
    return sum(number in wanted for number in numbers) / len(numbers) if numbers else 0.0


def code_similarity(reply: str, answers: Sequence[str]) -> float:
    """Edit similarity of the reply's first line of code, in whole hundredths."""
    lines = reply.lstrip("\n").split("\n")
    first = next((line for line in lines if not any(mark in line for mark in ("`", "#", "//"))), "")
    return max(
        round(100 * SequenceMatcher(None, first, answer).ratio()) / 100 for answer in answers
    )


def first_line(reply: str) -> str:
    """What counts of a reply to a few-shot prompt: it may go on with further examples."""
    return reply.lstrip("\n").split("\n")[0]
