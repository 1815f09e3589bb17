"""One engine answers the grid; runs in a child process."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.accuracy.cells import DENSE, Group, Setting
from benchmarks.accuracy.longbench import find_tasks
from benchmarks.accuracy.summary import says_nothing, score

REQUESTS = 16
"""Prompts that are answered at once."""

KEPT = 0.9
"""Share of the KV cache that the prompts and replies of a portion may take, so that none of them is
evicted before the last setting.
"""


@dataclass(frozen=True)
class EngineSpec:
    """How the engine is started.

    Attributes:
        model, head: folders; no head where no setting needs one.
        head_keys: what the head's keys are kept in (the setting head_key_dtype).
        retriever: to start with; the others are switched to.
        eager: no CUDA graphs; needed to switch to retrievers that select in each layer.
        max_model_len: tokens of the longest prompt and its reply.
        kv_gib: GPU memory for KV; None: what vLLM finds free.
    """

    model: str
    head: str | None
    head_keys: str
    retriever: str
    dtype: str
    on_gpu: bool
    eager: bool
    max_model_len: int
    kv_gib: float | None = None

    def arguments(self) -> dict[str, Any]:
        """Of ``LLM(...)``, less what forces tokens."""
        # The page table is as wide as the longest context, so that every budget can be set later.
        config = {
            "retriever": self.retriever,
            "budget": self.max_model_len,
            "head_key_dtype": self.head_keys,
        }
        if self.head:
            config["retrieval_head"] = self.head
        # With the room for KV given, vLLM only checks that the share is free at the start and
        # measures nothing that other engines could disturb.
        room = (
            {}
            if self.kv_gib is None
            else {"kv_cache_memory_bytes": int(self.kv_gib * 2**30), "gpu_memory_utilization": 0.3}
        )
        return {
            "model": self.model,
            "dtype": self.dtype,
            "seed": 0,
            "max_model_len": self.max_model_len,
            "max_num_seqs": REQUESTS,
            "enable_prefix_caching": True,
            "enforce_eager": self.eager,
            "disable_log_stats": True,
            "attention_backend": "specontext",
            "additional_config": {"specontext": config},
            **room,
        }


def portions(lengths: Sequence[int], room: int) -> list[range]:
    """Prompts, by their places, that the prefix cache keeps together; one that is longer than the
    room is alone.

    Args:
        lengths: tokens of each with its reply. room: tokens.
    """
    out: list[range] = []
    first, taken = 0, 0
    for place, length in enumerate(lengths):
        if taken and taken + length > room:
            out.append(range(first, place))
            first, taken = place, 0
        taken += length
    return [*out, range(first, len(lengths))]


@dataclass
class Answers:
    """What came of a group's prompts under one setting, portion by portion."""

    replies: list[Any] = field(default_factory=list)
    scores: list[float] = field(default_factory=list)
    tokens: int = 0
    cached: int = 0
    asked: int = 0
    seconds: float = 0.0
    stats: list[dict[str, Any]] = field(default_factory=list)

    def add(self, outputs: Sequence[Any], seconds: float, stats: dict[str, Any]) -> None:
        """Count a portion's outputs; the caller, who can read them, adds replies and scores."""
        self.tokens += sum(len(output.outputs[0].token_ids) for output in outputs)
        self.cached += sum(output.num_cached_tokens for output in outputs)
        self.asked += sum(len(output.prompt_token_ids) for output in outputs)
        self.seconds += seconds
        self.stats.append(stats)

    def result(self) -> dict[str, Any]:
        """As ``run_engine`` yields it; the kept mass is a mean over the decode rows, None of
        retrievers without a head.
        """
        stats = {
            key: sum(part[key] for part in self.stats)
            for key in ("decode_rows", "fallback_rows", "pages_read", "pages_total")
        }
        masses = [(part["kept_mass_mean"], part["decode_rows"]) for part in self.stats]
        known = all(mass is not None for mass, _ in masses)
        stats["kept_mass_mean"] = (
            sum(mass * rows for mass, rows in masses) / max(1, stats["decode_rows"])
            if known
            else None
        )
        return {
            "replies": self.replies,
            "scores": self.scores,
            "seconds": round(self.seconds, 3),
            "tokens": self.tokens,
            "cached": self.cached / self.asked,
            "stats": stats,
        }


