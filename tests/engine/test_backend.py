"""What vLLM asks of a backend before it takes it. It asks on a GPU alone, so what a CPU serves says
nothing of the answers.
"""

from __future__ import annotations

import pytest
import torch

from specontext_vllm.engine.backend import SpeContextBackend

ASKED = {
    "head_size": 128,
    "dtype": torch.bfloat16,
    "kv_cache_dtype": "auto",
    "block_size": 16,
    "use_mla": False,
    "has_sink": False,
    "use_sparse": False,
    "use_mm_prefix": False,
    "use_per_head_quant_scales": False,
    "attn_type": "decoder",
}


def refused(**changes) -> list[str]:
    from vllm.platforms.interface import DeviceCapability

    return SpeContextBackend.validate_configuration(
        **{**ASKED, **changes}, device_capability=DeviceCapability(9, 0)
    )


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"has_sink": True, "head_size": 64},
        {"use_kv_connector": True},
        {"kv_cache_dtype": "fp8_e4m3"},
        {"dtype": torch.float32, "head_size": 256, "block_size": 64},
    ],
)
def test_vllm_takes_it_for_what_it_serves(changes):
    assert refused(**changes) == []


@pytest.mark.parametrize(
    "changes",
    [
        {"use_mla": True},
        {"use_mm_prefix": True},
        {"has_sliding_window": True},
        {"kv_cache_dtype": "nvfp4"},
        {"use_per_head_quant_scales": True},
    ],
)
def test_vllm_refuses_it_for_what_it_does_not_serve(changes):
    assert len(refused(**changes)) == 1
