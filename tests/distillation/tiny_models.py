"""Random models of the families that are served, small enough to compare with transformers' eager
attention.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

WIDTHS = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 5,
    "num_attention_heads": 4,
    "max_position_embeddings": 512,
}
FAMILIES = ("llama", "mistral", "qwen2", "qwen3")


def make_config(family: str, **changes: Any) -> Any:
    """A config of a family; Mistral's window is off, as in its later models."""
    from transformers import LlamaConfig, MistralConfig, Qwen2Config, Qwen3Config

    kind = {
        "llama": LlamaConfig,
        "mistral": MistralConfig,
        "qwen2": Qwen2Config,
        "qwen3": Qwen3Config,
    }[family]
    own: dict[str, Any] = {"mistral": {"sliding_window": None}, "qwen3": {"head_dim": 16}}.get(
        family, {}
    )
    return kind(**{**WIDTHS, "num_key_value_heads": 2, **own, **changes})


def make_model(config: Any, seed: int = 0) -> Any:
    """Random weights large enough that attention is far from uniform."""
    from transformers import AutoModelForCausalLM

    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            # Norms as well: a q-norm of ones would hide that it is left out.
            is_norm = parameter.dim() == 1 and "norm" in name
            parameter.copy_(
                torch.rand_like(parameter) + 0.5 if is_norm else torch.randn_like(parameter) * 0.3
            )
    return model


def write_model(folder: Path, config: Any, seed: int = 0) -> Path:
    """The folder of ``make_model``'s."""
    make_model(config, seed).save_pretrained(folder)
    return folder
