"""Requests with settings of their own, beside each other on one engine."""

from __future__ import annotations

import random
from typing import Any

from specontext_vllm.config import pages_for
from tests.engine.poison import poison_unread
from tests.engine.scenarios import ids, sampling

TOKENS = 20
"""Of an answer: two pages are begun."""


def scattered() -> list[list[int]]:
    """Prompts of random tokens: what the model says to them hangs on all that it reads, so answers
    at two budgets differ on any device. Three are in no one's way.
    """
    return [random.Random(length).choices(range(16, 3000), k=length) for length in (340, 470, 530)]


def with_own(own: dict[str, Any] | None, **changes: Any) -> Any:
    """Sampling parameters of a request with settings of its own."""
    return sampling(**{"max_tokens": TOKENS, "extra_args": own, **changes})


def mixed(llm: Any, prompts: list[list[int]], kinds: dict[str, Any]) -> dict[str, Any]:
    """Every prompt with every kind of settings, in batches in which all kinds meet: the answers of
    each kind, by its name, where nothing was preempted; ``pages``: what they must have read.
    """
    llm.reset_prefix_cache()
    asked = [(name, prompt) for prompt in prompts for name in kinds]
    replies = llm.generate(
        [{"prompt_token_ids": prompt} for _, prompt in asked],
        [with_own(kinds[name]) for name, _ in asked],
        use_tqdm=False,
    )
    assert not any(reply.metrics.num_preemptions for reply in replies)
    out: dict[str, Any] = {name: [] for name in kinds}
    for (name, _), tokens in zip(asked, ids(replies), strict=True):
        out[name].append(tokens)
    return out


def counted(llm: Any) -> dict[str, float]:
    """What the metrics count of such requests."""
    names = ("own_budget_rows", "own_budget_pages_read", "dense_rows", "dense_pages_read")
    found = {metric.name.removeprefix("vllm:specontext_"): metric for metric in llm.get_metrics()}
    return {name: found[name].value for name in names}


def pages_read(prompts: list[list[int]], budget: int | None, heads: int = 2) -> int:
    """Head pages that the decode steps of answers to ``prompts`` read; None: of whole contexts."""
    contexts = [len(prompt) + step for prompt in prompts for step in range(1, TOKENS)]
    most = 2**30 if budget is None else budget // 16
    return heads * sum(min(pages_for(tokens), most) for tokens in contexts)


def poisoned(llm: Any, prompts: list[list[int]], own: list[Any]) -> dict[str, Any]:
    """Answers to prompts at once, each with its own settings, while every head page that a row does
    not read is NaN.
    """
    llm.reset_prefix_cache()
    runner, out = llm.llm_engine.model_executor.driver_worker.worker.model_runner, {}
    step = runner.runtime.step
    poison_unread(runner, out)
    try:
        asked = [{"prompt_token_ids": prompt} for prompt in prompts]
        replies = llm.generate(asked, list(map(with_own, own)), use_tqdm=False)
        out["tokens"] = ids(replies)
    finally:
        del step.before_model, step.after_model
    return out
