"""config.json contents of the shapes that benchmarks measure."""

from __future__ import annotations

from typing import Any

_LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "torch_dtype": "bfloat16",
    "hidden_act": "silu",
    "rms_norm_eps": 1e-5,
    "attention_bias": False,
    "mlp_bias": False,
    "tie_word_embeddings": False,
}
_LLAMA_3: dict[str, Any] = {
    "num_key_value_heads": 8,
    "vocab_size": 128256,
    "max_position_embeddings": 131072,
    "rope_theta": 500000.0,
    "bos_token_id": 128000,
    "eos_token_id": 128001,
}
"""What its sizes have in common."""
_LLAMAS: dict[str, dict[str, Any]] = {
    "70b": {
        **_LLAMA_3,
        "hidden_size": 8192,
        "intermediate_size": 28672,
        "num_hidden_layers": 80,
        "num_attention_heads": 64,
        "head_dim": 128,
    },
    "8b": {
        **_LLAMA_3,
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "head_dim": 128,
    },
    "1b": {
        **_LLAMA_3,
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 16,
        "num_attention_heads": 32,
        "head_dim": 64,
    },
    "smollm2": {
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "head_dim": 64,
        "vocab_size": 49152,
        "max_position_embeddings": 131072,
        "rope_theta": 100000.0,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "tie_word_embeddings": True,
    },
    "tiny": {
        "hidden_size": 128,
        "intermediate_size": 256,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 32,
        "vocab_size": 1024,
        "max_position_embeddings": 4096,
        "rope_theta": 10000.0,
        "bos_token_id": 1,
        "eos_token_id": 2,
    },
}


def _windowed(layers: int, **widths: Any) -> dict[str, Any]:
    """gpt-oss' attention in a Granite: learned sinks, biases, and a window in every second layer,
    the first among them.
    """
    return {
        **_LLAMA,
        "architectures": ["GraniteForCausalLM"],
        "model_type": "granite",
        "attention_bias": True,
        "attention_sinks": True,
        "attention_multiplier": widths["head_dim"] ** -0.5,
        "num_hidden_layers": layers,
        "layer_types": ["sliding_attention", "full_attention"] * (layers // 2),
        **widths,
    }


def _linear(layers: int, **widths: Any) -> dict[str, Any]:
    """A dense Qwen3.5: gated linear attention in three of four layers; gated attention with RoPE on
    a quarter of the dimensions in the fourth.
    """
    return {
        **_LLAMA,
        "architectures": ["Qwen3_5ForCausalLM"],
        "model_type": "qwen3_5_text",
        "rms_norm_eps": 1e-6,
        "num_hidden_layers": layers,
        "layer_types": (["linear_attention"] * 3 + ["full_attention"]) * (layers // 4),
        "linear_conv_kernel_dim": 4,
        "linear_key_head_dim": 128,
        "linear_value_head_dim": 128,
        "attn_output_gate": True,
        "mamba_ssm_dtype": "float32",
        "partial_rotary_factor": 0.25,
        "rope_theta": 10000000.0,
        **widths,
    }


CONFIGS: dict[str, dict[str, Any]] = {
    **{name: {**_LLAMA, **widths} for name, widths in _LLAMAS.items()},
    "gpt-oss-20b": _windowed(
        24,
        hidden_size=2880,
        intermediate_size=11520,
        num_attention_heads=64,
        num_key_value_heads=8,
        head_dim=64,
        sliding_window=128,
        vocab_size=201088,
        max_position_embeddings=131072,
        rope_theta=150000.0,
        bos_token_id=199998,
        eos_token_id=200002,
    ),
    "qwen3.5-9b": _linear(
        32,
        hidden_size=4096,
        intermediate_size=12288,
        num_attention_heads=16,
        num_key_value_heads=4,
        head_dim=256,
        linear_num_key_heads=16,
        linear_num_value_heads=32,
        vocab_size=248320,
        max_position_embeddings=262144,
        bos_token_id=None,
        eos_token_id=248044,
    ),
    "tiny-gpt-oss": _windowed(
        6,
        hidden_size=128,
        intermediate_size=256,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        sliding_window=32,
        vocab_size=1024,
        max_position_embeddings=4096,
        rope_theta=10000.0,
        bos_token_id=1,
        eos_token_id=2,
    ),
    "tiny-qwen3.5": _linear(
        8,
        hidden_size=128,
        intermediate_size=256,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        linear_num_key_heads=1,
        linear_num_value_heads=2,
        vocab_size=1024,
        max_position_embeddings=4096,
        bos_token_id=1,
        eos_token_id=2,
    ),
}
"""By the name of the shape."""

NOTES = {
    "gpt-oss-20b": "Stand-in for gpt-oss-20b: its attention (24 layers of 64 query and 8 KV heads "
    "of 64, learned sinks, a window of 128 tokens in every second layer), hidden size and "
    "vocabulary, in vLLM's Granite, with a dense MLP as wide as the four experts that a token "
    "of gpt-oss is given, in 16 bits. A batch of gpt-oss reads more experts, in 4 bits.",
    "qwen3.5-9b": "The dense Qwen3.5 of 9B parameters, its text model: 24 layers of gated linear "
    "attention, 8 of full attention with 16 query and 4 KV heads of 256. The linear layers' "
    "prefill runs on vLLM's Triton kernels, for stock vLLM as well.",
}
"""What stands below the tables of a shape."""
