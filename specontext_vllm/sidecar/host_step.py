"""A step as the worker tells it to the actor."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from specontext_vllm.config import pages_for
from specontext_vllm.sidecar.messages import Select
from specontext_vllm.sidecar.mirror import pages_of
from specontext_vllm.step_data import StepBatch


@dataclass(frozen=True)
class HostStep:
    """One step as the host sees it.

    Attributes:
        message: what the actor gets.
        block_table: ``[R, W]`` int32.
        starts: ``[R]`` positions of the rows' first tokens.
        seq_lens: ``[R]``.
        slots: ``[N]`` a copy of its own, for the mirror.
    """

    message: Select
    block_table: np.ndarray
    starts: np.ndarray
    seq_lens: np.ndarray
    slots: Tensor

    @property
    def pages(self) -> Tensor:
        """Ids of the pages that the step writes, ascending."""
        return pages_of(self.slots)

    @property
    def prompt_slots(self) -> Tensor:
        """Slots of the tokens of prompt rows."""
        return self.slots[self.message.num_decodes :]


class StepWriter:
    """Writes steps for the actor, with the entries of the block table that are new to it.

    Args:
        max_rows, max_pages: shape of the actor's block table.
    """

    def __init__(self, max_rows: int, max_pages: int) -> None:
        self._known_table = np.zeros((max_rows, max_pages), dtype=np.int32)

    def write(self, batch: StepBatch) -> HostStep:
        """The step on the host. On a GPU this waits for the step before."""
        rows, max_pages = batch.num_rows, self._known_table.shape[1]
        width = min(pages_for(max(batch.seq_lens_bound)), max_pages)
        block_table = batch.block_table[:rows, :width].cpu().numpy()
        starts = batch.query_starts[: rows + 1].cpu()
        positions, seq_lens = batch.positions[: batch.num_tokens].cpu(), batch.seq_lens[:rows].cpu()
        slots = batch.slots[: batch.num_tokens].to("cpu", copy=True)
        row, column = np.nonzero(self._known_table[:rows, :width] != block_table)
        message = Select(
            token_ids=batch.token_ids[: batch.num_tokens].cpu(),
            positions=positions,
            slots=slots,
            query_starts=starts,
            seq_lens=seq_lens,
            changed=torch.from_numpy((row * max_pages + column).astype(np.int32)),
            blocks=torch.from_numpy(block_table[row, column]),
            seq_lens_bound=batch.seq_lens_bound,
            num_decodes=batch.num_decodes,
            budgets=tuple(batch.budgets),
        )
        return HostStep(
            message, block_table, positions[starts[:-1].long()].numpy(), seq_lens.numpy(), slots
        )

    def sent(self, step: HostStep) -> None:
        """The actor knows the step's block table now."""
        rows, width = step.block_table.shape
        self._known_table[:rows, :width] = step.block_table

    def forget(self) -> None:
        """A new actor knows nothing."""
        self._known_table.fill(0)
