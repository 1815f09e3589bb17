"""What requests may ask for beside tokens: the same calls for stock vLLM and for ours."""

from __future__ import annotations

from typing import Any

import torch

from tests.engine.scenarios import sampling

ALLOWED = [1500, 1501, 1502, 1503]
"""Tokens of the demo model's vocabulary."""
SEQUENCE = [a for first in range(4) for second in range(4) for a in (first, second)]
SAMPLED_PROMPT = [ALLOWED[i] for i in SEQUENCE * 2]
"""Holds every pair of the four tokens, so that what followed one is always a draft."""
TEMPERATURE = 2.0


def asked(llm: Any, prompts: list[list[int]]) -> dict[str, Any]:
    """Log-probabilities, several answers, strings that stop an answer, and a grammar."""
    from vllm.sampling_params import StructuredOutputsParams

    chosen = [{"prompt_token_ids": prompt} for prompt in (prompts[5], prompts[7])]

    def generate(asked: Any, params: Any) -> list[Any]:
        return llm.generate(asked, params, use_tqdm=False)

    out: dict[str, Any] = {}
    first = [reply.outputs[0] for reply in generate(chosen, sampling(max_tokens=24, logprobs=3))]
    out["tokens"] = [list(reply.token_ids) for reply in first]
    out["logprobs"] = [
        {token: value.logprob for token, value in of_place.items()}
        for reply in first
        for of_place in reply.logprobs
    ]
    # Nearly greedy: vLLM takes no n with a temperature of 0.
    several = generate(chosen, sampling(max_tokens=24, n=2, temperature=0.02, seed=5))
    out["several"] = [[list(o.token_ids) for o in reply.outputs] for reply in several]
    # Wherever a row of drafts begins, some of these end in the middle of one.
    tokenizer = llm.get_tokenizer()
    stops = [tokenizer.decode(out["tokens"][1][place : place + 2]) for place in range(3, 13)]
    params = [sampling(max_tokens=24, stop=[stop], detokenize=True) for stop in stops]
    replies = [reply.outputs[0] for reply in generate([chosen[1]] * len(stops), params)]
    out["stopped"] = [(o.text, list(o.token_ids), o.stop_reason) for o in replies]
    grammar = StructuredOutputsParams(regex="( [a-z]{3,8}){5}[.]")
    params = sampling(max_tokens=40, structured_outputs=grammar, detokenize=True, ignore_eos=False)
    out["within a grammar"] = [reply.outputs[0].text for reply in generate(chosen, params)]
    return out


def sampled(llm: Any, count: int) -> list[tuple[int, ...]]:
    """``count`` answers of three of the four tokens, at the highest temperature of vLLM's."""
    params = sampling(
        n=count, temperature=TEMPERATURE, max_tokens=3, allowed_token_ids=ALLOWED, seed=11
    )
    (reply,) = llm.generate([{"prompt_token_ids": SAMPLED_PROMPT}], params, use_tqdm=False)
    return [tuple(ALLOWED.index(token) for token in output.token_ids) for output in reply.outputs]


def expected_pairs(model: Any) -> torch.Tensor:
    """``[4, 4]`` probability of the second and third token of ``sampled``, by transformers."""

    def following(so_far: list[list[int]]) -> torch.Tensor:
        texts = [SAMPLED_PROMPT + [ALLOWED[i] for i in more] for more in so_far]
        with torch.no_grad():
            logits = model(torch.tensor(texts)).logits[:, -1, ALLOWED]
        return (logits / TEMPERATURE).softmax(-1)

    pairs = [[a, b] for a in range(4) for b in range(4)]
    first, second = following([[]])[0], following([[a] for a in range(4)])
    third = following(pairs).view(4, 4, 4)
    return torch.einsum("a,ab,abc->bc", first, second, third)


def chance_of_pairs(found: list[tuple[int, ...]], expected: torch.Tensor) -> float:
    """Pearson's test: how likely counts are as far from the expected ones as these."""
    counts = torch.zeros(4, 4)
    for _, second, third in found:
        counts[second, third] += 1
    expected = expected * len(found)
    rare = expected < 5
    parts = [((counts - expected) ** 2 / expected)[~rare].sum()]
    degrees = int((~rare).sum()) - 1
    if rare.any():
        parts.append((counts[rare].sum() - expected[rare].sum()) ** 2 / expected[rare].sum())
        degrees += 1
    statistic = torch.stack(parts).sum().double()
    return float(torch.special.gammaincc(torch.tensor(degrees / 2).double(), statistic / 2))
