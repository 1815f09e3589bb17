"""What a setting that cannot be used is refused with."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from typing import Any

CONFIG_KEY = "specontext"
"""The settings' place in vLLM's ``additional_config``."""


class ConfigError(ValueError):
    """A setting that cannot be used; its message is one sentence naming the setting, what was found
    and what to do.
    """


def sentence_of(error: Any, known: Sequence[str]) -> str:
    """One sentence for a complaint of pydantic's.

    Args:
        error: of ``ValidationError.errors()``.
        known: names of all settings.
    """
    where = f"additional_config.{CONFIG_KEY}"
    # The settings are flat; what follows names a member of a union.
    key = str(error["loc"][0]) if error["loc"] else ""
    if error["type"] == "extra_forbidden":
        close = difflib.get_close_matches(key, known, n=1)
        hint = f"did you mean {close[0]!r}?" if close else f"the keys are {', '.join(known)}."
        return f"{where}: unknown key {key!r}; {hint}"
    if error["type"] == "value_error":
        return f"{where}.{error['ctx']['error']}"
    return f"{where}.{key}: found {error['input']!r}; {error['msg'][0].lower()}{error['msg'][1:]}."
