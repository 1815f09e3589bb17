"""An engine whose prompts stay in the prefix cache while the settings of its decode steps change.

The prompts' pages hold prompt tokens only and are always made densely, so that all settings read
the same.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from benchmarks.children import room_for_kv

REQUESTS = 16
"""Prompts that are answered at once, unless a case says otherwise."""

KEPT = 0.9
"""Share of the KV cache that the prompts and replies of a portion may take, so that none of them is
evicted before the last setting.
"""

CACHED_ENOUGH = 0.9
"""Share of the prompts' tokens that must have come from the prefix cache for a cell's time to be
that of its decode steps.
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
        requests: prompts that are answered at once.
        settings: more of ``additional_config.specontext``.
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
    requests: int = REQUESTS
    settings: Mapping[str, Any] = field(default_factory=dict)

    def arguments(self) -> dict[str, Any]:
        """Of ``LLM(...)``, less what forces tokens."""
        # The page table is as wide as the longest context, so that every budget can be set later.
        config = {
            "retriever": self.retriever,
            "budget": self.max_model_len,
            "head_key_dtype": self.head_keys,
            **self.settings,
        }
        if self.head:
            config["retrieval_head"] = self.head
        return {
            "model": self.model,
            "dtype": self.dtype,
            "seed": 0,
            "max_model_len": self.max_model_len,
            "max_num_seqs": self.requests,
            "enable_prefix_caching": True,
            "enforce_eager": self.eager,
            "disable_log_stats": True,
            "attention_backend": "specontext",
            "additional_config": {"specontext": config},
            **room_for_kv(self.kv_gib),
        }


def kept_tokens(llm: Any) -> int:
    """Tokens that prompts and replies of a portion may have together."""
    cache = llm.llm_engine.vllm_config.cache_config
    return int(KEPT * cache.num_gpu_blocks * cache.block_size)


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


def prefill(llm: Any, prompts: Sequence[Any]) -> float:
    """Bring the prompts into the prefix cache; seconds that it took."""
    from vllm import SamplingParams

    start = time.perf_counter()
    llm.generate(prompts, SamplingParams(temperature=0, max_tokens=1), use_tqdm=False)
    return time.perf_counter() - start


def ask(
    llm: Any, changes: Mapping[str, Any], prompts: Sequence[Any], params: Any
) -> tuple[list[Any], float, dict[str, Any]]:
    """The outputs under changed settings, seconds that they took, the engine's stats of them."""
    llm.collective_rpc("specontext_set", kwargs=dict(changes))
    llm.collective_rpc("specontext_stats", args=(True,))
    start = time.perf_counter()
    outputs = llm.generate(prompts, params, use_tqdm=False)
    seconds = time.perf_counter() - start
    return outputs, seconds, llm.collective_rpc("specontext_stats")[0]


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
        """All of it; the kept mass is a mean over the decode rows, None of retrievers without a
        head.
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
