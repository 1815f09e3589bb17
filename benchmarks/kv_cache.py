"""Options of benchmarks on the KV cache, and how a result says what its dtype was."""

from __future__ import annotations

from typing import Annotated, Literal

import typer

KVCacheDtype = Annotated[
    Literal["auto", "fp8"],
    typer.Option(help="vLLM's, of all engines of vLLM; fp8 joins the result's name."),
]
KVGib = Annotated[
    float | None,
    typer.Option(
        min=0,
        help="GPU memory for KV, so that several runs can share a GPU. "
        "Default: what vLLM finds free.",
    ),
]


def kv_suffix(kv_cache_dtype: str) -> str:
    """What is added to the name of a result."""
    return "" if kv_cache_dtype == "auto" else f"-{kv_cache_dtype}_kv"


def kv_title(kv_cache_dtype: str) -> str:
    """What is added to its title."""
    return "" if kv_cache_dtype == "auto" else f", KV cache in {kv_cache_dtype}"


def kv_bytes(kv_cache_dtype: str) -> int:
    """Of one element of the KV cache."""
    return 2 if kv_cache_dtype == "auto" else 1
