"""Functions of ours that take the place of vLLM's are marked, so that none is wrapped twice."""

from __future__ import annotations

from typing import Any


def mark_as_ours(function: Any) -> None:
    function._specontext = True


def is_ours(function: Any) -> bool:
    return getattr(function, "_specontext", False)
