"""Whether an engine was asked to run on our backend, and with which of its layers. Light: every
engine of this process asks.

vLLM: its log.
"""

from __future__ import annotations

from typing import Any

from specontext_vllm.engine.names import BACKEND_NAME, OUR_KIND


def is_selected(vllm_config: Any) -> bool:
    """Whether this engine runs on the specontext backend."""
    chosen = vllm_config.attention_config
    return any(
        backend is not None and backend.name == BACKEND_NAME
        for backend in (chosen.backend, chosen.backend_per_kind.get(OUR_KIND))
    )


def is_named(vllm_config: Any) -> bool:
    """Whether this engine, or some of its layers, were asked to run on the specontext backend."""
    return is_selected(vllm_config) or BACKEND_NAME in (
        backend.name for backend in vllm_config.attention_config.backend_per_kind.values()
    )


def is_drafters(vllm_config: Any) -> bool:
    """Whether this is the configuration of a drafter, which vLLM derives from that of its engine,
    and whose model and layers are not for us to judge.
    """
    model = vllm_config.model_config
    return model is not None and model.runner_type == "draft"


def is_lossless(vllm_config: Any) -> bool:
    """Whether this engine runs on the specontext backend in lossless mode, as far as can be told
    before its settings were validated.
    """
    if not is_selected(vllm_config) or vllm_config.model_config is None:
        return False
    from specontext_vllm.config import CONFIG_KEY

    settings = (vllm_config.additional_config or {}).get(CONFIG_KEY)
    return isinstance(settings, dict) and settings.get("mode") == "lossless"


def refuse_other_kinds(vllm_config: Any) -> None:
    """Raise a ConfigError where layers of another kind than full attention were given to our
    backend, or those to another one beside it.
    """
    from specontext_vllm.config import ConfigError

    chosen = vllm_config.attention_config
    kinds = {kind: backend.name for kind, backend in chosen.backend_per_kind.items()}
    ours_elsewhere = any(name == BACKEND_NAME for kind, name in kinds.items() if kind != OUR_KIND)
    is_global = chosen.backend is not None and chosen.backend.name == BACKEND_NAME
    if ours_elsewhere or (is_global and kinds.get(OUR_KIND, BACKEND_NAME) != BACKEND_NAME):
        raise ConfigError(
            f"--attention-config.backend_per_kind: found {kinds}, but specontext serves the layers "
            f"of {OUR_KIND}, all of them, and no others; use --attention-backend specontext, and "
            "name backends of vLLM's for other kinds only."
        )


def take_full_attention(vllm_config: Any) -> None:
    """Where our backend was asked for, make it that of the layers that attend to the whole context;
    vLLM chooses, or the user chose, for layers of other kinds. Idempotent.

    Uses: vllm.config.attention.AttentionConfig.backend,
        vllm.config.attention.AttentionConfig.backend_per_kind
    Symptom: layers with a sliding window are given to our backend, which knows none.
    Reason: ``--attention-backend`` is for layers of every kind, and users cannot name our backend
        for one kind: ``LLM(attention_config=...)`` is parsed before plugins are loaded.
    Remove when: a backend can say which kinds of layers it takes.
    """
    chosen = vllm_config.attention_config
    if chosen.backend is None or chosen.backend.name != BACKEND_NAME:
        return
    chosen.backend_per_kind = {**chosen.backend_per_kind, OUR_KIND: chosen.backend}
    chosen.backend = None


def warn_of_unread_settings(vllm_config: Any) -> None:
    """Say so, once, where an engine has this plugin's settings and another backend."""
    from specontext_vllm.config import CONFIG_KEY

    if CONFIG_KEY in (vllm_config.additional_config or {}):
        from vllm.logger import init_logger

        init_logger("vllm.specontext").warning_once(
            f"additional_config.{CONFIG_KEY}: found settings, which nothing reads without "
            "--attention-backend specontext; add it, or leave them out."
        )
