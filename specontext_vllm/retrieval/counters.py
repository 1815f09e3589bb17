"""What a worker's decode steps come to, summed since the engine started."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from specontext_vllm.config import PAGE_SIZE
from specontext_vllm.step_data import WHOLE

STEPS, DECODE_ROWS, CHOOSING_ROWS, PAGES_READ, PAGES_HELD = range(5)
"""Known to the host: steps with decode rows; their rows; rows of steps in which pages were chosen;
head pages that the rows read (within their budgets) and held."""

OWN_BUDGET_ROWS, OWN_BUDGET_PAGES, WHOLE_ROWS, WHOLE_PAGES = range(5, 9)
"""Known to the host: decode rows whose requests have a budget of their own, and those whose
requests ask for all; each with the head pages that they read (within their budgets)."""

KEPT_MASS, FALLBACK_ROWS, FALLBACK_PAGES = range(9, 12)
"""Summed on the device: kept mass of the choosing rows, the mean over a row's KV heads; rows under
the confidence threshold, and the head pages that they read beyond the budget."""

KEPT_MASS_EDGES = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.99)
KEPT_MASS_BUCKETS = slice(12, 12 + len(KEPT_MASS_EDGES))
"""Summed on the device: choosing rows whose kept mass is at most the edge, for each edge."""

_HOST = KEPT_MASS
"""Places before this one are the host's."""


class Counters:
    """Sums that never fall. What the host cannot know is summed on the device, so that counting
    never waits for it.

    Attributes:
        host: ``[9]`` float64, the places up to WHOLE_PAGES.
        cells: the rest, float64 on the device.
    """

    def __init__(self, device: torch.device) -> None:
        self.host = np.zeros(_HOST)
        self.cells = torch.zeros(KEPT_MASS_BUCKETS.stop - _HOST, dtype=torch.float64, device=device)
        self._edges = torch.tensor(KEPT_MASS_EDGES, dtype=torch.float32, device=device)
        self._base = np.zeros(KEPT_MASS_BUCKETS.stop)

    def count_step(
        self,
        heads: int,
        read: Sequence[int],
        held: Sequence[int],
        *,
        chooses: bool,
        budgets: Sequence[int | None],
    ) -> None:
        """The decode rows of a step.

        Args:
            heads: KV heads.
            read, held: pages of each row that a head reads and holds.
            chooses: pages are chosen in this step.
            budgets: as in ``StepBatch``.
        """
        choosing_rows = len(read) if chooses else 0
        self.host[: PAGES_HELD + 1] += (
            1,
            len(read),
            choosing_rows,
            heads * sum(read),
            heads * sum(held),
        )
        if budgets:
            whole = [pages for pages, own in zip(read, budgets) if own == WHOLE]
            some = [pages for pages, own in zip(read, budgets) if own not in (None, WHOLE)]
            self.host[OWN_BUDGET_ROWS : WHOLE_PAGES + 1] += (
                len(some),
                heads * sum(some),
                len(whole),
                heads * sum(whole),
            )

    def count_choice(self, kept_mass: Tensor, seq_lens: Tensor) -> None:
        """The kept mass of a step in which pages were chosen.

        Args:
            kept_mass: ``[B, H]`` float32. seq_lens: ``[>= B]`` int32; rows of 0 tokens are padding.
        """
        total, buckets = (
            self.cells[KEPT_MASS - _HOST :][:1],
            self.cells[KEPT_MASS_BUCKETS.start - _HOST :],
        )
        if kept_mass.is_cuda:
            from specontext_vllm.triton_kernels.kept_mass import add_kept_mass

            add_kept_mass(kept_mass, seq_lens, self._edges, total, buckets)
            return
        mean = kept_mass.mean(-1)[seq_lens[: len(kept_mass)] > 0]
        total += mean.sum()
        buckets += (mean[:, None] <= self._edges).sum(0)

    def count_fallback(
        self, kept_mass: Tensor, lengths: Tensor, budgets: Tensor, threshold: float
    ) -> None:
        """Rows that fell back, and the head pages they read beyond their budgets.

        Args:
            kept_mass: ``[B, H]`` float32. lengths: ``[B * H]`` tokens read. budgets: ``[B]`` pages.
            threshold: of the rows' mean kept mass.
        """
        pages = ((lengths + PAGE_SIZE - 1) // PAGE_SIZE).view(len(budgets), -1)
        self.cells[FALLBACK_ROWS - _HOST] += (kept_mass.mean(-1) < threshold).sum()
        self.cells[FALLBACK_PAGES - _HOST] += (pages - budgets[:, None]).clamp(min=0).sum()

    def add(self, counted: np.ndarray) -> None:
        """What another ``Counters`` has counted, all places ``[23]`` float64."""
        self.host += counted[:_HOST]
        self.cells += torch.from_numpy(counted[_HOST:]).to(self.cells.device)

    def clear(self) -> None:
        """Start again from zero."""
        self.host.fill(0)
        self.cells.zero_()
        self._base.fill(0)

    def since_reset(self, reset: bool) -> np.ndarray:
        """All places, counted since the last reset; waits for the device."""
        now = np.concatenate([self.host, self.cells.cpu().numpy()])
        since = now - self._base
        if reset:
            self._base = now
        return since

    def stats(self, reset: bool) -> dict[str, float | int | None]:
        """What a user is told of the steps since the last reset; waits for the device."""
        counted = self.since_reset(reset)
        choosing = counted[CHOOSING_ROWS]
        return {
            "steps": int(counted[STEPS]),
            "decode_rows": int(counted[DECODE_ROWS]),
            "pages_read": int(counted[PAGES_READ] + counted[FALLBACK_PAGES]),
            "pages_total": int(counted[PAGES_HELD]),
            "fallback_rows": int(counted[FALLBACK_ROWS]),
            "kept_mass_mean": float(counted[KEPT_MASS] / choosing) if choosing else 1.0,
        }
