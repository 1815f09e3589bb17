"""KV in 8-bit floats, with a checkpoint's scales: the tokens of an engine whose keys and values are
rounded the same way before they are kept in float32; with two tiers too.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from specontext_vllm.float8 import FP8, to_float8
from tests.conftest import CUDA
from tests.engine.conftest import DEMO_MODEL, STOCK, engine
from tests.engine.scenarios import ids, sampling
from tests.engine.shared_runs import SETTINGS, SHAPE, SMALL, WHOLE
from tests.engine.test_tiers import SAVED_GIB
from tests.poison import poisoned_tiers, times_poisoned

LAYERS = 6
KEY_SCALES = [0.053 * (1 + layer / 4) for layer in range(LAYERS)]
VALUE_SCALES = [0.011 * (1 + layer / 3) for layer in range(LAYERS)]
"""None a power of two, so that rounding to 8 bits hangs on them."""


@pytest.fixture(scope="module")
def scaled_model(tmp_path_factory) -> Path:
    """The demo model as a checkpoint that declares an 8-bit KV cache and brings scales for it."""
    folder = tmp_path_factory.mktemp("scaled")
    tensors = load_file(DEMO_MODEL / "model.safetensors")
    for layer, (key, value) in enumerate(zip(KEY_SCALES, VALUE_SCALES, strict=True)):
        where = f"model.layers.{layer}.self_attn"
        tensors[f"{where}.k_scale"], tensors[f"{where}.v_scale"] = (
            torch.tensor([key]),
            torch.tensor([value]),
        )
    save_file(tensors, folder / "model.safetensors")
    config = json.loads((DEMO_MODEL / "config.json").read_text())
    config["quantization_config"] = {
        "quant_method": "compressed-tensors",
        "format": "dense",
        "config_groups": {},
        "ignore": ["lm_head"],
        "kv_cache_scheme": {
            "num_bits": 8,
            "type": "float",
            "strategy": "tensor",
            "symmetric": True,
            "dynamic": False,
        },
    }
    (folder / "config.json").write_text(json.dumps(config))
    for file in DEMO_MODEL.glob("*token*"):
        (folder / file.name).symlink_to(file)
    return folder


@contextmanager
def rounded_writes() -> Iterator[None]:
    """Engines that are started meanwhile keep keys and values as 8 bits would leave them."""
    from specontext_vllm.engine.backend import SpeContextImpl

    update = SpeContextImpl.do_kv_cache_update

    def rounded(impl, layer, key, value, kv_cache, slots):
        number = int(layer.layer_name.split(".")[2])
        # Not made on the host: a captured graph may hold it.
        by_key, by_value = (
            torch.full((), scales[number], device=key.device)
            for scales in (KEY_SCALES, VALUE_SCALES)
        )
        key = (to_float8(key, by_key).float() * by_key).to(key.dtype)
        value = (to_float8(value, by_value).float() * by_value).to(value.dtype)
        update(impl, layer, key, value, kv_cache, slots)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(SpeContextImpl, "do_kv_cache_update", rounded)
        yield


def cache_of(worker) -> tuple[torch.dtype, int, float, float]:
    """Dtype and bytes a page of a layer's cache, and the last layer's scales."""
    runtime = worker.model_runner.runtime
    layer = worker.vllm_config.compilation_config.static_forward_context[runtime.layers.names[-1]]
    cache = layer.kv_cache
    return cache.dtype, cache[0].nbytes, float(layer._k_scale), float(layer._v_scale)


def first_layer(worker) -> torch.Tensor:
    """What the first layer's cache stands for."""
    runtime = worker.model_runner.runtime
    layer = worker.vllm_config.compilation_config.static_forward_context[runtime.layers.names[0]]
    keys, values = layer.impl._stored(layer.kv_cache).float().cpu().chunk(2, -1)
    return torch.cat((keys * layer._k_scale.cpu(), values * layer._v_scale.cpu()), -1)


