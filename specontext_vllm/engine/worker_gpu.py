"""The CUDA worker.

vLLM: the worker to derive from.
"""

from __future__ import annotations

from typing import Any

from vllm.v1.worker.gpu_worker import Worker

from specontext_vllm.engine.worker import SpeContextWorkerMixin

KV = "kv_cache"
"""Tag of the memory that is given up at every level of sleep."""


class SpeContextGPUWorker(SpeContextWorkerMixin, Worker):
    """CUDA worker on the V2 runner."""

    def _make_model_runner(self) -> Any:
        """Makes our model runner, whose memory sleep mode can give back.

        Overrides: vllm.v1.worker.gpu_worker.Worker._make_model_runner
        Uses: vllm.v1.worker.gpu_worker.Worker._maybe_get_memory_pool_context
        Symptom: asleep, an engine holds the memory of the head's caches and of the frames.
        Reason: vLLM offloads or gives up its memory by pools, which the worker alone can make.
        Remove when: a model runner can.
        """
        from specontext_vllm.engine.runner_v2 import SpeContextModelRunnerV2

        runner = SpeContextModelRunnerV2(self.vllm_config, self.device)
        runner.memory_pool = self._maybe_get_memory_pool_context
        return runner

    def sleep(self, level: int = 1) -> None:
        """What lies in none of vLLM's pools goes first.

        Overrides: vllm.v1.worker.gpu_worker.Worker.sleep
        """
        self.model_runner.runtime.give_back_memory()
        super().sleep(level)

    def discard(self, tags: tuple[str, ...]) -> None:
        """Also where vLLM gives up its KV alone.

        Overrides: vllm.v1.worker.gpu_worker.Worker.discard
        """
        if KV in tags:
            self.model_runner.runtime.give_back_memory()
        super().discard(tags)

    def wake_up(self, tags: list[str] | None = None) -> None:
        """What is back without what it held starts anew.

        Overrides: vllm.v1.worker.gpu_worker.Worker.wake_up
        """
        super().wake_up(tags)
        if tags is None or KV in tags:
            self.model_runner.runtime.start_anew()
