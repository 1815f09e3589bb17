"""``driven``: scores that change from step to step as much as they are told to, for benchmarks with
random weights, which would choose at random.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from specontext_vllm.retrieval.rules import Rule

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from specontext_vllm.retrieval.scoring import ScoreInputs
    from specontext_vllm.step_data import PageScores


class Driven(Rule):
    """Made-up scores per (block, KV head), of which a share is drawn anew in each step.

    The head scores as ever, so that its time is in the step; then its scores are replaced. Nothing
    is kept of a page: its score is a hash of its number and of how often it was drawn, and that
    goes up by one when the sum of the shares so far, plus a phase of the page's own, passes an
    integer. So every page is drawn anew after 1 / share steps, and the share of them in each step.

    The setting ``shares`` lists the shares of the steps that choose pages, over and over.
    """

    needs_head = True
    for_benchmarks = True
    default_settings = {"shares": [0.05]}

    def __init__(self, settings: Mapping[str, Any], device: torch.device) -> None:
        import torch

        super().__init__(settings, device)
        shares = self.settings["shares"]
        if not shares or not all(0 <= share <= 1 for share in shares):
            raise ValueError(f"rule_settings.shares: found {shares!r}; give numbers from 0 to 1.")
        # What a captured step reads and advances lies in tensors that persist. Sums are kept in
        # double precision, in which a small share is not lost after many steps.
        self.shares = torch.tensor(shares, dtype=torch.float64, device=device)
        self.step = torch.zeros(1, dtype=torch.int64, device=device)
        self.drawn = torch.zeros(1, dtype=torch.float64, device=device)

    def score(self, inputs: ScoreInputs, scores: PageScores) -> PageScores:
        import torch

        inputs.score_keys(scores)
        queries, rows = inputs.queries, inputs.rows
        assert queries is not None
        if rows.start == 0:  # A step's first part.
            self.drawn += self.shares[self.step % len(self.shares)]
            self.step += 1
        heads = scores.order.shape[0]
        width = min(inputs.max_pages, inputs.block_table.shape[1])
        # Padding rows without queries have no pages either.
        rows = range(rows.start, min(rows.stop, len(queries)))
        # Places beyond a row's pages stand for its last one, which gets the same score each time.
        last = (inputs.seq_lens[rows.start : rows.stop, None].long() - 1) // inputs.page_size
        page = torch.arange(width, device=queries.device).minimum(last.clamp(min=0))
        blocks = inputs.block_table[rows.start : rows.stop].gather(1, page)
        values = self.values(blocks, heads)  # [H, rows, width]
        place = inputs.starts[: len(rows), None].long() + page
        values = values.repeat_interleave(scores.page_max.shape[0] // heads, dim=0).flatten(1)
        scores.page_max[:, place.clamp(max=scores.capacity - 1).flatten()] = values
        return replace(scores, page_lse=scores.page_max)

    def values(self, blocks: Tensor, heads: int) -> Tensor:
        """Scores ``[H, *blocks]`` float32 from 0 to 10 of this step."""
        import torch

        head = torch.arange(heads, device=blocks.device).view(-1, *[1] * blocks.dim())
        key = mix(blocks.long() * heads + head)
        times = torch.floor(self.drawn + key * 2.0**-32).long()
        return (mix(key + times * 0x9E3779B1) * (10 * 2.0**-32)).float()


def mix(number: Tensor) -> Tensor:
    """A number from 0 to 2 ** 32 - 1 that looks random, of each of ``number`` (int64)."""
    number = number & 0xFFFFFFFF
    for _ in range(2):
        number = ((number ^ (number >> 16)) * 0x45D9F3B) & 0xFFFFFFFF
    return number ^ (number >> 16)
