"""Random mixes of requests."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from random import Random
from typing import Any

MAX_MODEL_LEN, MAX_SEQS, STEP_TOKENS, PAGES = 704, 3, 704, 76
"""Three requests of the longest context need 126 pages: some are preempted and resumed."""
LONGEST_PROMPT, LONGEST_ANSWER = 600, 100


@dataclass(frozen=True)
class Request:
    """One request.

    Attributes:
        prompt: token ids.
        arrives: step before which it is added.
        leaves_after: it is aborted once it has so many tokens (0: with its prompt under way); None:
            never.
        params: of ``SamplingParams``.
    """

    prompt: tuple[int, ...]
    arrives: int
    leaves_after: int | None
    params: dict[str, Any]


@dataclass(frozen=True)
class Mix:
    """Requests that meet in an engine.

    Attributes:
        step_tokens: the scheduler's token budget of a step.
        chunked: whether a prompt may be cut where the step's tokens end. On a CPU such mixes are
            greedy: vLLM's engine fails when it samples with a seed after a cut prompt ("CPU
            Generator does not use offset", vllm/v1/worker/gpu_model_runner.py). On a GPU all mixes
            are greedy: a sampled token depends on digits that tf32 rounds away.
        cold: whether the prefix cache is emptied before.
        storm: step after which all running requests are preempted and the prefix cache is emptied,
            if the mix lasts so long.
    """

    requests: tuple[Request, ...]
    step_tokens: int
    chunked: bool
    cold: bool
    storm: int

    @classmethod
    def draw(cls, seed: str, bases: Sequence[Sequence[int]], on_gpu: bool) -> Mix:
        """The mix of a seed, of prompts that begin as some of ``bases`` do."""
        rng = Random(seed)
        few = rng.sample(range(len(bases)), rng.randint(1, 4))
        chunked = rng.random() < 0.6
        # Long requests run out of pages.
        drawn = {"sampled": not on_gpu and not chunked, "long": rng.random() < 0.4}
        requests = tuple(
            _draw_request(rng, [bases[i] for i in few], **drawn) for _ in range(rng.randint(3, 8))
        )
        return cls(
            requests,
            rng.choice((16, 17, 33, 64, 100, 200, 256)) if chunked else STEP_TOKENS,
            chunked,
            rng.random() < 0.3,
            rng.choice((3, rng.randint(2, 60))),
        )


def _draw_request(
    rng: Random, bases: Sequence[Sequence[int]], sampled: bool, long: bool
) -> Request:
    base = rng.choice(bases)
    # Lengths at the edges of pages and chunks, and any others.
    edges = (1, 2, 15, 16, 17, 32, 33, 255, 256, 257, len(base), len(base) // 16 * 16 + 1)
    cut = (
        len(base)
        if long
        else min(rng.choice((len(base), rng.choice(edges), rng.randint(1, len(base)))), len(base))
    )
    prompt = (*base[:cut], *rng.choice(bases)[: rng.choice((0, 0, 1, 15, 16, 40))])[:LONGEST_PROMPT]
    max_tokens = (
        rng.randint(LONGEST_ANSWER // 2, LONGEST_ANSWER)
        if long
        else rng.choice((1, 2, 15, 16, 17, rng.randint(3, LONGEST_ANSWER // 2)))
    )
    params: dict[str, Any] = {"max_tokens": max_tokens, "ignore_eos": long or rng.random() < 0.8}
    if rng.random() < 0.3 or not sampled:
        params |= {"temperature": 0.0}
    else:
        params |= {"temperature": rng.choice((0.3, 0.8, 1.0, 1.5)), "seed": rng.randrange(2**31)}
        params |= rng.choice(({}, {}, {"top_p": 0.9}, {"top_k": 20}, {"min_p": 0.05}))
        if rng.random() < 0.3:
            params["n"] = rng.randint(2, 3)
    if rng.random() < 0.3:
        params["logprobs"] = rng.choice((0, 1, 5))
    if rng.random() < 0.15:
        params["prompt_logprobs"] = rng.choice((0, 3))
    if not long and rng.random() < 0.3:
        params["stop_token_ids"] = rng.sample(sorted(set(base)), min(3, len(set(base))))
        params["min_tokens"] = min(rng.choice((0, 0, 5)), params["max_tokens"])
    arrives = rng.choice((0, 0, 0, rng.randint(1, 30)))
    leaves_after = rng.choice((0, 1, rng.randint(2, 20))) if rng.random() < 0.2 else None
    return Request(prompt, arrives, leaves_after, params)
