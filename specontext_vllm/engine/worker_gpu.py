"""The CUDA worker."""

from __future__ import annotations

from typing import Any

from vllm.v1.worker.gpu_worker import Worker

from specontext_vllm.config import ConfigError
from specontext_vllm.engine.worker import SpeContextWorkerMixin


class SpeContextGPUWorker(SpeContextWorkerMixin, Worker):
    """CUDA worker on the V2 runner."""

    def _make_model_runner(self) -> Any:
        if not self.use_v2_model_runner:
            raise ConfigError(
                "VLLM_USE_V2_MODEL_RUNNER: vLLM chose its V1 model runner, which --attention-backend specontext does not "
                "drive on a GPU; unset it, or drop the option that forces V1 (vLLM's log names it)."
            )
        from specontext_vllm.engine.runner_v2 import SpeContextModelRunnerV2

        return SpeContextModelRunnerV2(self.vllm_config, self.device)
