"""How many pages each row of a step may read: the settings' budget, or one of the row's own."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from specontext_vllm.config import PAGE_SIZE, SpeContextConfig


class RowBudgets:
    """The rows' budgets on the device. Its tensors persist, since captured graphs read them: their
    values change between steps, their shapes do not.

    Args:
        config: validated settings.
        max_rows: the largest number of decode rows of a step, padding included.
        max_pages, table_pages: pages of the longest context, and those that a selection may have.
        device: where rows are selected for.

    Attributes:
        totals: ``[max_rows]`` int32, pages that each row reads at the most.
        fallbacks: ``[max_rows]`` int32, pages that it reads where its kept mass is too small.
        everything: ``[max_rows]`` int32, pages of the longest context.
    """

    def __init__(
        self,
        config: SpeContextConfig,
        *,
        max_rows: int,
        max_pages: int,
        table_pages: int,
        device: torch.device,
    ) -> None:
        def cells() -> Tensor:
            return torch.zeros(max_rows, dtype=torch.int32, device=device)

        self.totals, self.fallbacks, self.everything = cells(), cells(), cells()
        self.take_settings(config, max_pages, table_pages)

    def take_settings(self, config: SpeContextConfig, max_pages: int, table_pages: int) -> None:
        """Go by other settings from the next step on."""
        self._config, self._most = config, min(max_pages, table_pages)
        self._default = self._pages_of(config.budget)
        self._placed = [self._default] * len(self.totals)
        for pages, value in (
            (self.totals, self._default[0]),
            (self.fallbacks, self._default[1]),
            (self.everything, max_pages),
        ):
            pages.fill_(value)

    def place(self, budgets: Sequence[int | None], rows: int) -> list[int]:
        """Put the budgets of a step's rows in place; returned are the rows' pages. Nothing waits
        for the device, and nothing is copied while they stay as they are.

        Args:
            budgets: tokens of each of ``rows`` rows, None for the settings'; empty: for all.
        """
        wanted = [self._default if own is None else self._pages_of(own) for own in budgets]
        wanted = wanted or [self._default] * rows
        if wanted != self._placed[:rows]:
            self._placed[:rows] = wanted
            # Pinned, so that the copy does not hold up the host; torch keeps it until it is over.
            pinned = self.totals.device.type == "cuda"
            columns = zip(*wanted, strict=True)
            for target, pages in zip((self.totals, self.fallbacks), columns, strict=True):
                values = torch.tensor(pages, dtype=torch.int32, pin_memory=pinned)
                target[:rows].copy_(values, non_blocking=True)
        return [total for total, _ in wanted]

    def _pages_of(self, budget: int) -> tuple[int, int]:
        """Pages of a budget of so many tokens, and of its fallback."""
        if self._config.rule.reads_everything:
            return self._most, self._most
        # A request's own was enough for the settings of the start. With fewer pages than are always
        # read the newest would not be among them.
        budget = max(budget, self._config.min_budget)
        return (
            min(budget // PAGE_SIZE, self._most),
            min(self._config.fallback_pages_of(budget), self._most),
        )
