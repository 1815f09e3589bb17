"""Workers that run the adapters, leave room for the head's caches and answer ``collective_rpc``."""

from __future__ import annotations

from typing import Any

import vllm.v1.worker.cpu_worker as cpu_worker
from vllm.logger import init_logger
from vllm.v1.worker.gpu_worker import Worker

from specontext_vllm.config import ConfigError

logger = init_logger("vllm.specontext")


class SpeContextWorkerMixin:
    """What both workers add to vLLM's."""

    def determine_available_memory(self) -> int:
        """Bytes for KV: vLLM's figure less the share of the head's caches."""
        available = super().determine_available_memory()
        runtime = self.model_runner.runtime
        per_block = sum(spec.page_size_bytes for spec in self.get_kv_cache_spec().values())
        share = runtime.kv_share(per_block)
        logger.info("SpeContext: the head's caches take %.1f %% of the KV memory.", 100 * (1 - share))
        return int(available * share)

    def specontext_stats(self, reset: bool = False) -> dict[str, Any]:
        """Figures of this worker's decode steps since the last reset; see ``Retriever.stats``."""
        return self.model_runner.runtime.retriever.stats(reset)

    def specontext_set(self, retriever: str | None = None, budget: int | None = None) -> dict[str, Any]:
        """Change retriever or budget between steps; the settings in force are returned."""
        return self.model_runner.runtime.set(retriever, budget)


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


class SpeContextCPUWorker(SpeContextWorkerMixin, cpu_worker.CPUWorker):
    """CPU worker on the V1 runner."""

    def init_device(self) -> None:
        """Symptom: ``CPUWorker.init_device`` names its runner class and offers no hook. Remove when it calls one."""
        from specontext_vllm.engine.runner_v1 import SpeContextCPUModelRunner

        original = cpu_worker.CPUModelRunner
        cpu_worker.CPUModelRunner = SpeContextCPUModelRunner
        try:
            super().init_device()
        finally:
            cpu_worker.CPUModelRunner = original
