"""The CPU worker; a module of its own because importing vLLM's CPU worker replaces ``torch.Event``
for the whole process.

vLLM: the worker to derive from.
"""

from __future__ import annotations

import vllm.v1.worker.cpu_worker as cpu_worker

from specontext_vllm.engine.worker import SpeContextWorkerMixin


class SpeContextCPUWorker(SpeContextWorkerMixin, cpu_worker.CPUWorker):
    """CPU worker on the V1 runner."""

    def init_device(self) -> None:
        """Makes our model runner.

        Overrides: vllm.v1.worker.cpu_worker.CPUWorker.init_device
        Uses: vllm.v1.worker.cpu_worker.CPUModelRunner
        Symptom: the CPU worker runs vLLM's own model runner, and nothing is selected.
        Reason: it names the runner's class in the middle of its ``init_device``.
        Remove when: it makes its runner in a method, as the GPU's worker does.
        """
        from specontext_vllm.engine.compat import expand_sampling_settings_on_a_cpu
        from specontext_vllm.engine.runner_v1 import SpeContextCPUModelRunner

        expand_sampling_settings_on_a_cpu()
        original = cpu_worker.CPUModelRunner
        cpu_worker.CPUModelRunner = SpeContextCPUModelRunner
        try:
            super().init_device()
        finally:
            cpu_worker.CPUModelRunner = original
