"""Drafts that a test makes up: what is known to follow, wrong at every place in turn."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

DRAFTS = 3
CONFIG = {
    "method": "ngram",
    "num_speculative_tokens": DRAFTS,
    "prompt_lookup_max": 2,
    "prompt_lookup_min": 2,
}


class Script:
    """Prompts with their answers.

    Attributes:
        kept: how often a row kept so many of its tokens, of rows that had ``DRAFTS`` drafts.
        firsts: of each request, by its name, the first token's position of the row in which each
            position was computed.
    """

    def __init__(self) -> None:
        self.answers: dict[tuple[int, ...], list[int]] = {}
        self.kept: Counter[int] = Counter()
        self.firsts: dict[str, dict[int, int]] = {}

    def follow(self, prompts: list[list[int]], answers: list[list[int]]) -> None:
        """From now on these are drafted."""
        for prompt, answer in zip(prompts, answers, strict=True):
            self.answers[tuple(prompt)] = answer

    def drafts(self, tokens: list[int]) -> list[int]:
        """For a request of ``tokens`` so far: up to ``DRAFTS``, one of them wrong, or none."""
        for prompt, answer in self.answers.items():
            if tuple(tokens[: len(prompt)]) == prompt and len(tokens) > len(prompt):
                drafted = answer[len(tokens) - len(prompt) :][:DRAFTS]
                # Not by the length alone: whole rows would lead to whole rows.
                wrong = len(tokens) // 3 % (DRAFTS + 1)
                return [token + (place == wrong) for place, token in enumerate(drafted)]
        return []

    def watch(self, runner: Any) -> None:
        """Note what the steps of an engine keep."""
        step = runner.runtime.step
        after = step.after_model

        def after_model(batch: Any, aux: Any) -> None:
            starts = batch.query_starts.tolist()
            for row in range(batch.num_decodes):
                count = batch.query_lens[row]
                kept = count if batch.kept is None else int(batch.kept[row])
                self.kept[kept] += count == 1 + DRAFTS
                first = int(batch.positions[starts[row]])
                firsts = self.firsts.setdefault(batch.names[row], {})
                firsts |= dict.fromkeys(range(first, first + kept), first)
            after(batch, aux)

        step.after_model = after_model


@contextmanager
def scripted_drafts() -> Iterator[Script]:
    """Engines with ``CONFIG`` that run meanwhile draft by a script, which is yielded."""
    from vllm.v1.spec_decode.ngram_proposer import NgramProposer

    script = Script()

    def propose(
        proposer: Any, count: int, sampled: list[list[int]], ends: Any, tokens: Any, **_: Any
    ) -> list[list[int]]:
        return [
            script.drafts(tokens[row, : ends[row]].tolist())[:count] if of_row else []
            for row, of_row in enumerate(sampled)
        ]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(NgramProposer, "propose", propose)
        yield script
