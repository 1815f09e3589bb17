"""The demo model: a small Llama in plain torch, and its Hugging Face folder."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from specontext_vllm.demo.log import Log
from specontext_vllm.demo.sizes import Size
from specontext_vllm.distillation.llama import causal_attention, gated_mlp, rms_norm, split_heads
from specontext_vllm.retrieval.rope import rotate_halves
from specontext_vllm.synthetic import tasks


def rotate(x: Tensor, positions: Tensor, theta: float) -> Tensor:
    """RoPE on ``x [..., T, D]`` at ``positions [T]``, in x's dtype."""
    half = x.shape[-1] // 2
    frequency = theta ** (-torch.arange(half, device=x.device, dtype=torch.float32) / half)
    angle = positions[:, None].float() * frequency
    return rotate_halves(x, angle.cos().to(x.dtype), angle.sin().to(x.dtype))


def windowed_attention(q: Tensor, k: Tensor, v: Tensor, window: int) -> Tensor:
    """``causal_attention`` in which each token reads the newest ``window`` ones, itself among them.

    In blocks of ``window`` tokens, whose queries read their own block and the one before it.
    """
    length = q.shape[2]

    def blocks(x: Tensor) -> Tensor:  # [B, n, T, D] -> [B, T / W, n, W, D]
        padded = F.pad(x, (0, 0, 0, -length % window))
        return padded.unflatten(2, (-1, window)).transpose(1, 2)

    def with_before(x: Tensor) -> Tensor:  # [B, T / W, n, W, D] -> [B, T / W, n, 2 * W, D]
        return torch.cat([F.pad(x, (0, 0, 0, 0, 0, 0, 1, 0))[:, :-1], x], 3)

    query = blocks(q)
    place = (
        torch.arange(2 * window, device=q.device) - torch.arange(window, device=q.device)[:, None]
    )
    read = ((place > 0) & (place <= window)).repeat(query.shape[1], 1, 1)
    read[0, :, :window] = False
    attended = F.scaled_dot_product_attention(
        query,
        with_before(blocks(k)),
        with_before(blocks(v)),
        attn_mask=read[:, None],
        enable_gqa=True,
    )
    return attended.transpose(1, 2).flatten(2, 3)[:, :, :length]


