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

from specontext_vllm.distillation.caches import cache_before
from specontext_vllm.distillation.losses import AttentionCollector
from specontext_vllm.distillation.shape import ffn_size, norm_eps
from specontext_vllm.distillation.watched_attention import ATTENTION, register_attention
from specontext_vllm.model_config import (
    has_state,
    is_full,
    kv_heads,
    layer_kinds,
    num_full_layers,
)
from specontext_vllm.retrieval.checkpoint import layer_groups

WATCHABLE = {"full_attention", "sliding_attention", "mlp", "moe"}
"""Kinds of layers that a teacher may have, besides those that keep a state."""


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
        cache: transformers' cache of all keys and values, if it was to be kept; None for models
            with layers that keep a state.
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
        TeacherError: none there, one that cannot be read, or not a model whose layers attend to the
            whole context or to a window, or keep a state.
    """
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoConfig

    if not (folder / "config.json").is_file():
        raise TeacherError(
            f"--model: {folder} has no config.json; give the folder of a Hugging Face model."
        )
    config = _read(AutoConfig, folder)
    text = config.get_text_config()
    # Qwen3.5 nests its language model's, which alone is loaded then.
    models = MODEL_FOR_CAUSAL_LM_MAPPING
    if type(config) in models and models[type(config)].config_class is type(text):
        config = text
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
        reason = " ".join(str(error).split()).rstrip(".")
        raise TeacherError(
            f"--model: {folder} cannot be read by {kind.__name__} ({type(error).__name__}: "
            f"{reason}); download it in full."
        ) from None
    finally:
        logging.set_verbosity(verbosity)


def check_teacher(config: Any) -> None:
    """Refuse models whose layers of full attention cannot be watched, or not all in the same way.

    Raises:
        TeacherError: this is one.
    """
    kinds = {str(kind) for kind in layer_kinds(config) if not has_state(kind)} - WATCHABLE
    needed = (
        "hidden_size",
        "vocab_size",
        "max_position_embeddings",
        "num_hidden_layers",
        "num_attention_heads",
    )
    missing = [key for key in needed if not hasattr(config, key)]
    read = {"rms_norm_eps": norm_eps, "intermediate_size": ffn_size}
    missing += [key for key, value in read.items() if not value(config)]
    refusals = [
        (config.is_encoder_decoder, "is an encoder-decoder", "a decoder-only model"),
        (
            getattr(config, "kv_lora_rank", None),
            "has multi-head latent attention (MLA)",
            "a model with ordinary attention",
        ),
        (
            num_full_layers(config) == 0,
            f"has only layers that look back {config.sliding_window} tokens"
            if getattr(config, "sliding_window", None)
            else "has only layers that keep a state",
            "a model with layers of full attention",
        ),
        (
            kinds,
            f"has layers of the kinds {', '.join(sorted(kinds))}",
            "a model with full attention, sliding windows and layers that keep a state",
        ),
        (
            not missing
            and (
                getattr(config, "num_kv_shared_layers", None)
                or len({kv_heads(config, layer) for layer in range(config.num_hidden_layers)}) > 1
            ),
            "has layers that share KV or differ in their heads",
            "a model whose layers have the same heads",
        ),
        (
            getattr(config, "attn_logit_softcapping", None),
            "caps the logits of attention",
            "a model without attn_logit_softcapping",
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


class Teacher:
    """A frozen model that is watched.

    Args:
        model: from ``load_teacher``.
        aux_layers: layers whose input states are returned; the number of layers means the last
            one's output.

    Attributes:
        layers: all of the model's.
        watched: the attention of those that attend to the whole context.
        has_states: some layers keep a state.

    Raises:
        TeacherError: a model whose class keeps its parts elsewhere than others do.
    """

    def __init__(self, model: Any, aux_layers: Sequence[int]) -> None:
        self.model, self.aux_layers = model, tuple(aux_layers)
        self.layers = model.base_model.layers
        kinds = layer_kinds(model.config) or ["full_attention"] * len(self.layers)
        self.watched = [
            _part(model, layer, "self_attn", "mixer")
            for layer, kind in zip(self.layers, kinds)
            if is_full(kind, model.config)
        ]
        self.has_states = any(map(has_state, kinds))

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
        attend to. Each row is one context, as a request is: documents in it are read one after the
        other by attention and by states alike.

        Args:
            keep_cache: keep the keys and values, for ``decode``, where it begins with them.
        """
        from transformers import DynamicCache

        keep_cache = keep_cache and not self.has_states
        for attention in self.watched:
            attention.observer = lambda q, k, scale: collector.observe(q, k, at, scale)
        try:
            with self._aux_states() as states:
                # One that keeps everything: of windows, too.
                cache = DynamicCache() if keep_cache else None
                output = self.model.base_model(
                    input_ids=ids, past_key_values=cache, use_cache=keep_cache
                )
        finally:
            for attention in self.watched:
                del attention.observer
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

        States cannot go back to the middle of a text. Where layers keep some, the run begins with
        the first token, densely up to ``first``.

        Args:
            ids: ``[B, T]``.
            cache: of a ``Lesson`` of the same tokens, or of those that ``ids`` are several times;
                it stays as it is. None: the model has states.
            chosen: ``[B, G * nkv, Q, pages]`` bool, the pages that hold tokens up to
                ``first + Q - 1``, of one group of layers after the other.
        """
        count = chosen.shape[2]
        begin, past = (0, None) if cache is None else (first, cache_before(cache, first, len(ids)))
        each = chosen.split(kv_heads(self.model.config, 0)[0], 1)
        for attention, group in zip(self.watched, layer_groups(len(self.watched), len(each))):
            attention.chosen = each[group]
        try:
            with self._aux_states(count) as states:
                self.model.base_model(
                    input_ids=ids[:, begin : first + count],
                    past_key_values=past,
                    use_cache=past is not None,
                )
        finally:
            for attention in self.watched:
                del attention.chosen
        return self._joined(states)

    @contextmanager
    def _aux_states(self, newest: int = 0) -> Iterator[dict[int, Tensor]]:
        """What enters the auxiliary layers in a run: of so many newest tokens, or of all."""
        states: dict[int, Tensor] = {}
        hooks = []
        for place in self.aux_layers:
            module = (
                self.layers[place]
                if place < len(self.layers)
                else _part(self.model, self.model.base_model, "norm", "norm_f", "final_layernorm")
            )

            def keep(_: Any, arguments: tuple, named: dict, place: int = place) -> None:
                state = arguments[0] if arguments else named["hidden_states"]
                states[place] = state[:, -newest:]

            hooks.append(module.register_forward_pre_hook(keep, with_kwargs=True))
        try:
            yield states
        finally:
            for hook in hooks:
                hook.remove()

    def _joined(self, states: dict[int, Tensor]) -> Tensor:
        return torch.cat([states[place] for place in self.aux_layers], -1)


def _part(model: Any, whole: Any, *names: str) -> Any:
    """The part of a module that families call by one of these names."""
    for name in names:
        if (found := getattr(whole, name, None)) is not None:
            return found
    raise TeacherError(
        f"--model: {model.config.model_type} has no {' or '.join(names)} in its "
        f"{type(whole).__name__}, where distill looks for it; give a model of another family."
    )
