"""Packages that serving does not need: each comes with an extra of this one."""

from __future__ import annotations

from importlib.util import find_spec

from specontext_vllm.config import ConfigError


def require_extra(package: str, extra: str, use: str) -> None:
    """Refuse to go on without a package that only some commands need.

    Args:
        package: name to import.
        extra: the extra that installs it (pyproject.toml).
        use: what needs it, as the sentence's subject.

    Raises:
        ConfigError: it is not installed.
    """
    if find_spec(package) is None:
        raise ConfigError(
            f"{use} needs {package}, which is not installed; pip install "
            f"'specontext-vllm[{extra}]'."
        )
