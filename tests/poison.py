"""Two tiers whose given-up and handed-out places are NaN, so that a test that reads one of them
cannot pass.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch

from specontext_vllm.float8 import FP8, as_bytes
from specontext_vllm.residency.frames import Changes
from specontext_vllm.residency.tiers import TieredKV
from specontext_vllm.step_data import ScheduledStep


class PoisonedTieredKV(TieredKV):
    """Frames that are given up, and pages of the host pool that are handed out, are filled with
    NaN.

    Attributes:
        poisoned: frames and pages so far.
    """

    poisoned = 0

    def follow(self, step: ScheduledStep) -> None:
        fresh = [page for request in step.started for page in request.pages[request.computed :]] + [
            page for _, pages in step.grown for page in pages
        ]
        if self.device.type == "cuda":
            # The host writes at once; what the steps before this one read must be through.
            torch.cuda.synchronize(self.device)
        for layer in self.pools.host:
            fill_with_nan(layer, fresh)
        self.poisoned += len(fresh)
        super().follow(step)

    def apply(self, changes: Changes) -> None:
        # The copies of the step before may still write to them.
        self.copies.join()
        for frames in changes.given_up:
            fill_with_nan(self.arena, torch.from_numpy(frames).long().to(self.device))
            self.poisoned += len(frames)
        super().apply(changes)


def fill_with_nan(pages: torch.Tensor, which: list[int] | torch.Tensor) -> None:
    """Of 8-bit floats one byte is NaN."""
    if pages.dtype == FP8:
        as_bytes(pages)[which] = 0x7F
    else:
        pages[which] = float("nan")


@contextmanager
def poisoned_tiers() -> Iterator[None]:
    """Engines that are started meanwhile, in this process, have such tiers."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("specontext_vllm.engine.parts.TieredKV", PoisonedTieredKV)
        yield


def times_poisoned(worker: Any) -> int:
    """Frames and pages that a worker has filled with NaN; 0 where it has one tier."""
    return getattr(worker.model_runner.runtime.tiers, "poisoned", 0)