def answers(llm, prompts) -> dict[str, list[list[int]]]:
    """A whole budget where there is room for it, then a small one: alone, at once, behind hits."""

    def ask(chosen):
        return ids(
            llm.generate([{"prompt_token_ids": p} for p in chosen], sampling(), use_tqdm=False)
        )

    chosen = [prompts[3], prompts[5], prompts[7], prompts[8]]
    out = {"whole": ask(chosen)}
    llm.collective_rpc("specontext_set", kwargs={"budget": SMALL})
    llm.reset_prefix_cache()
    llm.collective_rpc("specontext_stats", args=(True,))
    out["small"] = [ask([prompt])[0] for prompt in chosen]
    out["at once, behind hits"] = ask(chosen[::-1])
    stats = llm.collective_rpc("specontext_stats")[0]
    assert stats["pages_read"] < 0.5 * stats["pages_total"]
    return out


def run(prompts, model, **settings):
    settings = {**SETTINGS, "budget": WHOLE, **settings}
    with engine(
        **{**SHAPE, "model": str(model)}, additional_config={"specontext": settings}
    ) as llm:
        out = answers(llm, prompts)
        out["cache"] = llm.collective_rpc(cache_of)[0]
        out["first layer"] = llm.collective_rpc(first_layer)[0]
        out["poisoned"] = llm.collective_rpc(times_poisoned)[0]
        out["stats"] = llm.collective_rpc("specontext_stats")[0]
        return out


@pytest.fixture(scope="module")
def rounded(prompts):
    with rounded_writes():
        return run(prompts, DEMO_MODEL)


@pytest.fixture(scope="module")
def float8(prompts, scaled_model):
    return run(prompts, scaled_model)


@pytest.fixture(scope="module")
def tiered(prompts, scaled_model):
    with poisoned_tiers():
        # Frames for a quarter of the tokens.
        return run(
            prompts, scaled_model, budget=SMALL, host_kv_gib=0.1, gpu_kv_gib=0.0025 - SAVED_GIB
        )


HEAD_PAGE = 16 * 2 * 64
"""Elements of a page of one KV head."""


def test_the_checkpoint_s_scales_and_dtype_are_those_of_the_cache(float8, rounded, tiered):
    dtype, page_bytes, key, value = float8["cache"]
    assert dtype == torch.uint8 and page_bytes == 2 * HEAD_PAGE
    assert (key, value) == pytest.approx((KEY_SCALES[-1], VALUE_SCALES[-1]))
    assert rounded["cache"][:2] == (torch.float32, 4 * 2 * HEAD_PAGE)
    assert tiered["cache"] == (FP8, *float8["cache"][1:])


@pytest.mark.parametrize("which", ["whole", "small", "at once, behind hits"])
def test_tokens_are_those_of_keys_and_values_rounded_the_same_way(float8, rounded, which):
    assert float8[which] == rounded[which]


@pytest.mark.parametrize("which", ["small", "at once, behind hits"])
def test_two_tiers_give_the_tokens_of_one(float8, tiered, which):
    assert tiered["poisoned"] > 20 and tiered["stats"]["fetched_bytes"] > 0
    assert tiered[which] == float8[which]


def test_the_first_layer_s_cache_is_the_other_s(float8, rounded):
    """Its keys and values do not hang on any attention before. With one tier."""
    assert (float8["first layer"] != 0).sum() > 100_000
    # vLLM's Triton kernel does not divide as IEEE has it: halfway between two numbers that shows.
    different = (float8["first layer"] != rounded["first layer"]).sum()
    assert different <= (10 if CUDA else 0)


ANSWERED = slice(4, None)
"""Of the prompts, those that the model answers: what it says otherwise hangs on near-ties."""


def ask_whole(prompts, **changes) -> list[list[int]]:
    shape = {**SHAPE, **changes}
    with engine(**shape) as llm:
        return [
            ids(llm.generate([{"prompt_token_ids": p}], sampling(max_tokens=40), use_tqdm=False))[0]
            for p in prompts[ANSWERED]
        ]


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_tokens_are_those_of_stock_with_an_8_bit_cache(prompts, scaled_model, dtype):
    """Prefill: Triton's attention in float32, FlashAttention 3 on Hopper in bfloat16. In stock's
    decode steps queries have 8 bits, too.
    """
    settings = {"specontext": {**SETTINGS, "budget": WHOLE}}
    found = ask_whole(prompts, model=str(scaled_model), dtype=dtype, additional_config=settings)
    stock = {**STOCK, "attention_backend": None, "model": str(scaled_model), "dtype": dtype}
    expected = ask_whole(prompts, **stock)
    same = [one == other for one, other in zip(found, expected, strict=True)]
    assert sum(same) >= len(same) - 1, (found, expected)
