"""Held-out questions of the demo's tasks, answered by a plain-torch model with a choice of pages
(``demo.decoder.Decoder``).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from specontext_vllm.demo.decoder import Decoder, Prefilled
from specontext_vllm.synthetic.tasks import LAYOUTS, Problem, make_problem, score

FIRST_SEED = 9000
REPLY_TOKENS = {"needle": 14, "recitation": 80}
"""By kind of problem: a sentence with the value; a passage of eight sentences with its title."""


def questions(
    tokenizer: Any, tokens: int, count: int, kind: str = "needle"
) -> Iterator[tuple[Problem, list[int]]]:
    """So many problems of a kind, in all layouts, with their prompts of about so many tokens."""
    for i in range(count):
        problem = make_problem(
            kind, seed=FIRST_SEED + i, approx_tokens=tokens, layout=LAYOUTS[i % len(LAYOUTS)]
        )
        yield (
            problem,
            tokenizer.apply_chat_template(
                problem.messages, add_generation_prompt=True, return_dict=False
            ),
        )


def answer(
    decoder: Decoder,
    tokenizer: Any,
    problem: Problem,
    state: Prefilled,
    method: str,
    budget: int,
) -> float:
    """The score of the answer after a prompt (``state`` of ``Decoder.prefill``), with one way to
    choose pages.
    """
    reply = decoder.decode(
        state,
        method,
        budget,
        REPLY_TOKENS[problem.kind],
        tokenizer.eos_token_id,
        torch.Generator(device=decoder.device),
    )
    return score(problem, tokenizer.decode(reply, skip_special_tokens=True))
