"""Decode steps of Hugging Face transformers: the model alone, eager or SDPA attention, a growing
`DynamicCache`, as `generate` runs it.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Iterator, Sequence
from typing import Any

import torch

from benchmarks.engines import Cell, EngineSpec, summary

ATTENTION = {"hf-eager": "eager", "hf-sdpa": "sdpa"}
"""transformers' `attn_implementation` of the engines."""

SETTLE = 4
"""Steps before the first timed one."""

MAX_STEPS = 32
"""Timed steps at most: they are slow and steady."""


class OutOfMemory(RuntimeError):
    """What did not fit, in a few words."""


def run_hugging_face(
    spec: EngineSpec, cells: Sequence[Cell], fits: dict[str, int]
) -> Iterator[tuple[str, Any]]:
    """As ``engines.run_engine``, for the engines of ``ATTENTION``; runs in a child.

    The whole prompt of all requests is prefilled at once, as `generate` does. Cells with
    ``prefill`` off get a cache of random K and V instead.
    """
    begin = time.perf_counter()
    device = torch.device("cuda" if spec.on_gpu else "cpu")
    if spec.on_gpu and spec.gpu_gib:
        torch.cuda.set_per_process_memory_fraction(
            spec.gpu_gib * 2**30 / torch.cuda.get_device_properties(0).total_memory
        )
    try:
        model = load_model(spec, device)
    except torch.OutOfMemoryError:
        for cell in cells:
            yield (
                "cell",
                (
                    cell.name,
                    {"requests": cell.requests or 0, "out_of_memory": "the weights do not fit"},
                ),
            )
        return
    yield (
        "ready",
        {
            "start_s": round(time.perf_counter() - begin, 1),
            "attn_implementation": model.config._attn_implementation,
            "dtype": str(model.dtype),
            "memory_cap_gib": spec.gpu_gib,
        },
    )
    fitting: dict[int, int] = {}
    for cell in cells:
        try:
            room = cell.room or cell.tokens
            if cell.requests is None and cell.name not in fits and room not in fitting:
                fitting[room] = fitting_requests(model, spec.max_num_seqs, room)
            requests = cell.requests or fits.get(cell.name) or fitting[room]
            yield "cell", (cell.name, measure_cell(model, cell, requests, spec.steps))
        except Exception as error:
            yield "failed", (cell.name, f"{type(error).__name__}: {error}"[:500])
        _release()


def load_model(spec: EngineSpec, device: torch.device) -> Any:
    """The spec's model with random weights on the device."""
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(spec.model)
    torch.manual_seed(0)
    with device:
        model = AutoModelForCausalLM.from_config(
            config, dtype=config.dtype, attn_implementation=ATTENTION[spec.name]
        )
    return model.eval()


def measure_cell(model: Any, cell: Cell, requests: int, steps: int) -> dict[str, Any]:
    """Prefill (or fill) and time decode steps; the figures of ``engines.measure_cell`` without
    those of vLLM.

    Figures of a cell that the memory cannot hold are ``requests`` and ``out_of_memory``, a
    sentence.
    """
    steps = min(steps, MAX_STEPS)
    context = min(cell.tokens, (cell.room or model.config.max_position_embeddings) - SETTLE - steps)
    figures: dict[str, Any] = {"requests": requests}
    try:
        if requests == 0:
            raise OutOfMemory("not one request fits")
        if context < 1:
            raise ValueError(
                f"{SETTLE + steps} steps leave no room for a context of {cell.tokens} tokens; "
                "lower --steps."
            )
        begin = time.perf_counter()
        cache, tokens = (prefill if cell.prefill else filled_cache)(
            model, random_tokens(model, requests, context)
        )
        if cell.prefill:
            figures["prefill_s"] = time.perf_counter() - begin
        times = []
        for _ in range(SETTLE + steps):
            tokens, elapsed = _timed_step(model, cache, tokens)
            times.append(elapsed)
    except (OutOfMemory, torch.OutOfMemoryError) as error:
        place = str(error) if isinstance(error, OutOfMemory) else "a decode step does not fit"
        return figures | {"out_of_memory": place}
    return figures | {
        "prompt_tokens": context,
        "context_tokens": context + SETTLE + steps // 2,
        "steps": steps,
        "step_ms": summary(times[SETTLE:]),
    }


def random_tokens(model: Any, requests: int, count: int) -> torch.Tensor:
    """Random token ids ``[requests, count]`` on the model's device."""
    return torch.randint(5, model.config.vocab_size - 5, (requests, count), device=model.device)


@torch.inference_mode()
def prefill(model: Any, prompts: torch.Tensor) -> tuple[Any, torch.Tensor]:
    """Run prompts ``[B, n]`` through the model; the cache of their K and V, and the greedy next
    tokens ``[B, 1]``.

    Raises:
        OutOfMemory: the prompts do not fit.
    """
    from transformers import DynamicCache

    cache = DynamicCache(config=model.config)
    try:
        tokens = _step(model, cache, prompts)
    except torch.OutOfMemoryError:
        raise OutOfMemory("the prefill does not fit") from None
    _synchronize(model)
    return cache, tokens


@torch.inference_mode()
def filled_cache(model: Any, prompts: torch.Tensor) -> tuple[Any, torch.Tensor]:
    """As ``prefill``, but K and V are random: a step costs the same whatever they hold.

    Raises:
        OutOfMemory: they do not fit.
    """
    from transformers import DynamicCache

    config = model.config
    cache = DynamicCache(config=config)
    size = (prompts.shape[0], config.num_key_value_heads, prompts.shape[1], config.head_dim)
    try:
        for layer in range(config.num_hidden_layers):
            cache.update(
                *(torch.randn(size, dtype=model.dtype, device=model.device) for _ in "kv"), layer
            )
    except torch.OutOfMemoryError:
        raise OutOfMemory("the KV cache does not fit") from None
    return cache, prompts[:, -1:]


@torch.inference_mode()
def _timed_step(model: Any, cache: Any, tokens: torch.Tensor) -> tuple[torch.Tensor, float]:
    # Like generate, which looks after each step whether all requests are through, this waits for
    # the device.
    begin = time.perf_counter()
    tokens = _step(model, cache, tokens)
    _synchronize(model)
    return tokens, 1e3 * (time.perf_counter() - begin)


def greedy(model: Any, prompts: torch.Tensor, count: int) -> torch.Tensor:
    """``count`` greedy tokens ``[B, count]`` after prompts ``[B, n]``, from the timed steps."""
    cache, tokens = prefill(model, prompts)
    generated = [tokens]
    for _ in range(count - 1):
        generated.append(_timed_step(model, cache, generated[-1])[0])
    return torch.cat(generated, dim=1)


def _step(model: Any, cache: Any, tokens: torch.Tensor) -> torch.Tensor:
    logits = model(input_ids=tokens, past_key_values=cache, use_cache=True, logits_to_keep=1).logits
    return logits[:, -1].argmax(-1, keepdim=True)


def fitting_requests(model: Any, max_requests: int, room: int) -> int:
    """The largest of max_requests, half of them, a quarter ... whose cache of ``room`` tokens
    leaves space for a step; 0: none.
    """
    requests = max_requests
    while requests:
        try:
            cache, tokens = filled_cache(model, random_tokens(model, requests, room - 1))
            _timed_step(model, cache, tokens)
            return requests
        except (OutOfMemory, torch.OutOfMemoryError):
            requests //= 2
        finally:
            cache = None
            _release()
    return 0


def _synchronize(model: Any) -> None:
    if model.device.type == "cuda":
        torch.cuda.synchronize()


def _release() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
