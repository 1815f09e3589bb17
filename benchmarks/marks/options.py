"""Lists of names and numbers as options."""

from __future__ import annotations

from collections.abc import Iterable


class OptionError(ValueError):
    """An option that cannot be used; the message is one sentence."""


def names(option: str, text: str, allowed: Iterable[str]) -> list[str]:
    """The names in ``text``, separated by commas; `none` and nothing are none.

    Raises:
        OptionError: one that is not ``allowed``.
    """
    known = list(allowed)
    found = [part.strip() for part in text.split(",") if part.strip()]
    if found == ["none"]:
        return []
    if wrong := [part for part in found if part not in known]:
        raise OptionError(f"{option}: found {wrong[0]!r}; use {', '.join(known)}.")
    return found


def numbers(option: str, text: str) -> list[int]:
    """The whole numbers in ``text``, separated by commas.

    Raises:
        OptionError: none, or one that is none.
    """
    parts = [part.strip() for part in text.split(",")]
    if wrong := [part for part in parts if not part.isdigit()]:
        raise OptionError(f"{option}: found {wrong[0]!r}; give whole numbers, separated by commas.")
    return [int(part) for part in parts]
