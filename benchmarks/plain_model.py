"""A teacher as the plain-torch model that decodes with a retrieval head."""

from __future__ import annotations

from typing import Any

import torch

from specontext_vllm.demo.model import Model
from specontext_vllm.demo.sizes import Size
from specontext_vllm.distillation.shape import DraftShape
from specontext_vllm.distillation.teacher import Teacher


def plain_model(teacher: Teacher) -> Any | None:
    """The teacher as the plain-torch model of demo/model.py, which decodes with a head; None where
    that cannot compute it.
    """
    config, state = teacher.model.config, teacher.model.state_dict()
    shape = DraftShape.for_target(config, max_position=0)
    first, middle, last = teacher.aux_layers
    size = Size(
        hidden=shape.hidden,
        ffn=shape.ffn,
        layers=config.num_hidden_layers,
        heads=shape.heads,
        kv_heads=shape.kv_heads,
        head_dim=shape.head_dim,
        aux_layers=(first, middle, last),
        theta=shape.rope_theta,
        eps=shape.eps,
    )
    with torch.device("meta"):
        model = Model(size, shape.vocabulary).requires_grad_(False)
    stretched = (getattr(config, "rope_parameters", None) or {}).get(
        "rope_type", "default"
    ) != "default"
    # A bias, or norms of queries and keys, are tensors that it does not have.
    if config.model_type != "llama" or stretched or set(model.checkpoint()) != set(state):
        return None
    model.to_empty(device=teacher.device)
    for name, parameter in model.checkpoint().items():
        parameter.copy_(state[name])
    return model
