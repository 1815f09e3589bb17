"""Log-probabilities and replies of whole engines."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from specontext_vllm.synthetic.tasks import make_problem, random_for, sentence

REPLY = 64
FORCED = 48
"""Tokens of a reply that are forced at most."""
NEAR = 20
"""Likeliest tokens of a step that are recorded: vLLM's own limit."""
MAX_MODEL_LEN = 1536
SINGLY = "stock, one request at a time"
OURS = "specontext, budget over the context"


@dataclass(frozen=True)
class Answer:
    """What an engine made of one prompt.

    Attributes:
        tokens: of the greedy reply. near: of each of them the likeliest tokens' log-probabilities.
        prompt: log-probabilities of the prompt's tokens, without the first.
        forced: of the forced tokens, without the first.
    """

    tokens: list[int]
    near: list[dict[int, float]]
    prompt: list[float]
    forced: list[float]


def engines(on_gpu: bool) -> dict[str, dict[str, Any]]:
    """What each engine is started with beside what all share."""
    other = {"stock, Triton attention": {"attention_backend": "TRITON_ATTN"}} if on_gpu else {}
    own = {
        "attention_backend": "specontext",
        "additional_config": {"specontext": {"budget": MAX_MODEL_LEN}},
    }
    return {
        "stock": {},
        "stock, chunks of 64 tokens": {"max_num_batched_tokens": 64},
        **other,
        OURS: own,
    }


def measure_engine(
    model: str,
    dtype: str,
    settings: dict[str, Any],
    prompts: list[list[int]],
    forced: list[list[int]],
    singly: bool,
    on_gpu: bool,
) -> Iterator[tuple[str, Any]]:
    """Events ``("answers", [Answer])``, then, if ``singly``, ``("singly", [Answer])`` with one
    request at a time; runs in a child.
    """
    from vllm import LLM, SamplingParams

    from benchmarks import forcing

    shared = {
        "model": model,
        "dtype": dtype,
        "seed": 0,
        "max_model_len": MAX_MODEL_LEN,
        "max_num_seqs": 4,
        "max_num_batched_tokens": 256,
        "enforce_eager": True,
        "enable_prefix_caching": False,
        "gpu_memory_utilization": 0.3,
    }
    llm = LLM(**{**shared, **settings}, **forcing.engine_arguments(on_gpu))
    free = SamplingParams(
        temperature=0,
        max_tokens=REPLY,
        ignore_eos=True,
        detokenize=False,
        logprobs=NEAR,
        prompt_logprobs=0,
    )

    def ask(numbers: Sequence[int]) -> list[Answer]:
        asked = [{"prompt_token_ids": prompts[i]} for i in numbers]
        replies = llm.generate(asked, free, use_tqdm=False)
        told = llm.generate(
            asked, [forcing.forced_params(forced[i], on_gpu) for i in numbers], use_tqdm=False
        )
        return [
            _read(reply, other, forced[i])
            for reply, other, i in zip(replies, told, numbers, strict=True)
        ]

    yield "answers", ask(range(len(prompts)))
    if singly:
        yield "singly", [ask([i])[0] for i in range(len(prompts))]


def _read(reply: Any, told: Any, forced: list[int]) -> Answer:
    from benchmarks import forcing

    prompt = [
        step[token].logprob
        for step, token in zip(reply.prompt_logprobs[1:], reply.prompt_token_ids[1:], strict=True)
    ]
    near = [
        {token: found.logprob for token, found in step.items()}
        for step in reply.outputs[0].logprobs
    ]
    return Answer(
        list(reply.outputs[0].token_ids),
        near,
        prompt,
        forcing.log_probabilities(told.outputs[0], forced),
    )


