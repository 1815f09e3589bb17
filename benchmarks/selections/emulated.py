"""Misses of real selections, followed in transformers."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from benchmarks.selections.buffers import Follower, Policy, StepCounts
from benchmarks.selections.scored_steps import Course, run_steps
from benchmarks.selections.tally import figures, repeated
from specontext_vllm.config import pages_for
from specontext_vllm.retrieval.head import RetrievalHead


@dataclass(frozen=True)
class Chooser:
    """Who gives the pages their scores.

    Attributes:
        head: None: the model's own attention.
        sparse: the model reads what is selected, and the head sees the states that this makes; each
            policy then takes a run of its own. Else all policies follow one dense run.
        last_look: with ``sparse``; see ``marks.heads.Serving``.
    """

    name: str
    head: RetrievalHead | None = None
    sparse: bool = False
    last_look: bool = False


def measure(
    model: Any,
    chooser: Chooser,
    policies: Sequence[Policy],
    course: Course,
    go_on: Callable[[], bool] = lambda: True,
) -> Iterator[tuple[Policy, dict[str, Any]]]:
    """The figures of each policy (``tally.figures``); for text of the model's own also the share
    that is ``repeated``.

    Args:
        go_on: asked before each run.
    """
    runs = [[policy] for policy in policies] if chooser.sparse else [list(policies)]
    for together in runs:
        if not go_on():
            return
        yield from _run(model, chooser, together, course)


def _run(
    model: Any, chooser: Chooser, policies: Sequence[Policy], course: Course
) -> Iterator[tuple[Policy, dict[str, Any]]]:
    texts, length = course.tokens.shape
    config = model.config
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    followers = [
        Follower(policy, texts, heads, pages_for(length), model.device) for policy in policies
    ]
    steps: list[list[StepCounts]] = [[] for _ in policies]

    def choose(scores: torch.Tensor, position: int) -> torch.Tensor | None:
        chosen = None
        for follower, mine in zip(followers, steps, strict=True):
            chosen, counts = follower.follow(scores, position)
            mine.append(counts)
        return chosen if chooser.sparse else None

    followed = list(run_steps(model, chooser.head, course, choose, chooser.last_look))
    own: dict[str, Any] = {}
    if not course.forced:
        own["repeated"] = repeated(torch.stack(followed, 1).cpu().numpy())
    for policy, mine in zip(policies, steps, strict=True):
        yield policy, {**figures(mine), **own}
