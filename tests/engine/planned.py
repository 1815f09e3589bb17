"""`specontext plan` beside what an engine found when it started."""

from __future__ import annotations

from dataclasses import replace
from math import ceil
from pathlib import Path
from typing import Any

from specontext_vllm import planning
from specontext_vllm.config import SpeContextConfig
from specontext_vllm.other_layers import other_layers


def planned_as_served(folder: Path, asked: Any) -> planning.Model:
    """The plan's model of a folder, with what it takes for granted of a GPU as this engine has it:
    what the retriever keeps of a page, and the dtype of states that vLLM changed for a CPU.
    """
    from transformers import AutoConfig

    runner = asked.runner
    cache, text = runner.cache_config, AutoConfig.from_pretrained(folder).get_text_config()
    model = planning.read_model(folder, prefix_caching=cache.enable_prefix_caching)
    if cache.mamba_ssm_cache_dtype != "auto":
        text.mamba_ssm_dtype = text.mamba_ssm_cache_dtype = cache.mamba_ssm_cache_dtype
    shape, kv = runner.runtime.layers.shape, model.kv
    assert (kv.num_kv_heads, kv.head_dim) == (shape.num_kv_heads, shape.head_dim)
    dtype = runner.model_config.dtype
    others = other_layers(
        text, kv.num_layers, dtype, dtype.itemsize, bool(cache.enable_prefix_caching)
    )
    kv = replace(kv, itemsize=dtype.itemsize, retriever_page_bytes=_kept_of_a_page(asked))
    return replace(model, kv=kv, others=others)


def _kept_of_a_page(asked: Any) -> int:
    from specontext_vllm.engine.kv_group import expected_block

    runner = asked.runner
    worker, layers = asked.llm.llm_engine.model_executor.driver_worker.worker, runner.runtime.layers
    block = expected_block(runner.vllm_config, worker.get_kv_cache_spec(), layers.kv_names)
    return runner.runtime.kv_plan._memory_model(block).shape.retriever_page_bytes


def assert_planned(folder: Path, asked: Any, kv_bytes: int) -> None:
    """States, their blocks and the number of blocks are what the engine found, with ``kv_bytes``
    for all that requests keep.
    """
    from vllm.v1.kv_cache_interface import MambaSpec

    runner = asked.runner
    model = planned_as_served(folder, asked)
    states = model.others.states
    assert states is not None
    groups = runner.kv_cache_config.kv_cache_groups
    of_states = [group for group in groups if isinstance(group.kv_cache_spec, MambaSpec)]
    spec = of_states[0].kv_cache_spec
    (full,) = (group for group in groups if group not in of_states)
    assert states.layers == sum(len(group.layer_names) for group in of_states)
    assert states.groups == len(of_states)
    assert states.group_layers == max(len(group.layer_names) for group in groups)
    assert states.state_bytes == spec.state_content_size_bytes
    assert states.block_bytes == states.group_layers * spec.page_size_bytes
    assert states.kept == spec.max_memory_usage_bytes(runner.vllm_config) // spec.page_size_bytes
    assert states.block_tokens == full.kv_cache_spec.block_size
    requests = runner.scheduler_config.max_num_seqs
    beside = model.weight_bytes + model.head_bytes + planning.ACTIVATIONS + kv_bytes
    made = planning.make_plan(
        model,
        SpeContextConfig(budget=128),
        gpu_bytes=ceil(beside / planning.UTILIZATION),
        host_bytes=0,
        requests=requests,
        max_model_len=1024,
        miss_rate=None,
        link_bytes_per_s=5e10,
    )
    blocks = made.tiers.num_pages // model.block_pages + requests * states.request_blocks
    assert blocks == runner.cache_config.num_gpu_blocks
