"""One engine answers the grid; runs in a child process."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.accuracy.cells import DENSE, Group, Setting
from benchmarks.accuracy.longbench import find_tasks
from benchmarks.accuracy.summary import says_nothing, score

REQUESTS = 16
"""Prompts that are answered at once."""


@dataclass(frozen=True)
class EngineSpec:
    """How the engine is started.

    Attributes:
        model, head: folders; no head where no setting needs one.
        retriever: to start with; the others are switched to.
        eager: no CUDA graphs; needed to switch to retrievers that select in each layer.
        max_model_len: tokens of the longest prompt and its reply.
    """

    model: str
    head: str | None
    retriever: str
    dtype: str
    on_gpu: bool
    eager: bool
    max_model_len: int

    def arguments(self) -> dict[str, Any]:
        """Of ``LLM(...)``, less what forces tokens."""
        # The page table is as wide as the longest context, so that every budget may follow.
        config = {"retriever": self.retriever, "budget": self.max_model_len, **({"retrieval_head": self.head} if self.head else {})}
        return {
            "model": self.model, "dtype": self.dtype, "seed": 0, "max_model_len": self.max_model_len, "max_num_seqs": REQUESTS,
            "enable_prefix_caching": True, "enforce_eager": self.eager, "disable_log_stats": True, "attention_backend": "specontext",
            "additional_config": {"specontext": config},
        }  # fmt: skip


def run_engine(spec: EngineSpec, work: Sequence[tuple[Group, Sequence[Setting]]], longbench: Path | None) -> Iterator[tuple[str, Any]]:
    """Answer each group's prompts once with each of its settings.

    A group's prompts are prefilled first. Their pages hold prompt tokens only and are always made densely, so that all settings read
    the same. Where dense comes first and cannot do the task, the group's other settings are left out, and so are the task's later
    (longer) groups: they would say nothing.

    Yields:
        ``("ready", facts)``; then ``("prefilled", (group, seconds))`` and ``("cell", (group, setting, result))`` or, for replies that cannot be
        scored, ``("failed", (group, setting, why))``, groups by their index.
        A result has ``replies`` (texts, or lists of log-probabilities), their ``scores``, ``tokens`` emitted, ``seconds`` they took, share
        of the prompts' tokens that were ``cached``, and the engine's ``stats``.
    """
    begin = time.perf_counter()
    from vllm import LLM, SamplingParams

    from benchmarks.accuracy import forcing

    tasks, failed = find_tasks(longbench), set()
    arguments = spec.arguments()
    forces = any(example.forced for group, _ in work for example in group.examples)
    llm = LLM(**arguments, **(forcing.engine_arguments(spec.on_gpu) if forces else {}))
    yield "ready", {"start_s": round(time.perf_counter() - begin, 1), "arguments": arguments}
    for index, (group, settings) in enumerate(work):
        task = tasks[group.task]
        if task.name in failed:
            continue
        prompts = [{"prompt_token_ids": e.prompt} for e in group.examples]
        params = [
            SamplingParams(temperature=0, max_tokens=e.reply_tokens) if e.forced is None else forcing.forced_params(e.forced, spec.on_gpu)
            for e in group.examples
        ]
        start = time.perf_counter()
        llm.generate(prompts, SamplingParams(temperature=0, max_tokens=1), use_tqdm=False)
        yield "prefilled", (index, round(time.perf_counter() - start, 2))
        for setting in settings:
            llm.collective_rpc("specontext_set", kwargs=setting.changes())
            llm.collective_rpc("specontext_stats", args=(True,))
            start = time.perf_counter()
            outputs = llm.generate(prompts, params, use_tqdm=False)
            seconds = time.perf_counter() - start
            try:
                replies = [
                    output.outputs[0].text if e.forced is None else forcing.log_probabilities(output.outputs[0], e.forced)
                    for output, e in zip(outputs, group.examples, strict=True)
                ]
            except RuntimeError as error:  # one task's trouble, not the grid's
                yield "failed", (index, setting, str(error))
                continue
            scores = [score(task, example, reply) for example, reply in zip(group.examples, replies, strict=True)]
            yield "cell", (index, setting, {
                "replies": replies, "scores": scores, "seconds": round(seconds, 3),
                "tokens": sum(len(output.outputs[0].token_ids) for output in outputs),
                "cached": sum(output.num_cached_tokens for output in outputs) / sum(len(e.prompt) for e in group.examples),
                "stats": llm.collective_rpc("specontext_stats")[0],
            })  # fmt: skip
            if setting.retriever == DENSE and says_nothing(task, scores):
                failed.add(task.name)
                break
