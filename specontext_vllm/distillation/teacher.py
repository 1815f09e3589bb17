"""The target as a teacher: its hidden states, and where its layers look."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from specontext_vllm.distillation.llama import causal_attention
from specontext_vllm.distillation.losses import AttentionCollector
from specontext_vllm.model_config import has_windowed_layers

ATTENTION = "specontext_teacher"
"""Name in transformers of the attention function that can be watched."""


class TeacherError(ValueError):
    """A model that cannot be a teacher; the message is one sentence."""


@dataclass(frozen=True)
class Lesson:
    """What the head learns from a frozen forward pass.

    Attributes:
        embeds: ``[B, T, H]`` of the tokens.
        aux: ``[B, T, num_aux * H]`` states that enter the auxiliary layers.
        hidden: ``[B, T, H]`` states that the LM head reads.
        target, mass: from ``AttentionCollector``, without token 0: ``[B, nkv, S, T - 1]``,
            ``[B, nkv, S]``.
    """

    embeds: Tensor
    aux: Tensor
    hidden: Tensor
    target: Tensor
    mass: Tensor


def read_config(folder: Path) -> Any:
    """transformers' config of a model folder, checked.

    Raises:
        TeacherError: none there, one that cannot be read, or not a model with full attention in
            every layer.
    """
    from transformers import AutoConfig

    if not (folder / "config.json").is_file():
        raise TeacherError(
            f"--model: {folder} has no config.json; give the folder of a Hugging Face model."
        )
    config = _read(AutoConfig, folder)
    check_teacher(config)
    return config


def read_tokenizer(folder: Path) -> Any:
    """The model's tokenizer, a fast one.

    Raises:
        TeacherError: none there, or one that cannot give its tokens' offsets in the text.
    """
    from transformers import AutoTokenizer

    tokenizer = _read(AutoTokenizer, folder)
    if not tokenizer.is_fast:
        raise TeacherError(
            f"--model: {folder} has a slow tokenizer, which gives no offsets of its tokens; add "
            "its tokenizer.json."
        )
    return tokenizer


def load_teacher(folder: Path, device: torch.device, dtype: torch.dtype) -> Any:
    """The frozen causal LM in a folder; its config is one that ``read_config`` took.

    Raises:
        TeacherError: weights that cannot be read, or are not all there.
    """
    from transformers import AutoModelForCausalLM

    register_attention()
    model, found = _read(
        AutoModelForCausalLM,
        folder,
        dtype=dtype,
        attn_implementation=ATTENTION,
        output_loading_info=True,
    )
    # transformers would initialise them at random.
    if missing := sorted(found["missing_keys"]):
        raise TeacherError(
            f"--model: {folder} lacks {len(missing)} of its weights ({missing[0]} for one); "
            "download it in full."
        )
    return model.to(device).eval().requires_grad_(False)


def _read(kind: Any, folder: Path, **options: Any) -> Any:
    from transformers.utils import logging

    verbosity = logging.get_verbosity()
    # Its warnings would come on top of our sentence.
    logging.set_verbosity_error()
    try:
        return kind.from_pretrained(folder, **options)
    except Exception as error:  # each kind of file has errors of its own
        reason = str(error).strip().split("\n")[0].rstrip(".")
        raise TeacherError(
            f"--model: {folder} cannot be read by {kind.__name__} ({type(error).__name__}: "
            f"{reason}); download it in full."
        ) from None
    finally:
        logging.set_verbosity(verbosity)


def check_teacher(config: Any) -> None:
    """Refuse models that the specontext backend does not serve either, or whose layers cannot be
    watched.

    Raises:
        TeacherError: this is one.
    """
    kinds = {str(kind) for kind in getattr(config, "layer_types", None) or ()} - {"full_attention"}
    needed = (
        "hidden_size",
        "vocab_size",
        "max_position_embeddings",
        "num_hidden_layers",
        "num_attention_heads",
        "rms_norm_eps",
        "intermediate_size",
    )
    missing = [key for key in needed if not hasattr(config, key)]
    refusals = [
        (config.is_encoder_decoder, "is an encoder-decoder", "a decoder-only model"),
        (
            getattr(config, "kv_lora_rank", None),
            "has multi-head latent attention (MLA)",
            "a model with ordinary attention",
        ),
        (
            has_windowed_layers(config),
            f"has layers that look back {getattr(config, 'sliding_window', None)} tokens only",
            "a model without sliding windows",
        ),
        (
            kinds,
            f"has layers of the kinds {', '.join(sorted(kinds))}",
            "a model with full attention in every layer",
        ),
        (
            missing,
            f"has no {', '.join(missing)} in its config.json",
            "a text model of the Llama, Qwen or Mistral families",
        ),
    ]
    for refused, found, wanted in refusals:
        if refused:
            raise TeacherError(
                f"--model: {config.model_type} {found}, which the specontext backend does not "
                f"serve; give {wanted}."
            )


def register_attention() -> None:
    """Register ``ATTENTION`` with transformers: causal attention that passes queries and keys to
    the module's ``observer``, if it has one.
    """
    from transformers import AttentionInterface, AttentionMaskInterface

    def attend(
        module: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        scaling: float | None = None,
        **rest: Any,
    ) -> tuple[Tensor, None]:
        observer = getattr(module, "observer", None)
        if observer is not None:
            observer(query, key, scaling)
        return causal_attention(query, key, value, scaling).transpose(1, 2), None

    AttentionInterface.register(ATTENTION, attend)
    # Rows are packed without padding, so no mask is needed besides the causal one.
    AttentionMaskInterface.register(ATTENTION, lambda *_, **__: None)


class Teacher:
    """A frozen model that is watched.

    Args:
        model: from ``load_teacher``.
        aux_layers: layers whose input states are returned; the number of layers means the last
            one's output.
    """

    def __init__(self, model: Any, aux_layers: Sequence[int]) -> None:
        self.model, self.aux_layers = model, tuple(aux_layers)
        self.layers = model.base_model.layers

    @property
    def device(self) -> torch.device:
        return self.model.device

    def embed(self, ids: Tensor) -> Tensor:
        return self.model.get_input_embeddings()(ids)

    def logits(self, hidden: Tensor, ids: Tensor | None = None) -> Tensor:
        """Logits ``[..., V]``, of the tokens ``ids`` only or of all, for ``hidden [..., H]``."""
        weight = self.model.get_output_embeddings().weight
        return F.linear(hidden, weight if ids is None else weight[ids])

    @torch.no_grad()
    def __call__(self, ids: Tensor, at: Tensor, collector: AttentionCollector) -> Lesson:
        """Run ``ids [B, T]`` and collect where positions ``at [B, S]`` (counted without token 0)
        attend to.
        """
        states: dict[int, Tensor] = {}
        hooks = []
        for place in self.aux_layers:
            module = self.layers[place] if place < len(self.layers) else self.model.base_model.norm

            def keep(_: Any, arguments: tuple, named: dict, place: int = place) -> None:
                states[place] = arguments[0] if arguments else named["hidden_states"]

            hooks.append(module.register_forward_pre_hook(keep, with_kwargs=True))
        for layer in self.layers:
            # Token 0 has no pair in the head, and is a sink in the teacher.
            layer.self_attn.observer = lambda q, k, scale: collector.watch(
                q[:, :, 1:], k[:, :, 1:], at, scale
            )
        try:
            hidden = self.model.base_model(input_ids=ids, use_cache=False).last_hidden_state
        finally:
            for hook in hooks:
                hook.remove()
            for layer in self.layers:
                del layer.self_attn.observer
        target, mass = collector.result()
        return Lesson(
            self.embed(ids),
            torch.cat([states[place] for place in self.aux_layers], -1),
            hidden,
            target,
            mass,
        )
