"""Hot buffers that follow a row of scores, as the engine's do, for many texts at once."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from benchmarks.real.settings import OptionError
from specontext_vllm.config import PAGE_SIZE, SpeContextConfig
from specontext_vllm.residency.hot_buffers import HotBuffers
from specontext_vllm.retrieval.reference import Budget, chosen_pages
from specontext_vllm.step_data import Selection
from specontext_vllm.tier_data import DecodeRows
from specontext_vllm.triton_kernels.counters import COUNTERS

DECILES = 10
"""Parts of a context that places are counted in."""


@dataclass(frozen=True)
class Policy:
    """What is selected and what is kept of it.

    Attributes:
        budget: tokens per KV head.
        stickiness: the engine's setting.
        slots: size of the hot buffers, as a multiple of the budget.
    """

    budget: int
    stickiness: float
    slots: float

    @property
    def name(self) -> str:
        return f"{self.budget}, stickiness {self.stickiness:g}, {self.slots:g}x slots"

    @property
    def hot_pages(self) -> int:
        """Slots per KV head."""
        return int(self.slots * self.pages.total)

    @property
    def pages(self) -> Budget:
        """In pages."""
        return Budget.of(self._settings())

    def check(self) -> None:
        """Raises:
        ConfigError: no room for a page to choose.
        OptionError: buffers that do not hold a selection.
        """
        self._settings()
        if self.slots < 1:
            raise OptionError(
                f"--slots: found {self.slots:g}, and a buffer holds one budget at least."
            )

    def _settings(self) -> SpeContextConfig:
        return SpeContextConfig.from_settings(
            {"budget": self.budget, "stickiness": self.stickiness}
        )


@dataclass(frozen=True)
class StepCounts:
    """Of one step, sums over texts and KV heads.

    Attributes:
        selected, missed: ``[DECILES]`` head pages by their place in the context; the page that the
            step begins is never missed, since it holds nothing yet.
        kept: ``[]`` of the selected, those of the step before.
        free, free_kept: ``[]`` the same of those that are neither sinks nor recents.
    """

    selected: Tensor
    missed: Tensor
    kept: Tensor
    free: Tensor
    free_kept: Tensor


class Follower:
    """One policy, step by step.

    Args:
        texts, heads, max_pages: B, H and the pages of the longest context.
    """

    def __init__(
        self, policy: Policy, texts: int, heads: int, max_pages: int, device: torch.device
    ) -> None:
        self.policy, self.budget = policy, policy.pages
        self.margin = math.log1p(policy.stickiness)
        table_pages = min(self.budget.total, max_pages)

        def whole(*shape: int) -> Tensor:
            return torch.zeros(shape, dtype=torch.int32, device=device)

        self.hot = HotBuffers(
            texts,
            heads,
            policy.hot_pages,
            max_pages,
            max_rows=texts,
            table_pages=table_pages,
            num_layers=1,
            resident=whole(1),
            counts=torch.zeros(COUNTERS, dtype=torch.int64, device=device),
            device=device,
        )
        self.hot.state.capacity.fill_(policy.hot_pages)
        self._selection = Selection(
            whole(texts * heads, table_pages),
            whole(texts * heads),
            torch.ones(texts, heads, device=device),
        )
        self._page = torch.arange(max_pages, device=device)
        self._rows = DecodeRows(
            torch.arange(texts, dtype=torch.int32, device=device),
            whole(texts),
            self._page.int().expand(texts, -1).contiguous(),
        )
        self._last: Tensor | None = None

    @torch.inference_mode()
    def follow(self, scores: Tensor, position: int) -> tuple[Tensor, StepCounts]:
        """Select by ``scores [B, H, max_pages]`` for the tokens at ``position`` and let the hot
        buffers follow; the selection ``[B, H, max_pages]`` bool, and what is counted of it.
        """
        count = position // PAGE_SIZE + 1
        held = self.hot.state.slot_of >= 0
        chosen = chosen_pages(scores + self.margin * held, count, self.budget)
        missed = chosen & ~held
        if position % PAGE_SIZE == 0:
            missed[..., count - 1] = False
        self._resolve(chosen, count, position)
        last = chosen if self._last is None else self._last
        self._last = chosen
        budget, page = self.budget, self._page
        free = chosen & (page >= budget.sinks) & (page < count - budget.recents)
        decile = (page * DECILES // count).clamp(max=DECILES - 1)

        def by_decile(pages: Tensor) -> Tensor:
            sums = pages.sum((0, 1))
            return torch.zeros(DECILES, dtype=sums.dtype, device=sums.device).index_add_(
                0, decile, sums
            )

        counts = StepCounts(
            by_decile(chosen),
            by_decile(missed),
            (chosen & last).sum(),
            free.sum(),
            (free & last).sum(),
        )
        return chosen, counts

    def _resolve(self, chosen: Tensor, count: int, position: int) -> None:
        texts, heads, _ = chosen.shape
        kept = min(count, self.budget.total)
        # All rows have as many pages; the others sort behind them.
        pages = torch.where(chosen, self._page, self._page[-1] + 1).sort(-1).values[..., :kept]
        head = torch.arange(heads, device=chosen.device)[:, None]
        self._selection.pages[:, :kept] = (pages * heads + head).flatten(0, 1).int()
        self._selection.lengths.fill_((kept - 1) * PAGE_SIZE + position % PAGE_SIZE + 1)
        self._rows.seq_lens.fill_(position + 1)
        self.hot.resolve(self._selection, self._rows, texts)
