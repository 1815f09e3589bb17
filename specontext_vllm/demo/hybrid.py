"""The demo model with linear attention in most layers: transformers' Qwen3.5, trained from nothing
on the demo's rows. Its head is `specontext distill`'s.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn

from specontext_vllm.demo.sizes import Size
from specontext_vllm.synthetic import tasks


class Hybrid(nn.Module):
    """A Qwen3.5 of this size: each layer of full attention behind ``size.linear`` linear ones.

    Args:
        vocabulary: number of tokens.
        ids: of the tokens that begin, end and fill up texts.
    """

    def __init__(self, size: Size, vocabulary: int, ids: dict[str, int]) -> None:
        from transformers import Qwen3_5ForCausalLM, Qwen3_5TextConfig

        super().__init__()
        self.size = size
        config = Qwen3_5TextConfig(
            vocab_size=vocabulary,
            hidden_size=size.hidden,
            intermediate_size=size.ffn,
            num_hidden_layers=size.layers,
            layer_types=[
                "full_attention" if size.is_full(i) else "linear_attention"
                for i in range(size.layers)
            ],
            num_attention_heads=size.heads,
            num_key_value_heads=size.kv_heads,
            head_dim=size.head_dim,
            linear_num_key_heads=size.kv_heads,
            linear_num_value_heads=size.heads,
            linear_key_head_dim=size.head_dim,
            linear_value_head_dim=size.head_dim,
            max_position_embeddings=size.max_position,
            rms_norm_eps=size.eps,
            rope_parameters={
                "rope_type": "default",
                "rope_theta": size.theta,
                "partial_rotary_factor": 0.25,
            },
            tie_word_embeddings=False,
            bos_token_id=ids[tasks.BOS],
            eos_token_id=ids[tasks.END],
            pad_token_id=ids[tasks.PAD],
        )
        self.model = Qwen3_5ForCausalLM(config)

    @property
    def blocks(self) -> list[nn.Module]:
        """Layers that share their code and can be compiled: none, since kernels of linear attention
        are the environment's (flash-linear-attention) or transformers' own loop.
        """
        return []

    def forward(self, ids: Tensor) -> Tensor:
        """Logits ``[B, T, V]`` of ``ids [B, T]``."""
        return self.model(input_ids=ids, use_cache=False).logits

    def save(self, out: Path) -> None:
        """Write the model as a Hugging Face folder in bfloat16."""
        self.model.to(torch.bfloat16).save_pretrained(out)