def run_engine(
    spec: EngineSpec, work: Sequence[tuple[Group, Sequence[Setting]]], longbench: Path | None
) -> Iterator[tuple[str, Any]]:
    """Answer each group's prompts once with each of its settings.

    A group's prompts are prefilled first, as many at a time as the KV cache keeps. Their pages hold
    prompt tokens only and are always made densely, so that all settings read the same. Where dense
    comes first and cannot do the task, the group's other settings are left out, and so are the
    task's later (longer) groups: they would say nothing.

    Yields:
        ``("ready", facts)``; then ``("prefilled", (group, seconds))`` a portion and
        ``("cell", (group, setting, result))`` or, for replies that cannot be scored,
        ``("failed", (group, setting, why))``, groups by their index. A result has ``replies``
        (texts, or lists of log-probabilities), their ``scores``, ``tokens`` emitted, ``seconds``
        they took, share of the prompts' tokens that were ``cached``, and the engine's ``stats``.
    """
    begin = time.perf_counter()
    from vllm import LLM, SamplingParams

    from benchmarks.accuracy import forcing

    tasks, failed = find_tasks(longbench), set()
    arguments = spec.arguments()
    forces = any(example.forced for group, _ in work for example in group.examples)
    llm = LLM(**arguments, **(forcing.engine_arguments(spec.on_gpu) if forces else {}))
    cache = llm.llm_engine.vllm_config.cache_config
    room = int(KEPT * cache.num_gpu_blocks * cache.block_size)
    yield "ready", {"start_s": round(time.perf_counter() - begin, 1), "arguments": arguments}

    for index, (group, settings) in enumerate(work):
        task = tasks[group.task]
        if task.name in failed:
            continue
        answers = {setting: Answers() for setting in settings}
        parts = portions(
            [len(e.prompt) + max(e.reply_tokens, len(e.forced or ())) for e in group.examples], room
        )
        for part in parts:
            examples = [group.examples[place] for place in part]
            prompts = [{"prompt_token_ids": e.prompt} for e in examples]
            params = [
                SamplingParams(temperature=0, max_tokens=e.reply_tokens)
                if e.forced is None
                else forcing.forced_params(e.forced, spec.on_gpu)
                for e in examples
            ]
            start = time.perf_counter()
            llm.generate(prompts, SamplingParams(temperature=0, max_tokens=1), use_tqdm=False)
            yield "prefilled", (index, round(time.perf_counter() - start, 2))
            for setting in list(answers):
                collected = answers[setting]
                llm.collective_rpc("specontext_set", kwargs=setting.changes())
                llm.collective_rpc("specontext_stats", args=(True,))
                start = time.perf_counter()
                outputs = llm.generate(prompts, params, use_tqdm=False)
                collected.add(
                    outputs, time.perf_counter() - start, llm.collective_rpc("specontext_stats")[0]
                )
                try:
                    replies = [
                        output.outputs[0].text
                        if e.forced is None
                        else forcing.log_probabilities(output.outputs[0], e.forced)
                        for output, e in zip(outputs, examples, strict=True)
                    ]
                except RuntimeError as error:  # one task's trouble, not the grid's
                    del answers[setting]
                    yield "failed", (index, setting, str(error))
                    continue
                collected.replies += replies
                collected.scores += [
                    score(task, e, reply) for e, reply in zip(examples, replies, strict=True)
                ]
                if part is parts[-1]:
                    yield "cell", (index, setting, collected.result())
                if setting.retriever == DENSE and says_nothing(task, collected.scores):
                    if part is parts[-1]:
                        failed.add(task.name)
                    answers = {setting: collected}
                    break
