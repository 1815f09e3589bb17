"""Which vLLM the plugin drives: stated here once; tests hold pyproject.toml, the locks and the
README to it.

vLLM: its version.
"""

from __future__ import annotations

SUPPORTED_VLLM = ">=0.32.0,<0.34"
"""Tests have driven 0.32.0 and 0.33.0 (docs/developer/versions.md: which, and where); their patch
releases are let in. The plugin wraps classes in memory (engine/compat.py, engine/core_hooks.py),
and their next shape is not known in advance.
"""


def complaint(version: str) -> str | None:
    """One sentence about a vLLM that is not supported; None about one that is."""
    from packaging.specifiers import SpecifierSet

    if SpecifierSet(SUPPORTED_VLLM).contains(version, prereleases=True):
        return None
    return (
        f"vLLM: found {version}, but this release of specontext drives vllm{SUPPORTED_VLLM}; "
        "install such a vLLM, or a release of specontext "
        f"made for yours."
    )


def unsupported_vllm() -> str | None:
    """One sentence if the installed vLLM is not supported."""
    import vllm

    return complaint(vllm.__version__)