class Block(nn.Module):
    """A Llama decoder layer, with a window of so many tokens or none."""

    def __init__(self, size: Size, window: int) -> None:
        super().__init__()
        self.size, self.window = size, window
        h, q, kv = size.hidden, size.heads * size.head_dim, size.kv_heads * size.head_dim
        self.input_layernorm = nn.Parameter(torch.ones(h))
        self.post_attention_layernorm = nn.Parameter(torch.ones(h))
        self.q_proj = nn.Linear(h, q, False)
        self.k_proj = nn.Linear(h, kv, False)
        self.v_proj = nn.Linear(h, kv, False)
        self.o_proj = nn.Linear(q, h, False)
        self.gate_proj = nn.Linear(h, size.ffn, False)
        self.up_proj = nn.Linear(h, size.ffn, False)
        self.down_proj = nn.Linear(size.ffn, h, False)

    def qkv(self, x: Tensor, positions: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Rotated queries ``[B, nh, T, D]`` and keys, and values ``[B, nkv, T, D]``, of
        ``x [B, T, H]``.
        """
        y = rms_norm(x, self.input_layernorm, self.size.eps)
        q, k, v = (
            split_heads(p(y), self.size.head_dim) for p in (self.q_proj, self.k_proj, self.v_proj)
        )
        return rotate(q, positions, self.size.theta), rotate(k, positions, self.size.theta), v

    def rest(self, x: Tensor, attended: Tensor) -> Tensor:
        """The layer's output, from its input and the attention's output ``[B, nh, T, D]``."""
        x = x + self.o_proj(attended.transpose(1, 2).flatten(-2))
        y = rms_norm(x, self.post_attention_layernorm, self.size.eps)
        return x + gated_mlp(y, self.gate_proj, self.up_proj, self.down_proj)

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Attention ``[B, nh, T, D]`` of a whole sequence."""
        if self.window:
            return windowed_attention(q, k, v, self.window)
        return causal_attention(q, k, v)

    def forward(self, x: Tensor, positions: Tensor) -> Tensor:
        return self.rest(x, self.attend(*self.qkv(x, positions)))


@dataclass(frozen=True)
class Layers:
    """What passes through the layers: ``output [B, T, H]`` of the last one, ``aux [B, T, 3H]``, and
    each layer's queries ``[B, nh, T, D]``, keys and values ``[B, nkv, T, D]``.
    """

    output: Tensor
    aux: Tensor
    queries: list[Tensor]
    keys: list[Tensor]
    values: list[Tensor]


class Model(nn.Module):
    """A Llama, whose tensors ``checkpoint`` renames to Hugging Face's names."""

    def __init__(self, size: Size, vocabulary: int) -> None:
        super().__init__()
        self.size = size
        self.embed_tokens = nn.Embedding(vocabulary, size.hidden)
        self.layers = nn.ModuleList(Block(size, size.window_of(i)) for i in range(size.layers))
        self.norm = nn.Parameter(torch.ones(size.hidden))
        self.lm_head = nn.Linear(size.hidden, vocabulary, False)
        for parameter in self.parameters():
            if parameter.dim() > 1:
                nn.init.normal_(parameter, 0.0, 0.02)
        for block in self.blocks:
            block.o_proj.weight.data /= math.sqrt(2 * size.layers)
            block.down_proj.weight.data /= math.sqrt(2 * size.layers)

    @property
    def blocks(self) -> list[Block]:
        """The layers, with their type."""
        return cast(list[Block], list(self.layers))

    def full(self, layers: Sequence[Any]) -> list[Any]:
        """Of one thing for each layer those of layers that attend to the whole context."""
        return [x for x, block in zip(layers, self.blocks, strict=True) if not block.window]

    def head(self, x: Tensor) -> Tensor:
        """Logits of the last layer's output."""
        return self.lm_head(rms_norm(x, self.norm, self.size.eps))

    def forward(self, ids: Tensor) -> Tensor:
        positions = torch.arange(ids.shape[1], device=ids.device)
        x = self.embed_tokens(ids)
        for block in self.layers:
            x = block(x, positions)
        return self.head(x)

    @torch.no_grad()
    def watch(self, ids: Tensor) -> Layers:
        """A frozen forward pass of ``ids [B, T]``, and what passes through its layers."""
        positions = torch.arange(ids.shape[1], device=ids.device)
        x = self.embed_tokens(ids)
        aux: list[Tensor] = []
        parts: list[tuple[Tensor, Tensor, Tensor]] = []
        for i, block in enumerate(self.blocks):
            if i in self.size.aux_layers:
                aux.append(x)
            parts.append(block.qkv(x, positions))
            x = block.rest(x, block.attend(*parts[-1]))
        queries, keys, values = (list(part) for part in zip(*parts, strict=True))
        return Layers(x, torch.cat(aux, -1), queries, keys, values)

    def checkpoint(self) -> dict[str, Tensor]:
        """Tensors under Hugging Face's Llama names."""
        out = {
            "lm_head.weight": self.lm_head.weight,
            "model.embed_tokens.weight": self.embed_tokens.weight,
            "model.norm.weight": self.norm,
        }
        for i, block in enumerate(self.layers):
            for name, value in block.named_parameters():
                stem = name.removesuffix(".weight")
                part = (
                    "self_attn."
                    if stem in ("q_proj", "k_proj", "v_proj", "o_proj")
                    else "mlp."
                    if "proj" in stem
                    else ""
                )
                out[f"model.layers.{i}.{part}{stem}.weight"] = value
        return out


def save_model(model: Model, vocabulary: int, ids: dict[str, int], out: Path) -> None:
    """Write the model as a Hugging Face folder in bfloat16."""
    from safetensors.torch import save_file

    size = model.size
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": size.hidden,
        "intermediate_size": size.ffn,
        "num_hidden_layers": size.layers,
        "num_attention_heads": size.heads,
        "num_key_value_heads": size.kv_heads,
        "head_dim": size.head_dim,
        "vocab_size": vocabulary,
        "max_position_embeddings": size.max_position,
        "rms_norm_eps": size.eps,
        "rope_theta": size.theta,
        "hidden_act": "silu",
        "tie_word_embeddings": False,
        "attention_bias": False,
        "mlp_bias": False,
        "torch_dtype": "bfloat16",
        "bos_token_id": ids[tasks.BOS],
        "eos_token_id": ids[tasks.END],
        "pad_token_id": ids[tasks.PAD],
    }
    if size.window:
        # transformers' Llama knows no windows; CWM is a Llama with them. In vLLM it is Llama's.
        kinds = ("full_attention", "sliding_attention")
        config |= {
            "model_type": "cwm",
            "layer_types": [kinds[bool(size.window_of(i))] for i in range(size.layers)],
            "sliding_window": size.window,
            "rope_parameters": {"rope_type": "default", "rope_theta": size.theta},
        }
        del config["rope_theta"]
    (out / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    generation = {k: config[k] for k in ("bos_token_id", "eos_token_id", "pad_token_id")}
    (out / "generation_config.json").write_text(json.dumps(generation, indent=2) + "\n")
    tensors = {
        k: v.detach().to(torch.bfloat16).cpu().contiguous() for k, v in model.checkpoint().items()
    }
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})


def check_equals_transformers(model: Model, folder: Path, log: Log) -> None:
    """Compare logits with transformers' model loaded from the folder, both in float32 on the CPU.

    Raises:
        RuntimeError: they differ, so that the folder would serve another model.
    """
    from transformers import AutoModelForCausalLM

    reference = AutoModelForCausalLM.from_pretrained(str(folder), dtype=torch.float32)
    mine = Model(model.size, model.embed_tokens.num_embeddings)
    mine.load_state_dict(
        {k: v.detach().to(torch.bfloat16).float().cpu() for k, v in model.state_dict().items()}
    )
    torch.set_float32_matmul_precision("highest")
    sample = torch.randint(0, model.embed_tokens.num_embeddings, (1, 300))
    with torch.no_grad():
        difference = (mine(sample) - reference(sample).logits).abs().max().item()
    log(f"largest difference of logits to transformers' model: {difference:.2e}")
    if not difference < 1e-3:
        raise RuntimeError(
            f"{folder}: transformers computes other logits (difference {difference:.2e})."
        )
