"""The CUDA worker.

vLLM: the worker to derive from.
"""

from __future__ import annotations

from typing import Any

from vllm.v1.worker.gpu_worker import Worker

from specontext_vllm.engine.worker import SpeContextWorkerMixin


class SpeContextGPUWorker(SpeContextWorkerMixin, Worker):
    """CUDA worker on the V2 runner."""

    def _make_model_runner(self) -> Any:
        """Makes our model runner.

        Overrides: vllm.v1.worker.gpu_worker.Worker._make_model_runner
        """
        from specontext_vllm.engine.runner_v2 import SpeContextModelRunnerV2

        return SpeContextModelRunnerV2(self.vllm_config, self.device)
