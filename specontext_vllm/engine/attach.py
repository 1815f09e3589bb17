"""Gives a model runner of vLLM's its runtime.

vLLM: what its runners keep of a model and its drafter.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

from specontext_vllm.engine.runtime import Runtime


def attach_runtime(
    runner: Any, memory_pool: Callable[[str], AbstractContextManager[Any]] = nullcontext
) -> None:
    """Make the runtime of a model runner whose models are loaded, and let the target return the
    hidden states that the head reads.

    Args:
        memory_pool: see ``Runtime``.

    Uses: vllm.v1.worker.gpu_model_runner.GPUModelRunner.use_aux_hidden_state_outputs,
        vllm.v1.worker.gpu.model_runner.GPUModelRunner.use_aux_hidden_state_outputs,
        vllm.v1.worker.gpu_model_runner.GPUModelRunner.drafter,
        vllm.v1.worker.gpu.model_runner.GPUModelRunner.speculator
    Symptom: the head learns nothing, since the model returns no auxiliary hidden states.
    Reason: the runner asks for them (use_aux_hidden_state_outputs) for its own drafter only.
    Remove when: a setting of vLLM's asks for auxiliary hidden states.
    """
    config, drafter = runner.vllm_config, None
    if config.speculative_config is not None and config.speculative_config.method == "eagle3":
        holder = runner.speculator if config.use_v2_model_runner else runner.drafter
        drafter = holder.model
    with memory_pool("runtime"):
        runner.runtime = Runtime(config, runner.model, runner.device, drafter, memory_pool)
    runner.use_aux_hidden_state_outputs |= runner.runtime.returns_aux
