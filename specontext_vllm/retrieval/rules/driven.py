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
    """Made-up scores per (block, KV head), each of which is drawn anew with a given chance in each
    step.

    The head scores as ever, so that its time is in the step; then its scores are replaced.

    The setting ``shares`` lists the chances of the steps that choose pages, over and over: so each
    is the share of the pages whose scores change in that step. Draws do not depend on one another,
    as a page that has lost its place may win it back at any time.
    """

    needs_head = True
    for_benchmarks = True
    default_settings = {"shares": [0.05]}

    def __init__(self, settings: Mapping[str, Any], device: torch.device) -> None:
        import torch

        super().__init__(settings, device)
        # What a captured step reads and advances lies in tensors that persist.
        chances = [round(share * 2**32) for share in self.settings["shares"]]
        self.chances = torch.tensor(chances, dtype=torch.int64, device=device)
        self.step = torch.full((1,), -1, dtype=torch.int64, device=device)
        self.drawn = torch.empty(0, 0, device=device)

    @classmethod
    def check_settings(cls, settings: Mapping[str, Any]) -> None:
        shares = settings["shares"]
        if (
            not isinstance(shares, list | tuple)
            or not shares
            or not all(type(share) in (int, float) and 0 <= share <= 1 for share in shares)
        ):
            raise ValueError(
                f"rule_settings: found shares {shares!r}; give a list of numbers from 0 to 1."
            )

    def score(self, inputs: ScoreInputs, scores: PageScores) -> PageScores:
        inputs.score_keys(scores)
        rows, keys, heads = inputs.rows, inputs.keys, scores.order.shape[0]
        assert keys is not None
        if self.drawn.shape != (len(keys), heads):
            # In the first step, of which no graph is captured.
            self.drawn = self.drawn.new_full((len(keys), heads), -1.0)
        if rows.start == 0:  # A step's first part.
            self.step.add_(1)
        if keys.is_cuda:
            from specontext_vllm.triton_kernels.driven_scores import driven_scores

            driven_scores(
                self.drawn,
                self.step,
                self.chances,
                inputs.block_table,
                inputs.seq_lens,
                inputs.starts,
                scores.page_max,
                page_size=inputs.page_size,
                first_row=rows.start,
                num_rows=len(rows),
                max_pages=inputs.max_pages,
                min_pages=inputs.min_pages,
            )
        else:
            for row, span in inputs.scored_rows():
                blocks = inputs.block_table[row, : span.stop - span.start].long()
                values = redrawn(self.drawn, blocks, self.step, self.chances)
                self.drawn[blocks] = values
                group = scores.page_max.shape[0] // heads
                scores.page_max[:, span] = values.T.repeat_interleave(group, dim=0)
        return replace(scores, page_lse=scores.page_max)


def redrawn(drawn: Tensor, blocks: Tensor, step: Tensor, chances: Tensor) -> Tensor:
    """Scores ``[pages, H]`` of ``blocks [pages]`` int64 in a step; other arguments as for
    ``triton_kernels.driven_scores.driven_scores``.
    """
    import torch

    heads, old = drawn.shape[1], drawn[blocks]
    page = blocks[:, None] * heads + torch.arange(heads, device=blocks.device)
    dice = mix(mix(page) + step * 0x9E3779B1)
    new = mix(dice + 0x7F4A7C15).float() * (10 * 2.0**-32)
    return torch.where((dice < chances[step % len(chances)]) | (old < 0), new, old)


def mix(number: Tensor) -> Tensor:
    """A number from 0 to 2 ** 32 - 1 that looks random, of each of ``number`` (int64)."""
    number = number & 0xFFFFFFFF
    for _ in range(2):
        number = ((number ^ (number >> 16)) * 0x45D9F3B) & 0xFFFFFFFF
    return number ^ (number >> 16)
