"""Attention on a CPU."""

from __future__ import annotations

from specontext_vllm.attention.reference import TorchProvider


class CpuProvider(TorchProvider):
    """What CPU engines run: the definition in torch, where nothing faster takes its place."""
