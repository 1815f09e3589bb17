"""The CPU worker; a module of its own because importing vLLM's CPU worker replaces ``torch.Event``
for the whole process.
"""

from __future__ import annotations

import vllm.v1.worker.cpu_worker as cpu_worker

from specontext_vllm.engine.worker import SpeContextWorkerMixin


class SpeContextCPUWorker(SpeContextWorkerMixin, cpu_worker.CPUWorker):
    """CPU worker on the V1 runner."""

    def init_device(self) -> None:
        """Symptom: ``CPUWorker.init_device`` names its runner class and offers no hook. Remove when
        it calls one.
        """
        from specontext_vllm.engine.runner_v1 import SpeContextCPUModelRunner

        original = cpu_worker.CPUModelRunner
        cpu_worker.CPUModelRunner = SpeContextCPUModelRunner
        try:
            super().init_device()
        finally:
            cpu_worker.CPUModelRunner = original
