"""How long a decode step takes, by the bytes it reads and the bytes it fetches."""

from __future__ import annotations

from dataclasses import dataclass

from specontext_vllm.config import pages_for
from specontext_vllm.residency.memory_model import KVShape


@dataclass(frozen=True)
class StepTime:
    """The time law: a step takes as long as the longer of its compute and its transfers.

    Attributes:
        weight_bytes: weights, read once a step, the head's included.
        gpu_bytes_per_s: memory bandwidth of the GPU.
        link_bytes_per_s: bandwidth of the PCIe link at rows of 8 KiB.
        overhead_s: time of a step beyond the bytes it reads; 1.5 to 2.0 ms measured
            (`python -m benchmarks decode`).
    """

    weight_bytes: int
    gpu_bytes_per_s: float = 4.3e12
    link_bytes_per_s: float = 50e9
    overhead_s: float = 1.7e-3

    def step(
        self,
        shape: KVShape,
        *,
        requests: int,
        length: int,
        budget_pages: int,
        offloaded: int,
        miss_rate: float,
    ) -> tuple[float, float, int]:
        """Seconds of compute, seconds of transfer, and bytes over PCIe of one decode step.

        Args:
            length: context, in tokens. miss_rate: share of the budget's pages that must be fetched.
        """
        pages = pages_for(length)
        read = self.weight_bytes + requests * (
            shape.num_layers * min(pages, budget_pages) * shape.page_bytes
            + (pages > budget_pages) * pages * shape.retriever_page_bytes
        )
        moved = int(offloaded * requests * min(pages, budget_pages) * miss_rate * shape.page_bytes)
        return self.overhead_s + read / self.gpu_bytes_per_s, moved / self.link_bytes_per_s, moved

    def dense_step(self, shape: KVShape, *, requests: int, length: int) -> float:
        """Seconds of a decode step that reads every page of every layer from GPU memory."""
        read = (
            self.weight_bytes + requests * shape.num_layers * pages_for(length) * shape.page_bytes
        )
        return self.overhead_s + read / self.gpu_bytes_per_s
