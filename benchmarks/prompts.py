"""Prompts of mixed lengths, for several cases and tests."""

from __future__ import annotations

from pathlib import Path
from random import Random

from benchmarks.shapes import DEMO_MODEL


def make_prompts(model: Path, count: int, limit: int = 976) -> list[list[int]]:
    """Token ids of 200 to 900 tokens, and, one in five, of only their first tokens, 1 to 100 of
    them: demo problems, or for another model random ones. No prompt has more than ``limit`` tokens.
    """
    from transformers import AutoTokenizer

    from specontext_vllm.synthetic.tasks import make_problem

    tokenizer = AutoTokenizer.from_pretrained(str(model))
    rng = Random(0)
    prompts = []
    for seed in range(count):
        length = rng.randint(200, 900)
        if model.resolve() == DEMO_MODEL.resolve():
            problem = make_problem(
                "recitation" if seed % 3 == 2 else "needle",
                seed=20_000 + seed,
                approx_tokens=length,
            )
            ids = tokenizer.apply_chat_template(
                problem.messages, add_generation_prompt=True, tokenize=True, return_dict=False
            )
        else:
            ids = [rng.randrange(tokenizer.vocab_size) for _ in range(length)]
        ids = ids[:limit]
        prompts.append(
            ids[: rng.choice((1, 2, 15, 16, 17, rng.randint(18, 100)))] if seed % 5 == 4 else ids
        )
    return prompts
