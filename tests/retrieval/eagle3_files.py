"""Synthetic EAGLE-3 checkpoints in the three published layouts, for tests."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

SEED = 20251


@dataclass
class Layout:
    """Shape and oddities of a synthetic checkpoint. Odd sizes on purpose: head_dim * num_heads is
    not hidden_size.

    `config` changes the flat config, or speculators' nested one; `own_level` the latter's top
    level.
    """

    format: str = "safeailab"
    hidden_size: int = 40
    target_hidden_size: int | None = None
    num_heads: int = 6
    num_kv_heads: int = 3
    head_dim: int = 10
    num_aux: int = 3
    vocab_size: int = 77
    draft_vocab_size: int = 33
    intermediate_size: int = 56
    qk_norm: bool = False
    bias: bool = False
    norm_before_fc: bool = False
    fc_norm: bool = False
    own_embedding: bool = False
    vocabulary_maps: bool = True
    prefix: str = ""
    storage: str = "safetensors"
    dtype: torch.dtype = torch.float32
    config: dict[str, Any] = field(default_factory=dict)
    own_level: dict[str, Any] = field(default_factory=dict)
    drop_config: tuple[str, ...] = ()

    @property
    def target_width(self) -> int:
        return self.target_hidden_size or self.hidden_size


def make_tensors(layout: Layout) -> dict[str, Tensor]:
    """Every tensor of the draft model, the pruned ones included, under the layout's names."""
    generator = torch.Generator().manual_seed(SEED)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator) / shape[-1] ** 0.5

    def norm(size: int) -> Tensor:
        return 1 + 0.3 * torch.randn(size, generator=generator)

    h, i, d = layout.hidden_size, layout.intermediate_size, layout.head_dim
    q, kv = layout.num_heads * d, layout.num_kv_heads * d
    aux = layout.num_aux * layout.target_width
    layer = {
        "input_layernorm.weight": norm(h),
        "hidden_norm.weight": norm(h),
        "post_attention_layernorm.weight": norm(h),
        "self_attn.q_proj.weight": random(q, 2 * h),
        "self_attn.k_proj.weight": random(kv, 2 * h),
        "self_attn.v_proj.weight": random(kv, 2 * h),
        "self_attn.o_proj.weight": random(h, q),
        "mlp.gate_proj.weight": random(i, h),
        "mlp.up_proj.weight": random(i, h),
        "mlp.down_proj.weight": random(h, i),
    }
    if layout.bias:
        layer |= {
            f"self_attn.{n}_proj.bias": random(s) for n, s in (("q", q), ("k", kv), ("v", kv))
        }
    if layout.qk_norm:
        layer |= {"self_attn.q_norm.weight": norm(d), "self_attn.k_norm.weight": norm(d)}
    block = "layers.0." if layout.format == "speculators" else "midlayer."
    tensors = {block + name: tensor for name, tensor in layer.items()}
    tensors |= {"fc.weight": random(h, aux), "norm.weight": norm(h)}
    if layout.norm_before_fc:
        tensors["input_norm.weight"] = norm(aux)
    if layout.fc_norm:
        tensors |= {f"fc_norm.{n}.weight": norm(layout.target_width) for n in range(layout.num_aux)}
    if layout.own_embedding:
        tensors["embed_tokens.weight"] = random(layout.vocab_size, h)
    tensors = {layout.prefix + name: tensor.to(layout.dtype) for name, tensor in tensors.items()}
    tensors["lm_head.weight"] = random(layout.draft_vocab_size, h).to(layout.dtype)
    if layout.vocabulary_maps:
        tensors["d2t"] = torch.arange(layout.draft_vocab_size)
        tensors["t2d"] = torch.zeros(layout.vocab_size, dtype=torch.bool)
    return tensors


def make_config(layout: Layout) -> dict[str, Any]:
    flat = {
        "model_type": "llama",
        "hidden_size": layout.hidden_size,
        "intermediate_size": layout.intermediate_size,
        "num_attention_heads": layout.num_heads,
        "num_key_value_heads": layout.num_kv_heads,
        "num_hidden_layers": 1,
        "head_dim": layout.head_dim,
        "rms_norm_eps": 1e-5,
        "vocab_size": layout.vocab_size,
        "max_position_embeddings": 64,
    }
    own = {
        "draft_vocab_size": layout.draft_vocab_size,
        "target_hidden_size": layout.target_hidden_size,
    }
    if layout.norm_before_fc:
        own["norm_before_fc"] = True
    if layout.fc_norm:
        own["fc_norm"] = True
    for source in (flat, own):
        for key in layout.drop_config:
            source.pop(key, None)
    if layout.format == "speculators":
        own |= {
            "architectures": ["Eagle3Speculator"],
            "speculators_model_type": "eagle3",
            "speculators_config": {
                "algorithm": "eagle3",
                "verifier": {"name_or_path": "some/target"},
            },
            "eagle_aux_hidden_state_layer_ids": None,
            "transformer_layer_config": flat | layout.config,
        }
        return own | layout.own_level
    names = {"safeailab": "LlamaForCausalLM", "specforge": "LlamaForCausalLMEagle3"}
    return flat | own | {"architectures": [names[layout.format]]} | layout.config


def write_checkpoint(
    folder: Path, layout: Layout, tensors: dict[str, Tensor] | None = None
) -> Path:
    """Writes config.json and the weights; `tensors` replaces what `make_tensors` gives."""
    tensors = make_tensors(layout) if tensors is None else tensors
    (folder / "config.json").write_text(json.dumps(make_config(layout)))
    half = len(tensors) // 2
    shards = [dict(list(tensors.items())[:half]), dict(list(tensors.items())[half:])]
    match layout.storage:
        case "safetensors":
            save_file(tensors, folder / "model.safetensors")
        case "safetensors_sharded":
            _write_shards(
                folder,
                shards,
                "model-{:05d}-of-00002.safetensors",
                "model.safetensors.index.json",
                save_file,
            )
        case "bin":
            torch.save(tensors, folder / "pytorch_model.bin")
        case "bin_legacy":
            torch.save(tensors, folder / "pytorch_model.bin", _use_new_zipfile_serialization=False)
        case "bin_sharded":
            _write_shards(
                folder,
                shards,
                "pytorch_model-{:05d}-of-00002.bin",
                "pytorch_model.bin.index.json",
                torch.save,
            )
    return folder


def _write_shards(
    folder: Path, shards: list[dict[str, Tensor]], pattern: str, index: str, save: Any
) -> None:
    weight_map = {}
    for number, shard in enumerate(shards, start=1):
        save(shard, folder / pattern.format(number))
        weight_map |= dict.fromkeys(shard, pattern.format(number))
    (folder / index).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
