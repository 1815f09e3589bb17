"""A vLLM configuration without vLLM."""

from __future__ import annotations

from types import SimpleNamespace

import torch
from vllm.config import CompilationMode, CUDAGraphMode

from tests.engine.conftest import DEMO_MODEL


def vllm_config(additional=None, model=None, cache=None, parallel=None, scheduler_cls=None, **top):
    """A stand-in with the attributes that are read before an engine starts, of the demo model."""
    text = SimpleNamespace(num_hidden_layers=6, num_attention_heads=4, layer_types=None)
    fields = dict(
        model=str(DEMO_MODEL),
        runner_type="generate",
        use_mla=False,
        is_hybrid=False,
        is_attention_free=False,
        is_encoder_decoder=False,
        is_mm_prefix_lm=False,
        is_multimodal_model=False,
        enable_prompt_embeds=False,
        enable_sleep_mode=False,
        logits_processors=None,
        hf_text_config=text,
        hf_config=SimpleNamespace(_name_or_path=""),
        get_sliding_window=lambda: None,
        get_hidden_size=lambda: 256,
        get_total_num_kv_heads=lambda: 2,
        get_num_kv_heads=lambda parallel: 2,
        get_num_attention_heads=lambda parallel: 4,
        get_head_size=lambda: 64,
        get_vocab_size=lambda: 3136,
        max_model_len=4096,
        original_max_model_len=4096,
        dtype=torch.bfloat16,
    )
    return SimpleNamespace(
        model_config=SimpleNamespace(**{**fields, **(model or {})}),
        cache_config=SimpleNamespace(
            **{
                "cache_dtype": "auto",
                "kv_cache_dtype_skip_layers": [],
                "block_size": None,
                "user_specified_block_size": False,
                "kv_offloading_size": None,
                "kv_offloading_backend": "native",
                "kv_sharing_fast_prefill": False,
                "num_gpu_blocks_override": None,
                "kv_cache_memory_bytes": None,
                **(cache or {}),
            }
        ),
        parallel_config=SimpleNamespace(
            **{
                "pipeline_parallel_size": 1,
                "decode_context_parallel_size": 1,
                "prefill_context_parallel_size": 1,
                "enable_dbo": False,
                "tensor_parallel_size": 1,
                "data_parallel_size_local": 1,
                "use_ray": False,
                "distributed_executor_backend": None,
                "worker_cls": "auto",
                **(parallel or {}),
            }
        ),
        scheduler_config=SimpleNamespace(
            scheduler_cls=scheduler_cls, max_num_seqs=4, max_num_active_seqs=None
        ),
        compilation_config=SimpleNamespace(
            cudagraph_mode=CUDAGraphMode.NONE,
            mode=CompilationMode.NONE,
            splitting_ops=None,
            use_inductor_graph_partition=False,
            max_cudagraph_capture_size=0,
        ),
        additional_config={} if additional is None else additional,
        **{
            "speculative_config": None,
            "kv_transfer_config": None,
            "lora_config": None,
            "structured_outputs_config": SimpleNamespace(backend="auto"),
            "weight_transfer_config": None,
            **top,
        },
    )
