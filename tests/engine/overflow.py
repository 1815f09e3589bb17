"""A request whose hidden states are NaN, as after an overflow in 16 bits, beside others."""

from __future__ import annotations

from typing import Any

import torch

from tests.engine.scenarios import ids, sampling

TOKEN = 3130
"""In no prompt of the demo and in no answer of its model: only a request that is given it reads its
embedding.
"""
ANSWER = 10


def swap_embedding(worker: Any, values: torch.Tensor) -> torch.Tensor:
    """Put ``values [E]`` in the place of the embedding of ``TOKEN``; what it was is returned."""
    (row,) = [
        weight[TOKEN]
        for name, weight in worker.get_model().named_parameters()
        if name.endswith("embed_tokens.weight")
    ]
    before = row.detach().clone()
    with torch.inference_mode():
        row.copy_(values)
    return before.cpu()


def beside_an_overflow(llm: Any, prompts: list[list[int]]) -> dict[str, Any]:
    """The first prompt is given ``TOKEN``, and its place among the others is each in turn.

    Returns:
        ``without``, ``with`` and ``afterwards``: for each place the others' tokens where the
        embedding is as it was, NaN, and as it was again; ``spoilt``: that request's own, where it
        was and where it was NaN. ``stats`` of the steps with NaN.
    """
    marked = [*prompts[0][:150], TOKEN, *prompts[0][150:]]
    others = prompts[1:]

    def answers() -> tuple[list[list[list[int]]], list[int]]:
        found = []
        for place in range(len(prompts)):
            # Equal pages would be read from the run before, and the chunks be others.
            assert llm.reset_prefix_cache()
            batch = [*others[:place], marked, *others[place:]]
            tokens = ids(
                llm.generate(
                    [{"prompt_token_ids": prompt} for prompt in batch],
                    sampling(max_tokens=ANSWER),
                    use_tqdm=False,
                )
            )
            assert TOKEN not in sum(tokens, [])
            marked_answer = tokens.pop(place)
            found.append(tokens)
        return found, marked_answer

    without, sound = answers()
    (before,) = llm.collective_rpc(swap_embedding, args=(torch.full((256,), float("nan")),))
    llm.collective_rpc("specontext_stats", args=(True,))
    try:
        spoilt = answers()
        stats = llm.collective_rpc("specontext_stats")[0]
    finally:
        llm.collective_rpc(swap_embedding, args=(before,))
    out = {
        "without": without,
        "with": spoilt[0],
        "afterwards": answers()[0],
        "spoilt": (sound, spoilt[1]),
        "stats": stats,
    }
    assert llm.reset_prefix_cache()
    return out


def check(found: dict[str, Any]) -> None:
    """No other request notices, and what is counted stays a number."""
    assert found["spoilt"][0] != found["spoilt"][1], "the embedding was not read"
    assert found["with"] == found["without"]
    assert found["afterwards"] == found["without"], "what the request left behind was read"
    stats = found["stats"]
    assert stats["pages_read"] < 0.7 * stats["pages_total"]
    assert stats["kept_mass_mean"] is None or 0 < stats["kept_mass_mean"] < 1
