"""The target as a teacher: its hidden states, and where its layers look."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from specontext_vllm.distillation.losses import AttentionTarget

ATTENTION = "specontext_teacher"
"""Name under which transformers knows the attention function that lets us look on."""


class TeacherError(ValueError):
    """A model that cannot be a teacher; the message is one sentence."""


@dataclass(frozen=True)
class Lesson:
    """What a frozen forward pass shows.

    Attributes:
        embeds: ``[B, T, H]`` of the tokens.
        aux: ``[B, T, num_aux * H]`` states that enter the auxiliary layers.
        hidden: ``[B, T, H]`` that the LM head reads.
        target, mass: from ``AttentionTarget``, without token 0: ``[B, nkv, S, T - 1]``, ``[B, nkv, S]``.
    """

    embeds: Tensor
    aux: Tensor
    hidden: Tensor
    target: Tensor
    mass: Tensor


def load_teacher(folder: Path, device: torch.device, dtype: torch.dtype) -> Any:
    """A frozen causal LM of transformers from a local folder.

    Raises:
        TeacherError: not a model with full attention in every layer.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(folder)
    check_teacher(config)
    register_attention()
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, attn_implementation=ATTENTION).to(device).eval().requires_grad_(False)


def check_teacher(config: Any) -> None:
    """Raise a TeacherError for models that the backend does not serve either."""
    kinds = set(getattr(config, "layer_types", None) or ["full_attention"])
    sliding = getattr(config, "sliding_window", None) and getattr(config, "use_sliding_window", True) and kinds != {"full_attention"}
    if sliding or kinds != {"full_attention"} or not hasattr(config, "num_attention_heads"):
        raise TeacherError(
            f"--model: {config.model_type} has layers of the kinds {sorted(kinds)}, and the specontext backend serves models with full attention in "
            "every layer; give such a model."
        )


def register_attention() -> None:
    """Make ``ATTENTION`` known to transformers: causal attention that shows queries and keys to the module's ``observer``."""
    from transformers import AttentionInterface, AttentionMaskInterface

    def attend(
        module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, scaling: float | None = None, **rest: Any
    ) -> tuple[Tensor, None]:
        observer = getattr(module, "observer", None)
        if observer is not None:
            observer(query, key)
        mixed = F.scaled_dot_product_attention(query, key, value, is_causal=True, scale=scaling, enable_gqa=True)
        return mixed.transpose(1, 2), None

    AttentionInterface.register(ATTENTION, attend)
    # Rows are packed without padding, so no mask is needed beside the causal one.
    AttentionMaskInterface.register(ATTENTION, lambda *_, **__: None)


class Teacher:
    """A frozen model that is watched.

    Args:
        model: from ``load_teacher``.
        aux_layers: layers whose input states it hands over; the number of layers stands for the last one's output.
        watched: layers whose attention counts; None for all.
    """

    def __init__(self, model: Any, aux_layers: Sequence[int], watched: Sequence[int] | None = None) -> None:
        self.model, self.aux_layers = model, tuple(aux_layers)
        self.layers = model.base_model.layers
        self.watched = range(len(self.layers)) if watched is None else watched

    @property
    def device(self) -> torch.device:
        return self.model.device

    def embed(self, ids: Tensor) -> Tensor:
        return self.model.get_input_embeddings()(ids)

    def logits(self, hidden: Tensor, ids: Tensor | None = None) -> Tensor:
        """Logits of the tokens ``ids`` (None: all) for ``hidden [..., H]``."""
        weight = self.model.get_output_embeddings().weight
        return F.linear(hidden, weight if ids is None else weight[ids])

    @torch.no_grad()
    def __call__(self, ids: Tensor, at: Tensor, collector: AttentionTarget) -> Lesson:
        """Run ``ids [B, T]`` and watch where positions ``at [B, S]`` (counted without token 0) look."""
        states: dict[int, Tensor] = {}
        hooks = []
        for place in self.aux_layers:
            module = self.layers[place] if place < len(self.layers) else self.model.base_model.norm

            def keep(_: Any, arguments: tuple, named: dict, place: int = place) -> None:
                states[place] = arguments[0] if arguments else named["hidden_states"]

            hooks.append(module.register_forward_pre_hook(keep, with_kwargs=True))
        for place in self.watched:
            # Token 0 has no pair in the head, and is a sink in the teacher.
            self.layers[place].self_attn.observer = lambda q, k: collector.watch(q[:, :, 1:], k[:, :, 1:], at)
        try:
            hidden = self.model.base_model(input_ids=ids, use_cache=False).last_hidden_state
        finally:
            for hook in hooks:
                hook.remove()
            for place in self.watched:
                del self.layers[place].self_attn.observer
        target, mass = collector.result()
        return Lesson(self.embed(ids), torch.cat([states[place] for place in self.aux_layers], -1), hidden, target, mass)
