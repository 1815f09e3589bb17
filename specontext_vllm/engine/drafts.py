"""Speculative decoding under our backend: which drafts it verifies, one sentence for the others.

vLLM: its speculative configuration, as it is handed in.
"""

from __future__ import annotations

from typing import Any

from specontext_vllm.config import CONFIG_KEY, ConfigError, SpeContextConfig

DRAFTERS = ("eagle3", "ngram", "draft_model")
"""Methods of --speculative-config that are served."""


def num_drafts(vllm_config: Any) -> int:
    """Drafts that a decode row may verify, at the most."""
    speculative = vllm_config.speculative_config
    return 0 if speculative is None else speculative.num_speculative_tokens


def refuse_drafts(vllm_config: Any, config: SpeContextConfig) -> None:
    """Raise a ConfigError for drafts that the backend cannot verify, and for settings that do not
    go with drafts.
    """
    speculative, model = vllm_config.speculative_config, vllm_config.model_config
    where = "--speculative-config"
    if speculative.method not in DRAFTERS:
        raise ConfigError(
            f"{where}: found method {speculative.method!r}, which --attention-backend specontext "
            f"does not support: use {', '.join(DRAFTERS[:-1])} or {DRAFTERS[-1]}."
        )
    for name in (
        "parallel_drafting",
        "enable_adaptive_verification",
        "num_speculative_tokens_per_batch_size",
    ):
        if value := getattr(speculative, name):
            raise ConfigError(
                f"{where}: found {name} {value}, with which rows have other numbers of drafts than "
                "--attention-backend specontext counts on; leave it out."
            )
    setting, found = f"additional_config.{CONFIG_KEY}", f"{where} {speculative.method}"
    if model.is_hybrid:
        # Rejected drafts cannot be taken back from it everywhere: on a CPU vLLM itself answers
        # otherwise with drafts.
        raise ConfigError(
            f"{found} with {model.model}, some of whose layers keep a state instead of KV, which "
            "--attention-backend specontext does not support: leave the drafts out."
        )
    if model.is_multimodal_model:
        raise ConfigError(
            f"{found} with {model.model}, which takes images or audio, which --attention-backend "
            "specontext does not support: leave the drafts out."
        )
    if config.rule.per_layer:
        raise ConfigError(
            f"{setting}.retriever: found {config.retriever!r} with {found}, but what selects in "
            "each layer has one query token a row; use dlm, or leave the drafts out."
        )
    if config.sidecar == "ray":
        raise ConfigError(
            f"{setting}.sidecar: found 'ray' with {found}, but the actor is not told which drafts "
            "were kept; use sidecar inline."
        )
    if config.attention_provider == "xformers":
        raise ConfigError(
            f"{setting}.attention_provider: found 'xformers' with {found}, but it has one query "
            "token a row; use auto."
        )


def refuse_other_aux_layers(vllm_config: Any, model: Any, aux_layers: list[int]) -> None:
    """Raise a ConfigError where the drafter reads hidden states of other layers than the head: the
    model hands out one set of them.
    """
    speculative = vllm_config.speculative_config
    if speculative is None or speculative.method != "eagle3":
        return
    drafter = speculative.draft_model_config.hf_config
    found = list(
        getattr(drafter, "eagle_aux_hidden_state_layer_ids", None)
        or (getattr(drafter, "eagle_config", None) or {}).get("eagle_aux_hidden_state_layer_ids")
        or model.get_eagle3_default_aux_hidden_state_layers()
    )
    if found != list(aux_layers):
        raise ConfigError(
            f"--speculative-config: the drafter {speculative.model} reads the hidden states of "
            f"layers {found}, but the retrieval head those of {list(aux_layers)}, and the model "
            "hands out one set of them; draft with the head's own checkpoint, or use one with the "
            "same layers."
        )
