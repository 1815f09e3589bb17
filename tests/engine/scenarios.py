"""Every way a request can go, on one engine."""

from __future__ import annotations

import torch

MAX_TOKENS = 16
"""A page: each answer goes on in another."""
END_TOKEN = 2  # <|end|> of the demo model
SCENARIOS = (
    "plain",
    "ragged",
    "prefix hit",
    "next turn",
    "next turn, cold",
    "chunk of one",
    "chunk of one behind a hit",
    "twins",
    "neighbour aborted",
)
"""Of what ``scenarios`` returns, the tokens."""


def sampling(**changes):
    from vllm import SamplingParams

    return SamplingParams(
        **{
            "temperature": 0,
            "max_tokens": MAX_TOKENS,
            "ignore_eos": True,
            "detokenize": False,
            **changes,
        }
    )


def preemptions(llm) -> int:
    return sum(m.value for m in llm.get_metrics() if m.name == "vllm:num_preemptions")


def ids(outputs) -> list[list[int]]:
    return [until_sure(list(o.outputs[0].token_ids)) for o in outputs]


def until_sure(tokens: list[int]) -> list[int]:
    """All tokens on a CPU. On a GPU those up to the end of the answer: float32 matrix products run
    on tf32 units there, in other orders in other kernels, and what a model says after its answer
    hangs on near-ties."""
    if not torch.cuda.is_available():
        return tokens
    return tokens[: tokens.index(END_TOKEN) + 1] if END_TOKEN in tokens else tokens


def scenarios(llm, prompts) -> dict[str, object]:
    """Every scenario on one engine; the same calls for the stock engine and ours."""

    def generate(chosen, **changes):
        return llm.generate(
            [{"prompt_token_ids": p} for p in chosen], sampling(**changes), use_tqdm=False
        )

    out: dict[str, object] = {}
    # Each prompt alone; those over 256 tokens take several chunks.
    out["plain"] = [ids(generate([p]))[0] for p in prompts]
    before = preemptions(llm)
    # All at once with long answers, the longest first: ragged batches, decode and prefill rows
    # mixed, more pages than the engine has.
    crowd = generate(prompts[::-1], max_tokens=90)
    out["ragged"] = ids(crowd)
    out["preempted"] = preemptions(llm) - before
    out["undisturbed"] = [output.metrics.num_preemptions == 0 for output in crowd]
    generate([prompts[-1]], max_tokens=1)
    hit = generate([prompts[-1]])
    out["prefix hit"] = ids(hit)
    out["cached tokens"] = hit[0].num_cached_tokens
    # The hit may end inside what was generated, and the next turn goes on behind it.
    longer = prompts[-1] + ids(hit)[0] + prompts[4][:40]
    turn = generate([longer])
    out["next turn"] = ids(turn)
    llm.reset_prefix_cache()
    out["next turn, cold"] = ids(generate([longer]))
    llm.reset_prefix_cache()
    out["neighbour alone"] = ids(generate([prompts[-2][:255]]))[0]
    llm.reset_prefix_cache()
    # Its neighbour leaves one token of the step to the second prompt: a chunk of one token with
    # more to come, from the start and behind a hit.
    out["chunk of one"] = ids(generate([prompts[-2][:255], prompts[-1]]))
    llm.reset_prefix_cache()
    generate([prompts[-1]], max_tokens=1)
    out["chunk of one behind a hit"] = ids(generate([prompts[-2][:255], prompts[-1]]))
    llm.reset_prefix_cache()
    # The same prompt several times at once, and its beginning: its pages are in the prefix cache
    # before they are computed. One token is left to do behind the hit, so that a twin that did not
    # wait would be a decode row over pages that nobody has seen yet.
    twin = prompts[-1][: (len(prompts[-1]) - 1) // 16 * 16 + 1]
    out["twin alone"] = ids(generate([twin]))[0]
    llm.reset_prefix_cache()
    twins = generate([twin, prompts[3], twin, twin[:-100] + prompts[5][:30], twin])
    out["twins"] = [tokens for i, tokens in enumerate(ids(twins)) if i in (0, 2, 4)]
    out["twins' hits"] = [twins[i].num_cached_tokens for i in (2, 4)]
    llm.reset_prefix_cache()
    out["neighbour aborted"] = abort_neighbour(llm, prompts)
    return out


def abort_neighbour(llm, prompts) -> list[int]:
    """Tokens of a request whose neighbours are aborted in prefill and in decode."""
    core = llm.llm_engine
    for name, prompt in (
        ("kept", prompts[-2]),
        ("decoding", prompts[5]),
        ("prefilling", prompts[-1]),
    ):
        core.add_request(name, {"prompt_token_ids": prompt}, sampling())
    final, step = [], 0
    while core.has_unfinished_requests():
        for output in core.step():
            if output.request_id.startswith("kept") and output.finished:
                final = until_sure(list(output.outputs[0].token_ids))
        step += 1
        if step == 4:
            core.abort_request(["prefilling"])
        if step == 9:
            core.abort_request(["decoding"])
    return final


OTHER_WAYS = [
    "ragged",
    "next turn",
    "chunk of one",
    "chunk of one behind a hit",
    "neighbour aborted",
]


def by_another_way(out: dict, scenario: str) -> tuple[list[list[int]], list[list[int]]]:
    """Tokens of a scenario, and those of the same prompts gone another way: alone, or with a cold
    cache. They are the same under any budget.
    """
    if scenario == "ragged":
        # A preempted request's answer so far is prefilled when it comes back, which is dense.
        kept = [i for i, undisturbed in enumerate(out["undisturbed"]) if undisturbed]
        assert len(kept) >= 5
        return [out["ragged"][i][:MAX_TOKENS] for i in kept], [out["plain"][::-1][i] for i in kept]
    if scenario == "next turn":
        return out["next turn"], out["next turn, cold"]
    if scenario == "neighbour aborted":
        return [out["neighbour aborted"]], [out["plain"][-2]]
    return out[scenario], [out["neighbour alone"], out["plain"][-1]]
