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

from specontext_vllm.distillation.losses import AttentionCollector
from specontext_vllm.distillation.watched_attention import ATTENTION, register_attention
from specontext_vllm.model_config import is_full, kv_heads, layer_kinds, num_full_layers
from specontext_vllm.retrieval.checkpoint import layer_groups


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
        TeacherError: none there, one that cannot be read, or not a model whose layers attend to the
            whole context or to a window.
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
    """Refuse models whose layers of full attention cannot be watched, or not all in the same way.

    Raises:
        TeacherError: this is one.
    """
    kinds = {str(kind) for kind in layer_kinds(config)} - {"full_attention", "sliding_attention"}
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
            num_full_layers(config) == 0,
            f"has only layers that look back {getattr(config, 'sliding_window', None)} tokens",
            "a model with layers of full attention",
        ),
        (
            # States cannot go back to the middle of a text, which the second run begins in.
            kinds,
            f"has layers of the kinds {', '.join(sorted(kinds))}",
            "a model with full attention and sliding windows alone",
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
        watched: those that attend to the whole context.
    """

    def __init__(self, model: Any, aux_layers: Sequence[int]) -> None:
        self.model, self.aux_layers = model, tuple(aux_layers)
        self.layers = model.base_model.layers
        kinds = layer_kinds(model.config) or ["full_attention"] * len(self.layers)
        self.watched = [
            layer for layer, kind in zip(self.layers, kinds) if is_full(kind, model.config)
        ]

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
        from transformers import DynamicCache

        for layer in self.watched:
            layer.self_attn.observer = lambda q, k, scale: collector.observe(q, k, at, scale)
        try:
            with self._aux_states() as states:
                # One that keeps everything: of windows, too.
                cache = DynamicCache() if keep_cache else None
                output = self.model.base_model(
                    input_ids=ids, past_key_values=cache, use_cache=keep_cache
                )
        finally:
            for layer in self.watched:
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

        past = DynamicCache()
        for number, layer in enumerate(cache.layers):
            past.update(past_of(layer.keys), past_of(layer.values), number)
        each = chosen.split(cache.layers[0].keys.shape[1], 1)
        for layer, group in zip(self.watched, layer_groups(len(self.watched), len(each))):
            layer.self_attn.chosen = each[group]
        try:
            with self._aux_states() as states:
                self.model.base_model(
                    input_ids=ids[:, first : first + chosen.shape[2]],
                    past_key_values=past,
                    use_cache=True,
                )
        finally:
            for layer in self.watched:
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
