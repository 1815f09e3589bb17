"""Selections that change from step to step as a real model's do, for models with random weights."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


def drive_selection(worker: Any, shares: Sequence[float]) -> None:
    """Make a worker's selections change as a real model's do: in step i the share ``shares[i]`` of
    the pages is scored anew.

    Random weights select at random. The head's own scoring still runs, so that its time is in the
    step; its scores are then replaced by numbers that stay the same but for that share.
    """
    import torch

    from specontext_vllm.retrieval import local as module

    runtime = worker.model_runner.runtime
    retriever, heads, max_requests = (
        runtime.retriever,
        runtime.num_kv_heads,
        worker.vllm_config.scheduler_config.max_num_seqs,
    )
    state = module.__dict__.setdefault("_driven", {"original": module.score_rows, "step": 0})
    state["shares"] = list(shares)
    if "share" not in state:
        # What a captured step reads lies in tensors that persist. The last row of the numbers is
        # the padding rows'.
        state["share"] = torch.zeros((), device=runtime.device)
        state["base"] = torch.rand(
            max_requests + 1, heads, retriever.max_pages, device=runtime.device
        )

    def rows_of(rows: range) -> Any:
        """The requests of the rows: their lanes, or without tiers the rows themselves, whose order
        does not matter there.
        """
        if runtime.tiers is None:
            return torch.arange(rows.start, rows.stop, device=runtime.device).clamp(
                max=max_requests
            )
        return runtime.tiers.lanes[rows.start : rows.stop].long()

    def driven(
        queries: Any,
        keys: Any,
        block_table: Any,
        seq_lens: Any,
        starts: Any,
        scores: Any,
        *,
        rows: range,
        **bounds: Any,
    ) -> None:
        state["original"](queries, keys, block_table, seq_lens, starts, scores, rows=rows, **bounds)
        real = range(rows.start, min(rows.stop, queries.shape[0]))
        lanes = rows_of(real)
        base = state["base"][lanes]
        base = torch.where(torch.rand_like(base) < state["share"], torch.rand_like(base), base)
        state["base"][lanes] = base
        page = torch.arange(base.shape[-1], device=queries.device)
        inside = page < ((seq_lens[real.start : real.stop, None] + 15) // 16)
        place = (
            torch.where(inside, starts[: len(real), None] + page, scores.capacity - 1)
            .flatten()
            .long()
        )
        # [rows, heads, width] -> [query heads, rows * width]
        values = (
            (10 * base)
            .transpose(0, 1)
            .reshape(heads, -1)
            .repeat_interleave(scores.page_max.shape[0] // heads, dim=0)
        )
        scores.page_max[:, place] = values
        scores.page_lse[:, place] = values

    def before_forward(*arguments: Any) -> None:
        state["share"].fill_(state["shares"][state["step"] % len(state["shares"])])
        state["step"] += 1
        type(retriever).before_forward(retriever, *arguments)

    retriever.before_forward = before_forward
    module.score_rows = driven


DRIVEN = (
    "Random weights select at random, so the selections are driven: the head scores as ever, then "
    "a share of the pages gets new scores in "
    "each step. Stickiness is off, since it would distort that share. Later passes of an engine "
    "use the same prompts and hit the prefix cache; their times end to end are left out."
)
