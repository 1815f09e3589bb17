"""Processes of a test that are forked from one that has imported what they need."""

from __future__ import annotations

import multiprocessing
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing import forkserver
from multiprocessing.context import ForkServerContext

TRAINING = (
    "accelerate",
    "specontext_vllm.distillation.command",
    "torch._dynamo",
    "transformers.models.auto.modeling_auto",
    "transformers.models.auto.tokenization_auto",
    "transformers.models.llama.modeling_llama",
    "transformers.models.llama.tokenization_llama",
)
"""What a training run on the demo model imports."""


@contextmanager
def fork_server(*modules: str) -> Iterator[ForkServerContext]:
    """A context of ``multiprocessing``; its first process starts the one that imports."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(list(modules))
    try:
        yield context
    finally:
        # Else it would live as long as this process, and be taken for a leftover.
        forkserver._forkserver._stop()