def measure_exactly(
    model: str, dtypes: Sequence[str], prompts: list[list[int]], forced: list[list[int]]
) -> Iterator[tuple[str, Any]]:
    """Event ``("exact", (dtype, [(of the prompt's tokens, of the forced ones)]))``: transformers in
    float64 with the weights of that dtype; runs in a child.
    """
    from transformers import AutoModelForCausalLM

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    for name in dtypes:
        loaded = (
            AutoModelForCausalLM.from_pretrained(model, dtype=getattr(torch, name))
            .to(device, torch.float64)
            .eval()
        )
        out = []
        for prompt, reply in zip(prompts, forced, strict=True):
            ids = torch.tensor([*prompt, *reply], device=device)
            with torch.no_grad():
                logs = loaded(ids[None], use_cache=False).logits[0, :-1].double().log_softmax(-1)
            found = logs.gather(1, ids[1:, None])[:, 0].tolist()
            # The first forced token is left out, as in `forcing.log_probabilities`.
            out.append((found[: len(prompt) - 1], found[len(prompt) :]))
        yield "exact", (name, out)


def parting(stock: Answer, other: Answer, end: int | None) -> float | None:
    """How far apart in log-probability stock had the two tokens at which the replies part; None
    where they don't.

    Args:
        end: the token that ends an answer; what comes behind it does not count.
    """
    for place, (mine, theirs) in enumerate(zip(stock.tokens, other.tokens, strict=True)):
        if mine != theirs:
            near = stock.near[place]
            return near[mine] - near.get(theirs, min(near.values()))
        if mine == end:
            break
    return None


def engine_row(
    engine: str,
    dtype: str,
    answers: Sequence[Answer],
    stock: Sequence[Answer],
    exactly: Sequence[tuple[list[float], list[float]]],
    ends: Sequence[int | None],
) -> dict[str, Any]:
    """One line of the second table.

    Args:
        exactly: log-probabilities in float64, see ``measure_exactly``.
        ends: of each prompt the token that ends its answer; None where a text is only continued.
    """
    prompt = [
        a - b
        for answer, (true, _) in zip(answers, exactly, strict=True)
        for a, b in zip(answer.prompt, true, strict=True)
    ]
    decoded = [
        a - b
        for answer, (_, true) in zip(answers, exactly, strict=True)
        for a, b in zip(answer.forced, true, strict=True)
    ]
    found = [
        (end, parting(one, other, end))
        for one, other, end in zip(stock, answers, ends, strict=True)
    ]
    gaps = [gap for _, gap in found if gap is not None]
    texts = sum(end is None for end in ends)
    row: dict[str, Any] = {
        "engine": engine,
        "engine_dtype": dtype,
        "prompt_rms": _rms(prompt),
        "decode_rms": _rms(decoded),
        "prompts": f"{len(ends) - texts}, {texts}",
        "answers": None,
        "texts": None,
        "gap": statistics.median(gaps) if gaps else None,
        "widest": max(gaps, default=None),
    }
    if answers is not stock:
        row["texts"] = sum(end is None and gap is not None for end, gap in found)
        row["answers"] = len(gaps) - row["texts"]
    return row


def _rms(errors: Sequence[float]) -> float:
    return statistics.fmean(error * error for error in errors) ** 0.5


def make_prompts(
    model: Path, count: int
) -> tuple[list[list[int]], list[list[int]], list[int | None]]:
    """Of each prompt its tokens, up to 1,000, those that are forced after it, and the token that
    ends its answer (None: only a text to go on with).

    Needles and recitations, where the model is sure of the answer, alternate with random sentences,
    where every next word is open.
    """
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(str(model))
    prompts, forced, ends = [], [], []
    for seed in range(count):
        size = 600 + 16 * (seed % 25)
        if seed % 2:
            rng = random_for(seed, "rounding")
            prompts.append(
                tokenizer(" ".join(sentence(rng) for _ in range(size // 9)))["input_ids"]
            )
            reply = sentence(rng)
        else:
            problem = make_problem(
                ("needle", "recitation")[seed // 2 % 2], seed=seed, approx_tokens=size
            )
            prompts.append(
                list(
                    tokenizer.apply_chat_template(
                        problem.messages,
                        add_generation_prompt=True,
                        tokenize=True,
                        return_dict=False,
                    )
                )
            )
            reply = problem.answer
        forced.append(tokenizer(f" {reply}", add_special_tokens=False)["input_ids"][:FORCED])
        ends.append(None if seed % 2 else tokenizer.eos_token_id)
    return prompts, forced, ends
