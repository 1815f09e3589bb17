"""Small random models of the families whose layers differ from one another, one from each family's
own configuration class.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from benchmarks.near_tie import gap
from tests.distillation.tiny_models import make_model
from tests.engine.conftest import engine

WINDOW = 48
"""Tokens: three pages, far fewer than the prompts have."""
SLIDING, FULL = "sliding_attention", "full_attention"
WIDTHS = {
    "vocab_size": 97,
    "hidden_size": 128,
    "intermediate_size": 192,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 1024,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": 0,
}
SHAPE = {**WIDTHS, "head_dim": 32}
GPT_OSS = {
    "intermediate_size": 64,
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
    "rope_parameters": {
        "rope_type": "yarn",
        "rope_theta": 10000.0,
        "factor": 2.0,
        "beta_fast": 32.0,
        "beta_slow": 1.0,
        "truncate": False,
        "original_max_position_embeddings": 512,
    },
    "attn_implementation": "eager",
}
"""What a small gpt-oss has besides its widths and layers."""


def layers(*types: str) -> dict[str, Any]:
    """``layer_types`` by first letters, and what goes with them."""
    return {"num_hidden_layers": len(types), "layer_types": list(types), "sliding_window": WINDOW}


def gemma3() -> Any:
    from transformers import Gemma3TextConfig

    return Gemma3TextConfig(**SHAPE, query_pre_attn_scalar=32, **layers(SLIDING, FULL, SLIDING))


def gemma2() -> Any:
    """A cap on attention logits, low enough to be felt."""
    from transformers import Gemma2Config

    return Gemma2Config(
        **SHAPE,
        query_pre_attn_scalar=32,
        attn_logit_softcapping=2.0,
        attn_implementation="eager",
        **layers(SLIDING, FULL, SLIDING, FULL),
    )


def gemma4(pairs: int = 3, readers: int = 2) -> Any:
    """Layers of full attention have heads of their own width, and values that are their keys; the
    last ``readers`` layers read the KV of others.
    """
    from transformers import Gemma4TextConfig

    return Gemma4TextConfig(
        **SHAPE,
        global_head_dim=64,
        num_global_key_value_heads=2,
        attention_k_eq_v=True,
        num_kv_shared_layers=readers,
        hidden_size_per_layer_input=16,
        vocab_size_per_layer_input=97,
        **layers(*(SLIDING, FULL) * pairs),
    )


def gpt_oss() -> Any:
    """Learned sinks, experts, and a window in every second layer."""
    from transformers import GptOssConfig

    return GptOssConfig(
        **{**SHAPE, **GPT_OSS},
        **layers(SLIDING, FULL, SLIDING, FULL),
    )


def olmo3() -> Any:
    from transformers import Olmo3Config

    # Three of full attention to one with a window, which vLLM keeps in a group each.
    return Olmo3Config(**WIDTHS, **layers(FULL, SLIDING, FULL, FULL))


def cohere2() -> Any:
    from transformers import Cohere2Config

    return Cohere2Config(**SHAPE, **layers(FULL, SLIDING, SLIDING, FULL))


def exaone4() -> Any:
    from transformers import Exaone4Config

    kinds = layers(SLIDING, SLIDING, SLIDING, FULL)
    return Exaone4Config(**SHAPE, sliding_window_pattern=4, **kinds)


def llama() -> Any:
    """Windows on more layers than not, and two of full attention side by side; transformers has no
    windows in this family.
    """
    from transformers import LlamaConfig

    config = LlamaConfig(**SHAPE, num_hidden_layers=5)
    config.layer_types, config.sliding_window = [SLIDING, FULL, FULL, SLIDING, SLIDING], WINDOW
    return config


def llama4() -> Any:
    """Chunks in three of four layers, no RoPE in the fourth, experts."""
    from transformers import Llama4TextConfig

    return Llama4TextConfig(
        **{**SHAPE, "intermediate_size": 64},
        intermediate_size_mlp=192,
        num_hidden_layers=4,
        num_local_experts=4,
        num_experts_per_tok=1,
        interleave_moe_layer_step=2,
        attention_chunk_size=64,
        no_rope_layers=[1, 1, 1, 0],
    )


def mistral(*types: str) -> Any:
    from transformers import MistralConfig

    config = MistralConfig(**SHAPE, num_hidden_layers=len(types))
    config.layer_types, config.sliding_window = list(types), WINDOW
    return config


def qwen3_next() -> Any:
    """Gated linear attention in three of four layers, gated attention with RoPE on a quarter."""
    from transformers import Qwen3NextConfig

    linear = {f"linear_{kind}_head_dim": 128 for kind in ("key", "value")}
    experts = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64}
    return Qwen3NextConfig(
        **SHAPE,
        **experts,
        **linear,
        num_hidden_layers=4,
        shared_expert_intermediate_size=64,
        linear_num_value_heads=4,
        linear_num_key_heads=2,
    )


def granite_hybrid() -> Any:
    """Mamba 2 and attention in turns."""
    from transformers import GraniteMoeHybridConfig

    return GraniteMoeHybridConfig(
        **WIDTHS,
        num_hidden_layers=4,
        layer_types=["mamba", "attention"] * 2,
        num_local_experts=0,
        mamba_n_heads=8,
        mamba_d_head=32,
        mamba_d_state=16,
        shared_intermediate_size=192,
    )


def falcon_h1(layers: int = 2) -> Any:
    """Mamba 2 and attention side by side in each layer."""
    from transformers import FalconH1Config

    return FalconH1Config(
        **SHAPE,
        num_hidden_layers=layers,
        mamba_d_ssm=128,
        mamba_n_heads=4,
        mamba_d_head=32,
        mamba_d_state=16,
    )


def nemotron_h(pattern: str = "MM*-M", vocabulary: int = 97) -> Any:
    """Layers of Mamba 2, of attention and of an MLP."""
    from transformers import NemotronHConfig

    return NemotronHConfig(
        **{**SHAPE, "vocab_size": vocabulary},
        num_hidden_layers=len(pattern),
        hybrid_override_pattern=pattern,
        mamba_num_heads=8,
        mamba_head_dim=32,
        ssm_state_size=16,
        n_groups=2,
    )


def smollm3() -> Any:
    """No RoPE in every second layer."""
    from transformers import SmolLM3Config

    return SmolLM3Config(**WIDTHS, num_hidden_layers=2, no_rope_layers=[1, 0])


def glm4() -> Any:
    """RoPE on half of the dimensions, and two norms more in a layer."""
    from transformers import Glm4Config

    return Glm4Config(**SHAPE, num_hidden_layers=2)


def glm4_moe() -> Any:
    """RoPE on half of the dimensions, norms of queries and keys, experts."""
    from transformers import Glm4MoeConfig

    return Glm4MoeConfig(
        **SHAPE,
        num_hidden_layers=2,
        moe_intermediate_size=64,
        n_routed_experts=4,
        num_experts_per_tok=2,
        first_k_dense_replace=1,
        n_group=1,
        topk_group=1,
        partial_rotary_factor=0.5,
        use_qk_norm=True,
    )


def minimax_m2() -> Any:
    """RoPE on half of the dimensions, norms over all heads' queries and keys, experts; with the
    fields that released models have and transformers' class does not name. Its gates are sigmoids,
    which vLLM does not run on a CPU.
    """
    from transformers import MiniMaxM2Config

    return MiniMaxM2Config(
        **{**SHAPE, "intermediate_size": 64},
        num_hidden_layers=2,
        num_local_experts=4,
        num_experts_per_tok=2,
        rotary_dim=16,
        scoring_func="softmax",
        use_routing_bias=True,
    )


def granite() -> Any:
    """A scale of attention of its own."""
    from transformers import GraniteConfig

    return GraniteConfig(**WIDTHS, num_hidden_layers=2, attention_multiplier=0.3)


HYBRID: dict[str, Callable[[], Any]] = {
    family.__name__: family for family in (qwen3_next, granite_hybrid, falcon_h1, nemotron_h)
}
PLAIN: dict[str, Callable[[], Any]] = {
    family.__name__: family for family in (smollm3, glm4, glm4_moe, minimax_m2, granite)
}
CHUNKED: dict[str, Callable[[], Any]] = {"llama4": llama4}
WINDOWED: dict[str, Callable[[], Any]] = {
    family.__name__: family
    for family in (
        gemma2,
        gemma3,
        gemma4,
        gpt_oss,
        olmo3,
        cohere2,
        exaone4,
        llama,
    )
}


def write(folder: Path, config: Any, seed: int = 0) -> torch.nn.Module:
    """A random model of ``config``, saved in ``folder``."""
    model = make_model(config, seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            adds_one = config.model_type in ("gemma2", "gemma3_text", "qwen3_next")
            if adds_one and "norm" in name and "linear_attn" not in name:
                parameter.sub_(1.0)  # which the norms add
            elif name.endswith("sinks"):
                parameter.mul_(10)  # some far above every logit, some far below
            elif name.endswith("A_log"):
                parameter.copy_(torch.rand_like(parameter))
            elif name.endswith("dt_bias"):
                parameter.copy_(torch.rand_like(parameter) - 3)  # states that last
            elif "gemma" in config.model_type and "embed_tokens" in name:
                parameter.mul_(0.05)  # tied, so that a token would be its own successor
    model.save_pretrained(folder)
    return model.eval()


class Asked:
    """An engine with one of these models, and what it answers."""

    def __init__(self, llm: Any) -> None:
        self.llm = llm

    def answer(self, prompts: list[list[int]], count: int) -> list[list[int]]:
        """``count`` tokens for each prompt, all asked at once."""
        from vllm import SamplingParams

        params = SamplingParams(
            temperature=0, max_tokens=count, ignore_eos=True, detokenize=False, logprobs=2
        )
        self.replies = self.llm.generate(
            [{"prompt_token_ids": prompt} for prompt in prompts], params, use_tqdm=False
        )
        return [list(reply.outputs[0].token_ids) for reply in self.replies]

    @property
    def gaps(self) -> list[list[float]]:
        """Of the tokens that were answered last, how far the second likeliest was behind."""
        return [[gap(token) for token in reply.outputs[0].logprobs] for reply in self.replies]

    @property
    def cached_tokens(self) -> list[int]:
        """Of the prompts that were answered last, how many each found in the prefix cache."""
        return [reply.num_cached_tokens for reply in self.replies]

    def set(self, **changes: Any) -> None:
        """Change settings, with a cold prefix cache and counters at zero."""
        self.llm.collective_rpc("specontext_set", kwargs=changes)
        self.llm.collective_rpc("specontext_stats", args=(True,))
        if self.llm.llm_engine.vllm_config.cache_config.enable_prefix_caching:
            self.llm.reset_prefix_cache()

    @property
    def stats(self) -> dict[str, Any]:
        return self.llm.collective_rpc("specontext_stats")[0]

    @property
    def runner(self) -> Any:
        return self.llm.llm_engine.model_executor.driver_worker.worker.model_runner


@contextmanager
def serving(folder: Path, **arguments: Any) -> Iterator[Asked]:
    """An engine with the model in ``folder``: stock vLLM's, or ours with settings."""
    # By itself vLLM takes FlashInfer's kernel on some GPUs, and fails where that is not installed.
    additional: dict[str, Any] = {"gdn_prefill_backend": "triton"}
    if (settings := arguments.pop("settings", None)) is not None:
        additional["specontext"] = settings
        arguments |= {"attention_backend": "specontext", "block_size": None}
    elif not torch.cuda.is_available():
        arguments = {"block_size": 32, **arguments}
    given = {
        "model": str(folder),
        "skip_tokenizer_init": True,
        "max_model_len": 1024,
        "num_gpu_blocks_override": 200,
        "additional_config": additional,
        **arguments,
    }
    with engine(**given) as llm:
        yield Asked(llm)
