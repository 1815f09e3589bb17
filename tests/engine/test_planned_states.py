"""Sizes of states that `specontext plan` reads from a config, beside vLLM's own."""

from __future__ import annotations

from collections.abc import Callable
from math import prod
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from specontext_vllm.other_layers import state_bytes
from tests.engine.families import falcon_h1, granite_hybrid, nemotron_h, qwen3_next


def jamba() -> Any:
    from transformers import JambaConfig

    return JambaConfig(hidden_size=64, num_hidden_layers=8, mamba_d_state=8)


def lfm2() -> Any:
    from transformers import Lfm2Config

    return Lfm2Config(hidden_size=64, conv_dim=96, conv_L_cache=4)


def olmo_hybrid() -> Any:
    from transformers import OlmoHybridConfig

    return OlmoHybridConfig(hidden_size=96, num_attention_heads=6)


def qwen3_5(**changes: Any) -> Any:
    from transformers import Qwen3_5TextConfig

    return Qwen3_5TextConfig(hidden_size=64, linear_num_value_heads=6, **changes)


def with_float32_states() -> Any:
    return qwen3_5(mamba_ssm_dtype="float32")


ARCHITECTURES: dict[Callable[[], Any], tuple[str, str]] = {
    qwen3_next: ("Qwen3NextForCausalLM", "auto"),
    qwen3_5: ("Qwen3_5ForCausalLM", "auto"),
    with_float32_states: ("Qwen3_5ForCausalLM", "float32"),
    olmo_hybrid: ("OlmoHybridForCausalLM", "auto"),
    granite_hybrid: ("GraniteMoeHybridForCausalLM", "auto"),
    falcon_h1: ("FalconH1ForCausalLM", "auto"),
    nemotron_h: ("NemotronHForCausalLM", "float32"),
    jamba: ("JambaForCausalLM", "auto"),
    lfm2: ("Lfm2ForCausalLM", "auto"),
}
"""vLLM's class, and the dtype of states that its config.py takes from the model's config."""


@pytest.mark.parametrize("family", ARCHITECTURES, ids=lambda family: family.__name__)
def test_a_state_has_vllm_s_size(family):
    from vllm.model_executor.models import ModelRegistry

    name, dtype = ARCHITECTURES[family]
    config = family()
    loaded = ModelRegistry.models[name].load_model_cls()
    engine = SimpleNamespace(
        parallel_config=SimpleNamespace(tensor_parallel_size=1),
        cache_config=SimpleNamespace(
            use_replayssm=False, mamba_cache_dtype="auto", mamba_ssm_cache_dtype=dtype
        ),
        model_config=SimpleNamespace(dtype=torch.bfloat16, hf_config=config, hf_text_config=config),
        speculative_config=None,
        num_speculative_tokens=0,
    )
    shapes = loaded.get_mamba_state_shape_from_config(engine)
    dtypes = loaded.get_mamba_state_dtype_from_config(engine)
    size = sum(prod(shape) * kind.itemsize for shape, kind in zip(shapes, dtypes, strict=True))
    assert state_bytes(config, torch.bfloat16) == size > 0


def test_of_other_families_the_size_is_unknown():
    from transformers import MiniMaxConfig

    assert state_bytes(MiniMaxConfig(), torch.bfloat16) is None
