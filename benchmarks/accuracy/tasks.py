"""Long-context tasks in the manner of RULER (Hsieh et al. 2024, arXiv 2404.06654), recitation and
lists, for any tokenizer.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

from benchmarks.accuracy import metrics
from benchmarks.accuracy.drafts import (
    COMMON,
    HOPS,
    LONG_PASSAGE,
    MAX_FACTS,
    VALUES,
    common_words,
    demo_needle,
    key_among_passages,
    list_facts,
    long_recitation,
    multi_key,
    multi_query,
    multi_value,
    recitation,
    single,
    variables,
)
from benchmarks.accuracy.writer import Draft, Example, Writer

Kind = Literal["right", "score", "perplexity"]


@dataclass(frozen=True)
class Task:
    """A kind of question.

    Attributes:
        kind: "right" (0 or 1 each), "score" (0..1 each) or "perplexity".
        metric: (reply, answers) -> 0..1; not for perplexity.
        make: (writer, seed, context) -> example.
        count: examples there are; None for as many as one likes.
        about: one line for the notes under the table.
        floor: where dense attention scores less, the task says nothing about a retriever.
    """

    name: str
    kind: Kind
    metric: Callable[[str, Sequence[str]], float] | None
    make: Callable[[Writer, int, int], Example]
    about: str
    count: int | None = None
    floor: float = 0.3


def _task(
    name: str,
    kind: Kind,
    metric: Callable[[str, Sequence[str]], float] | None,
    draft: Callable[[int, int], Draft],
    about: str,
) -> Task:
    def make(writer: Writer, seed: int, context: int) -> Example:
        return writer.fit(lambda size: draft(seed, size), context, force=kind == "perplexity")

    return Task(name, kind, metric, make, about)


TASKS = {
    task.name: task
    for task in (
        _task("single", "right", metrics.any_stated, single, "one fact in random sentences"),
        _task(
            "multi_key",
            "right",
            metrics.any_stated,
            multi_key,
            f"one of up to {MAX_FACTS} facts of the same form",
        ),
        _task(
            "multi_query",
            "right",
            metrics.any_stated,
            multi_query,
            f"the last of {VALUES} questions of one conversation, the others answered",
        ),
        _task(
            "key_among_passages",
            "right",
            metrics.any_stated,
            key_among_passages,
            f"one of up to {MAX_FACTS} facts, passages of three to eight sentences among them",
        ),
        _task(
            "demo_needle",
            "right",
            metrics.any_stated,
            demo_needle,
            "the same as the demo asks it: the question behind or before the text, both, after an "
            "earlier one, or without a chat's form",
        ),
        _task(
            "list_facts",
            "score",
            metrics.pairs_listed,
            list_facts,
            "every name with its code, hundreds of tokens; share of pairs",
        ),
        _task(
            "one_value",
            "right",
            metrics.any_stated,
            lambda seed, size: multi_value(seed, size, False),
            f"one of the {VALUES} values of a name that has facts of its own for each; any of them "
            "is right",
        ),
        _task(
            "multi_value",
            "score",
            metrics.share_stated,
            lambda seed, size: multi_value(seed, size, True),
            f"all {VALUES} values of a name; share found",
        ),
        _task(
            "variables",
            "score",
            metrics.share_stated,
            variables,
            f"names that chains of {HOPS} assignments lead to; share found",
        ),
        _task(
            "common_words",
            "score",
            metrics.share_stated,
            common_words,
            f"the {COMMON} words that a list holds most often; share found",
        ),
        _task(
            "recitation",
            "score",
            metrics.recited,
            recitation,
            "a passage of three to eight sentences; share right from the start",
        ),
        _task(
            "perplexity",
            "perplexity",
            None,
            recitation,
            "of the same passage, emitted by force: each token's probability is that of a decode "
            "step that read only the selection",
        ),
        _task(
            "long_recitation",
            "score",
            metrics.recited,
            long_recitation,
            f"a passage of {LONG_PASSAGE} sentences; share right from the start",
        ),
    )
}
