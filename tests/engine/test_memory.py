"""What is refused before an engine starts because its memory for KV is too small."""

from __future__ import annotations

import pytest
import torch

from specontext_vllm.config import ConfigError
from specontext_vllm.engine import refusals
from specontext_vllm.engine.memory import refuse_small_room
from specontext_vllm.engine.prepare import prepare_vllm_config
from tests.engine.configs import vllm_config


@pytest.mark.parametrize(
    ("additional", "top", "sentence"),
    [
        (
            {"attention_provider": "flash"},
            {},
            "additional_config.specontext.attention_provider: found 'flash', which needs a GPU; "
            "use auto on a CPU.",
        ),
        (
            {"attention_provider": "xformers"},
            {},
            "additional_config.specontext.attention_provider: found 'xformers', which needs a GPU",
        ),
        (
            {"gpu_kv_gib": 0.0001},
            {},
            "specontext.gpu_kv_gib: found 0.0001, but one request of 4096 tokens (--max-model-len) "
            "needs 0.0129 GiB, the head's",
        ),
        (
            {"gpu_kv_gib": 0.001, "host_kv_gib": 0.5},
            {},
            "specontext.gpu_kv_gib: found 0.001, but one request of 4096 tokens",
        ),
        (
            {"host_kv_gib": 1},
            {"cache": {"kv_cache_memory_bytes": 1 << 20}},
            "--gpu-memory-utilization: it leaves 0.001 GiB for KV, but one request of",
        ),
        (
            {"host_kv_gib": 0.1},
            {"cache": {"kv_cache_memory_bytes": 1 << 30}},
            "host_kv_gib: 0.10 GiB of host memory add less than 2% to what 1.00 GiB",
        ),
        (
            {"host_kv_gib": 0.1},
            {"cache": {"kv_cache_memory_bytes": 1 << 20, "num_gpu_blocks_override": 40000}},
            "host_kv_gib: --num-gpu-blocks-override 40000 pages need",
        ),
    ],
    ids=[
        "flash",
        "xformers",
        "gpu_kv_gib",
        "both tiers",
        "what vLLM takes",
        "gains nothing",
        "blocks",
    ],
)
@pytest.mark.skipif(
    torch.cuda.is_available(), reason="what a CPU cannot; and keys of the model's dtype"
)
def test_what_can_be_judged_before_anything_is_loaded_is(monkeypatch, additional, top, sentence):
    monkeypatch.setattr(refusals, "free_host_memory", lambda: 40 << 30)
    config = vllm_config({"specontext": additional}, **top)
    with pytest.raises(ConfigError) as error:
        refuse_small_room(config, prepare_vllm_config(config))
    assert (
        sentence in str(error.value)
        and "\n" not in str(error.value)
        and "on the GPU" not in str(error.value)
    )


def test_the_least_room_that_is_named_is_enough():
    refused = vllm_config({"specontext": {"gpu_kv_gib": 0.0001}})
    with pytest.raises(ConfigError) as error:
        refuse_small_room(refused, prepare_vllm_config(refused))
    needed = float(str(error.value).split(" needs ")[1].split()[0])
    enough = vllm_config({"specontext": {"gpu_kv_gib": needed + 0.01}})
    refuse_small_room(enough, prepare_vllm_config(enough))
    # vLLM fits the length to the room, and takes the blocks that it is told to.
    for changes in (
        {"model": {"original_max_model_len": -1}},
        {"cache": {"num_gpu_blocks_override": 300}},
    ):
        config = vllm_config({"specontext": {"gpu_kv_gib": 0.01}}, **changes)
        refuse_small_room(config, prepare_vllm_config(config))
