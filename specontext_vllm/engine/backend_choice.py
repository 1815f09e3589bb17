"""Whether an engine was asked to run on our backend. Light: every engine of this process asks.

vLLM: its log.
"""

from __future__ import annotations

from typing import Any

from specontext_vllm.engine.names import BACKEND_NAME


def is_selected(vllm_config: Any) -> bool:
    """Whether this engine runs on the specontext backend."""
    backend = vllm_config.attention_config.backend
    return backend is not None and backend.name == BACKEND_NAME


def is_named(vllm_config: Any) -> bool:
    """Whether this engine, or some of its layers, were asked to run on the specontext backend."""
    return is_selected(vllm_config) or BACKEND_NAME in (
        backend.name for backend in vllm_config.attention_config.backend_per_kind.values()
    )


def refuse_backend_per_kind(vllm_config: Any) -> None:
    """Raise a ConfigError where some layers would be ours and others not, or ours without the
    worker that selects for them.

    ``worker_cls`` and the selection follow ``attention_config.backend`` alone.
    """
    from specontext_vllm.config import ConfigError

    kinds = {
        kind: backend.name
        for kind, backend in vllm_config.attention_config.backend_per_kind.items()
    }
    if kinds and is_named(vllm_config):
        raise ConfigError(
            f"--attention-config.backend_per_kind: found {kinds}, but one selection is for all "
            "layers of a model; leave it out and use --attention-backend specontext."
        )


def warn_of_unread_settings(vllm_config: Any) -> None:
    """Say so, once, where an engine has this plugin's settings and another backend."""
    from specontext_vllm.config import CONFIG_KEY

    if CONFIG_KEY in (vllm_config.additional_config or {}):
        from vllm.logger import init_logger

        init_logger("vllm.specontext").warning_once(
            f"additional_config.{CONFIG_KEY}: found settings, which nothing reads without "
            "--attention-backend specontext; add it, or leave them out."
        )
