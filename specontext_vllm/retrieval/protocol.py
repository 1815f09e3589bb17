"""What every retriever offers: it chooses the pages that a step's decode rows read, and learns the
step's tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from specontext_vllm.config import SpeContextConfig
from specontext_vllm.retrieval.cached_head import CachedHead
from specontext_vllm.retrieval.counters import Counters
from specontext_vllm.step_data import (
    PageScores,
    RowPart,
    Selection,
    StepBatch,
    StepShape,
    Stickiness,
)


class Retriever(Protocol):
    """In each step ``shape_step``, ``project``, then ``score`` and ``select`` for each part of the
    rows, before the model runs; ``learn`` after it.

    There are two: ``retrieval.local`` with a head of its own, and ``sidecar.remote``, whose head
    and scores belong to an actor.

    Attributes:
        config: the settings in force.
        counters: what the decode steps come to.
    """

    config: SpeContextConfig

    @property
    def counters(self) -> Counters: ...

    @property
    def head(self) -> CachedHead | None:
        """The head in this process, if there is one."""

    @property
    def row_totals(self) -> Tensor:
        """``[rows]`` int32 pages that each decode row of a step reads at the most, on the worker's
        device; it persists. For what selects in each layer.
        """

    @property
    def key_dtype(self) -> torch.dtype | None:
        """What the head's keys are kept in; None without a head."""

    @property
    def reads_aux(self) -> bool:
        """Whether ``learn`` wants the model's auxiliary hidden states."""

    @property
    def embeds_outside(self) -> bool:
        """Whether no graph may hold the target's embedding."""

    @property
    def capturable(self) -> bool:
        """Whether CUDA graphs may hold ``project``, ``score``, ``select`` and ``learn``."""

    @property
    def bytes_per_block(self) -> int:
        """Bytes of the worker's memory for KV that are kept of one page, vLLM's kernel block."""

    # -- a step

    def shape_step(self, batch: StepBatch) -> StepShape:
        """The first call of a step: count its rows, and determine what is launched for them."""

    def embed_outside(self, batch: StepBatch, rows: int) -> Tensor | None:
        """The embeddings of the first ``rows`` rows' tokens, in a buffer that persists, where a
        graph cannot hold the target's embedding; None: ``project`` makes them itself.
        """

    def project(
        self, batch: StepBatch, shape: StepShape, embeds: Tensor | None = None
    ) -> Tensor | None:
        """Make the head's keys of the decode rows' tokens, or prepare them for ``learn`` where they
        need the tokens' own states; and their queries ``[rows, NQ, D]`` if pages are chosen by
        them.

        Args:
            embeds: from ``embed_outside``.
        """

    def score(
        self, batch: StepBatch, shape: StepShape, part: RowPart, queries: Tensor | None
    ) -> PageScores:
        """Score the pages of the rows of one part."""

    def select(
        self,
        batch: StepBatch,
        shape: StepShape,
        part: RowPart,
        scores: PageScores,
        selection: Selection,
        stickiness: Stickiness | None = None,
    ) -> None:
        """Write the pages that the rows of one part read into ``selection``; for a rule that
        selects in each layer only their lengths.
        """

    def learn(self, batch: StepBatch, rows: int, aux: Sequence[Tensor]) -> None:
        """Learn the tokens that the step has kept from the model's auxiliary hidden states; the
        decode rows are those of the last ``project``.

        Args:
            rows: the decode rows, the padding of a graph included.
            aux: ``[>= N, H_target]``, one tensor per aux layer.
        """

    # -- an engine

    def allocate_cache(self, num_blocks: int) -> None:
        """Allocate what is kept of ``num_blocks`` kernel blocks of KV, which are our pages."""

    def shrink(self, max_model_len: int, table_pages: int) -> None:
        """Before the first step: contexts are shorter, and the page table narrower, than was said
        at first.
        """

    def configure(self, config: SpeContextConfig) -> None:
        """Change the settings between steps; the head and the table's width stay.

        Raises:
            ConfigError: the page table is too narrow, or a rule needs a head and there is none.
        """

    def profile(self, num_tokens: int) -> None:
        """Run the largest step on made-up data, for vLLM's memory profile to see."""

    def warm_up(self, selection: Selection, stickiness: Stickiness | None = None) -> None:
        """Compile what steps launch, before a request waits for it; changes ``selection``."""

    def stats(self, reset: bool = False) -> dict[str, Any]:
        """Figures since the last reset."""

    def sidecar_figures(self) -> dict[str, float]:
        """Figures of the sidecar, by their names in ``stats``; nothing without one."""

    def close(self) -> None:
        """Let go of what outlives the worker."""
