"""Decode steps that emit given tokens, with the probability that the model gave them: perplexity
under sparse attention.

Prompt log-probabilities would measure nothing here, since prefill is dense. vLLM's V2 runner (GPU)
can replay a trace; its V1 runner (CPU) cannot, but takes logits processors. Both record
log-probabilities before they force the token.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from vllm import SamplingParams
from vllm.v1.sample.logits_processor import AdapterLogitsProcessor

KEY = "forced_tokens"


class ForcedTokens(AdapterLogitsProcessor):
    """Leaves one token to choose in each step, for requests that name them in ``extra_args``."""

    def is_argmax_invariant(self) -> bool:
        return False

    def new_req_logits_processor(self, params: SamplingParams) -> Any:
        forced = (params.extra_args or {}).get(KEY)
        return None if forced is None else partial(_only, forced)


def _only(forced: list[int], emitted: list[int], logits: torch.Tensor) -> torch.Tensor:
    """``logits [V]`` with all but the next forced token out of reach."""
    if len(emitted) >= len(forced):
        return logits
    only = torch.full_like(logits, float("-inf"))
    only[forced[len(emitted)]] = 0.0
    return only


def engine_arguments(on_gpu: bool) -> dict[str, Any]:
    """What ``LLM(...)`` must be given so that requests can force tokens."""
    return {"enable_trace_replay": True} if on_gpu else {"logits_processors": [ForcedTokens]}


def forced_params(tokens: list[int], on_gpu: bool) -> SamplingParams:
    """A request that emits ``tokens`` and records their log-probabilities."""
    how = {"trace_decode_token_ids": tokens} if on_gpu else {"extra_args": {KEY: tokens}}
    return SamplingParams(
        temperature=0,
        max_tokens=len(tokens),
        ignore_eos=True,
        logprobs=0,
        detokenize=False,  # nobody reads the text
        **how,
    )


def log_probabilities(output: Any, tokens: list[int]) -> list[float]:
    """Of the forced tokens, natural logarithms, the first one left out: prefill makes it, densely.

    Raises:
        RuntimeError: the engine emitted something else.
    """
    emitted = list(output.token_ids)
    if emitted != tokens:
        first = _first_difference(emitted, tokens)
        raise RuntimeError(
            f"forced {len(tokens)} tokens, but the engine emitted others from number {first} on"
        )
    return [step[token].logprob for step, token in zip(output.logprobs, emitted)][1:]


def _first_difference(a: list[int], b: list[int]) -> int:
    return next((i for i, (x, y) in enumerate(zip(a, b)) if x != y), min(len(a), len(b)))
