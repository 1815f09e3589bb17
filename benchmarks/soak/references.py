"""The answers of dense attention, and models with random weights to ask."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks.near_tie import gap
from benchmarks.serving import write_tokenizer
from benchmarks.shapes import Shape
from benchmarks.soak.client import ANSWER_TOKENS
from benchmarks.soak.server import (
    KV_BYTES_GPU,
    MAX_MODEL_LEN,
    MEMORY_SHARE_CPU,
    MEMORY_SHARE_GPU,
)

REFERENCES_AT_ONCE, REFERENCE_TOKENS = 64, 4096
"""Requests and prompt tokens of a step while the references are recorded."""


def write_random_model(shape: Shape, folder: Path) -> Path:
    """A model of the shape whose weights are drawn as a new model's are: vLLM's own dummy weights
    are so small that attention hardly counts.
    """
    import torch
    from safetensors.torch import save_file
    from transformers import AutoConfig, AutoModelForCausalLM

    shape.write(folder)
    write_tokenizer(shape, folder)
    with torch.device("meta"):
        skeleton = AutoModelForCausalLM.from_config(
            AutoConfig.from_pretrained(folder), dtype=torch.bfloat16
        )
    device = "cuda" if torch.cuda.is_available() else "cpu"
    generator = torch.Generator(device).manual_seed(0)
    tensors = {}
    for name, tensor in skeleton.state_dict().items():
        drawn = torch.empty(tensor.shape, dtype=torch.bfloat16, device=device)
        tensors[name] = (
            drawn.fill_(1.0)
            if drawn.dim() == 1
            else drawn.normal_(0.0, skeleton.config.initializer_range, generator=generator)
        ).cpu()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def dense_engine(model: str, on_gpu: bool) -> dict[str, Any]:
    """Arguments of ``LLM`` for the engine that gives the references."""
    return {
        "model": model,
        "dtype": "float32",
        "max_model_len": MAX_MODEL_LEN,
        "max_num_seqs": REFERENCES_AT_ONCE,
        "max_num_batched_tokens": REFERENCE_TOKENS,
        "enforce_eager": True,
        "seed": 0,
        "gpu_memory_utilization": MEMORY_SHARE_GPU if on_gpu else MEMORY_SHARE_CPU,
        "kv_cache_memory_bytes": KV_BYTES_GPU if on_gpu else None,
    }


def greedy_answers(llm: Any, prompts: list[list[int]]) -> tuple[list[list[int]], list[list[float]]]:
    """Greedy answers to prompts of token ids: the token ids of each, and the gaps between the two
    likeliest tokens of each step.
    """
    from vllm import SamplingParams

    params = SamplingParams(temperature=0, max_tokens=ANSWER_TOKENS, detokenize=False, logprobs=2)
    outputs = [
        output.outputs[0]
        for output in llm.generate(
            [{"prompt_token_ids": prompt} for prompt in prompts], params, use_tqdm=False
        )
    ]
    return (
        [list(output.token_ids) for output in outputs],
        [[gap(step) for step in output.logprobs] for output in outputs],
    )


def answer_densely(model: str, on_gpu: bool, prompts: list[list[int]]) -> Iterator[tuple[str, Any]]:
    """Stock vLLM's greedy answers; runs in a child. Yields
    ``("references", (token ids per prompt, gaps per prompt))``.
    """
    from vllm import LLM

    yield "references", greedy_answers(LLM(**dense_engine(model, on_gpu)), prompts)
