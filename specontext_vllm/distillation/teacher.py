"""The target as a teacher: its hidden states, and where its layers look."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from specontext_vllm.config import PAGE_SIZE
from specontext_vllm.distillation.llama import causal_attention
from specontext_vllm.distillation.losses import AttentionCollector
from specontext_vllm.model_config import has_windowed_layers
from specontext_vllm.retrieval.checkpoint import layer_groups

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
        target, mass: from ``AttentionCollector``.
        cache: transformers' cache of all keys and values, if it was to be kept.
    """

    embeds: Tensor
    aux: Tensor
    hidden: Tensor
    target: Tensor
    mass: Tensor
    cache: Any = None


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
    """Refuse models whose layers cannot be watched, or not all in the same way.

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
                f"--model: {config.model_type} {found}, for which distill makes no heads; give "
                f"{wanted}."
            )


def register_attention() -> None:
    """Register ``ATTENTION`` with transformers: causal attention that passes queries and keys to
    the module's ``observer``, if it has one, and reads only the pages of its ``chosen``
    ``[B, nkv, Q, pages]`` (bool), if it has some.
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
        chosen = getattr(module, "chosen", None)
        if chosen is not None:
            return _paged_attention(query, key, value, chosen, scaling).transpose(1, 2), None
        return causal_attention(query, key, value, scaling).transpose(1, 2), None

    AttentionInterface.register(ATTENTION, attend)
    # Rows are packed without padding, so no mask is needed besides the causal one.
    AttentionMaskInterface.register(ATTENTION, lambda *_, **__: None)


def _paged_attention(
    query: Tensor, key: Tensor, value: Tensor, chosen: Tensor, scale: float | None
) -> Tensor:
    """Attention of the newest Q tokens to themselves and to what came before, within the chosen
    pages: ``query [B, nh, Q, D]``, ``key, value [B, nkv, T, D]``.
    """
    length, newest = key.shape[2], query.shape[2]
    read = chosen.repeat_interleave(PAGE_SIZE, -1)[..., :length]
    token = torch.arange(length, device=key.device)
    read = read & (token <= token[length - newest :, None])
    read = read.repeat_interleave(query.shape[1] // key.shape[1], 1)
    return F.scaled_dot_product_attention(
        query, key, value, attn_mask=read, scale=scale, enable_gqa=True
    )


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
    def __call__(
        self, ids: Tensor, at: Tensor, collector: AttentionCollector, *, keep_cache: bool = False
    ) -> Lesson:
        """Run ``ids [B, T]`` and collect where positions ``at [B, S]`` (counted without token 0)
        attend to.

        Args:
            keep_cache: keep the keys and values, for ``decode``.
        """
        for layer in self.layers:
            layer.self_attn.observer = lambda q, k, scale: collector.observe(q, k, at, scale)
        try:
            with self._aux_states() as states:
                output = self.model.base_model(input_ids=ids, use_cache=keep_cache)
        finally:
            for layer in self.layers:
                del layer.self_attn.observer
        target, mass = collector.result()
        return Lesson(
            self.embed(ids),
            self._joined(states),
            output.last_hidden_state,
            target,
            mass,
            output.past_key_values if keep_cache else None,
        )

    @torch.no_grad()
    def decode(self, ids: Tensor, cache: Any, first: int, chosen: Tensor) -> Tensor:
        """Auxiliary states ``[B, Q, num_aux * H]`` of the tokens ``first`` to ``first + Q - 1``,
        where the layers read the chosen pages only, over the dense keys and values of what came
        before.

        Args:
            ids: ``[B, T]``.
            cache: of a ``Lesson`` of the same tokens, or of those that ``ids`` are several times;
                it stays as it is.
            chosen: ``[B, G * nkv, Q, pages]`` bool, the pages that hold tokens up to
                ``first + Q - 1``, of one group of layers after the other.
        """
        from transformers import DynamicCache

        copies = len(ids) // len(cache.layers[0].keys)

        def past_of(whole: Tensor) -> Tensor:
            before = whole[:, :, :first]
            return before if copies == 1 else before.repeat(copies, 1, 1, 1)

        past = DynamicCache(config=self.model.config)
        for number, layer in enumerate(cache.layers):
            past.update(past_of(layer.keys), past_of(layer.values), number)
        each = chosen.split(cache.layers[0].keys.shape[1], 1)
        for layer, group in zip(self.layers, layer_groups(len(self.layers), len(each))):
            layer.self_attn.chosen = each[group]
        try:
            with self._aux_states() as states:
                self.model.base_model(
                    input_ids=ids[:, first : first + chosen.shape[2]],
                    past_key_values=past,
                    use_cache=True,
                )
        finally:
            for layer in self.layers:
                del layer.self_attn.chosen
        return self._joined(states)

    @contextmanager
    def _aux_states(self) -> Iterator[dict[int, Tensor]]:
        """What enters the auxiliary layers while the model runs."""
        states: dict[int, Tensor] = {}
        hooks = []
        for place in self.aux_layers:
            module = self.layers[place] if place < len(self.layers) else self.model.base_model.norm

            def keep(_: Any, arguments: tuple, named: dict, place: int = place) -> None:
                states[place] = arguments[0] if arguments else named["hidden_states"]

            hooks.append(module.register_forward_pre_hook(keep, with_kwargs=True))
        try:
            yield states
        finally:
            for hook in hooks:
                hook.remove()

    def _joined(self, states: dict[int, Tensor]) -> Tensor:
        return torch.cat([states[place] for place in self.aux_layers], -1)
