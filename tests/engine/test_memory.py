"""What is refused before an engine starts because its memory for KV is too small."""

from __future__ import annotations

import pytest
import torch

from specontext_vllm.config import ConfigError
from specontext_vllm.engine import refusals
from specontext_vllm.engine.layers import LayerShape
from specontext_vllm.engine.memory import memory_model, override_pages, refuse_small_memory
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
            "host_kv_gib: --num-gpu-blocks-override 40000 blocks need",
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
        refuse_small_memory(config, prepare_vllm_config(config))
    assert (
        sentence in str(error.value)
        and "\n" not in str(error.value)
        and "on the GPU" not in str(error.value)
    )


def test_the_smallest_memory_that_is_named_is_enough():
    refused = vllm_config({"specontext": {"gpu_kv_gib": 0.0001}})
    with pytest.raises(ConfigError) as error:
        refuse_small_memory(refused, prepare_vllm_config(refused))
    needed = float(str(error.value).split(" needs ")[1].split()[0])
    enough = vllm_config({"specontext": {"gpu_kv_gib": needed + 0.01}})
    refuse_small_memory(enough, prepare_vllm_config(enough))
    # vLLM fits the length to the memory, and takes the blocks that it is told to.
    for changes in (
        {"model": {"original_max_model_len": -1}},
        {"cache": {"num_gpu_blocks_override": 300}},
    ):
        config = vllm_config({"specontext": {"gpu_kv_gib": 0.01}}, **changes)
        refuse_small_memory(config, prepare_vllm_config(config))


def test_plans_are_of_whole_blocks():
    blocks_of_four = {"block_size": 64, "user_specified_block_size": True}
    config = vllm_config(
        {"specontext": {"host_kv_gib": 0.25}},
        cache={**blocks_of_four, "num_gpu_blocks_override": 9},
    )
    prepare_vllm_config(config)
    memory = memory_model(config, 6, LayerShape(4, 2, 64), 1000, block_pages=4)
    assert override_pages(config, memory) == 36
    assert memory.max_pages == 4096 // 16
    for gpu_mib in range(30, 60):
        assert memory.plan(gpu_mib << 20, 1 << 28).num_pages % 4 == 0
        assert memory.plan(gpu_mib << 20, 0).num_pages % 4 == 0
    # A request holds whole blocks, and vLLM keeps one back.
    assert memory.min_gpu_bytes(0, 65) == memory.size(4 + 8, 0, 1).gpu_bytes
    assert all(
        longest % 64 == 0 for longest in memory.thresholds(memory.plan(40 << 20, 1 << 28), 3)
    )
