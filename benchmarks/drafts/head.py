"""An EAGLE-3 checkpoint of random weights, which serves as drafter and as retrieval head."""

from __future__ import annotations

import json
import math
from pathlib import Path

from benchmarks.shapes import Shape

DRAFT_VOCABULARY = 32000
"""Tokens that a drafter says, as public EAGLE-3 heads of Llama-3.1-8B have them; a smaller
vocabulary whole."""


def write_eagle3(shape: Shape, folder: Path) -> Path:
    """Make ``folder`` an EAGLE-3 head of the shape's widths: one layer like the target's, over the
    hidden states of three layers, with an LM head of its own and the target's embedding.
    """
    import torch
    from safetensors.torch import save_file

    hidden, inner, dim = shape.hidden_size, shape.intermediate_size, shape.head_dim
    queries, keys = shape.num_attention_heads * dim, shape.num_key_value_heads * dim
    said = min(DRAFT_VOCABULARY, shape.vocab_size)
    layer = "midlayer"
    matrices = {
        "fc": (hidden, 3 * hidden),
        "lm_head": (said, hidden),
        f"{layer}.self_attn.q_proj": (queries, 2 * hidden),
        f"{layer}.self_attn.k_proj": (keys, 2 * hidden),
        f"{layer}.self_attn.v_proj": (keys, 2 * hidden),
        f"{layer}.self_attn.o_proj": (hidden, queries),
        f"{layer}.mlp.gate_proj": (inner, hidden),
        f"{layer}.mlp.up_proj": (inner, hidden),
        f"{layer}.mlp.down_proj": (hidden, inner),
    }
    norms = ("input_layernorm", "hidden_norm", "post_attention_layernorm")
    generator = torch.Generator().manual_seed(0)
    tensors = {
        # As large as keeps what they multiply of order 1.
        f"{name}.weight": torch.empty(size, dtype=torch.bfloat16).normal_(
            std=1 / math.sqrt(size[1]), generator=generator
        )
        for name, size in matrices.items()
    }
    for name in (*(f"{layer}.{norm}" for norm in norms), "norm"):
        tensors[f"{name}.weight"] = torch.ones(hidden, dtype=torch.bfloat16)
    if said < shape.vocab_size:
        # Of each token that is said, how far its id lies behind.
        tensors["d2t"] = torch.arange(said) * (shape.vocab_size // said - 1)
    layers = shape.num_hidden_layers
    # vLLM's default, for which a small model has too few layers.
    aux = [2, layers // 2, layers - 3] if layers >= 8 else [1, layers // 2, layers - 1]
    config = {
        **shape.config,
        "architectures": ["LlamaForCausalLMEagle3"],
        "num_hidden_layers": 1,
        "draft_vocab_size": said,
        "target_hidden_size": hidden,
        "eagle_aux_hidden_state_layer_ids": aux,
        "eagle_config": {"eagle_aux_hidden_state_layer_ids": aux, "use_aux_hidden_state": True},
    }
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config))
    return folder
