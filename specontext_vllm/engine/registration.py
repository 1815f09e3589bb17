"""Registers the SPECONTEXT attention backend with vLLM and hooks its platform class; no other
backend is touched.

vLLM: the registry of attention backends, and its log.
"""

from __future__ import annotations

import copyreg
import sys
from typing import Any

from specontext_vllm.engine import compat, core_hooks
from specontext_vllm.engine.names import BACKEND_NAME, BACKEND_PATH
from specontext_vllm.versions import unsupported_vllm

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


def _register() -> None:
    global _done
    ensure_member()
    if _done:
        return
    _done = True
    compat.hide_our_kernels_folder()
    compat.choose_worker()
    compat.draft_with_target_in_lossless_mode()
    compat.let_cpu_platform_choose_backend()
    # An engine core of its own process loads plugins when its module is there, and does not check
    # its configuration again.
    if hasattr(sys.modules.get("vllm.v1.engine.core"), "EngineCore"):
        core_hooks.hook_engine_core()


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
