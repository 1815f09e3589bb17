"""Registers the SPECONTEXT attention backend with vLLM and hooks its platform class; no other
backend is touched.
"""

from __future__ import annotations

import copyreg
from typing import Any

from specontext_vllm.versions import complaint

BACKEND_NAME = "SPECONTEXT"
BACKEND_PATH = "specontext_vllm.engine.backend.SpeContextBackend"

_done = False


def register() -> None:
    """Make ``--attention-backend specontext`` known to this process. Idempotent.

    Under a vLLM that is not supported the backend is refused when it is asked for; where not even
    the hooks are found, a warning says so and vLLM's other backends go on.
    """
    try:
        _register()
    except (ImportError, AttributeError):
        if (sentence := unsupported_vllm()) is None:
            raise
        from vllm.logger import init_logger

        init_logger("vllm.specontext").warning(sentence)


def unsupported_vllm() -> str | None:
    """One sentence if the installed vLLM is not supported."""
    import vllm

    return complaint(vllm.__version__)


def _register() -> None:
    global _done
    ensure_member()
    if _done:
        return
    _done = True
    from specontext_vllm.engine import compat

    compat.hide_our_kernels_folder()
    compat.choose_worker()
    compat.let_cpu_platform_choose_backend()


def ensure_member() -> Any:
    """The SPECONTEXT member of vLLM's ``AttentionBackendEnum``, added and made picklable on the
    first call.
    """
    from vllm.v1.attention.backends.registry import AttentionBackendEnum

    if BACKEND_NAME not in AttentionBackendEnum.__members__:
        from vllm.logger import suppress_logging

        # vLLM logs each new member, which would stand in every server's log, whatever its backend.
        with suppress_logging():
            AttentionBackendEnum.register(BACKEND_NAME, BACKEND_PATH)
        # Spawned children unpickle vLLM's config before plugins load; by name, a member they lack
        # would not be found.
        copyreg.pickle(AttentionBackendEnum, _reduce_member)
    return AttentionBackendEnum[BACKEND_NAME]


def is_selected(vllm_config: Any) -> bool:
    """Whether this engine runs on the specontext backend."""
    backend = vllm_config.attention_config.backend
    return backend is not None and backend.name == BACKEND_NAME


def is_named(vllm_config: Any) -> bool:
    """Whether this engine runs on the specontext backend, or was asked to for some of its layers."""
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
            "layers of a model; leave it out and use "
            f"--attention-backend specontext."
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


def _reduce_member(member: Any) -> tuple[Any, tuple[Any, ...]]:
    if member.name != BACKEND_NAME:
        # As enums do it themselves: what has no part of this plugin must unpickle where it is not
        # installed.
        return getattr, (type(member), member.name)
    return _restore_member, (member.name,)


def _restore_member(name: str) -> Any:
    from vllm.v1.attention.backends.registry import AttentionBackendEnum

    ensure_member()
    return AttentionBackendEnum[name]
