"""Random paged caches whose unread places are NaN, to compare with a dense reference."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from specontext_vllm.config import PAGE_SIZE, pages_for


def of_each_row(values: int | list[int], rows: int, device: torch.device | str = "cpu") -> Tensor:
    """``[rows]`` int32 budgets in pages: each its own, or all the same."""
    values = [values] * rows if isinstance(values, int) else values
    return torch.tensor(values, dtype=torch.int32, device=device)


@dataclass
class PagedRows:
    """Rows of ragged length in shuffled blocks.

    Attributes:
        dense: per row ``[H, tokens, D]`` float32 values as stored.
        cache: ``[num_blocks, H, P, D]``; every place that holds no token of a row is NaN.
        block_table: ``[B, W]`` int32; tails point at a block that holds NaN only.
        seq_lens: ``[B]`` int32.
    """

    dense: list[Tensor]
    cache: Tensor
    block_table: Tensor
    seq_lens: Tensor


def paged_rows(
    lengths: list[int], heads: int, width: int, dtype: torch.dtype, device: torch.device, seed: int
) -> PagedRows:
    """Fill a shuffled cache with random rows of the given lengths."""
    generator = torch.Generator().manual_seed(seed)
    counts = [pages_for(n) for n in lengths]
    blocks = torch.randperm(sum(counts) + 4, generator=generator)
    cache = torch.full((len(blocks) + 1, heads, PAGE_SIZE, width), float("nan"), dtype=dtype)
    table = torch.full((len(lengths), max(counts) + 2), len(blocks), dtype=torch.int32)
    dense, start = [], 0
    for row, (tokens, count) in enumerate(zip(lengths, counts)):
        page_ids = blocks[start : start + count]
        start += count
        values = torch.randn(heads, tokens, width, generator=generator).to(dtype)
        padded = torch.full((heads, count * PAGE_SIZE, width), float("nan"), dtype=dtype)
        padded[:, :tokens] = values
        cache[page_ids] = padded.view(heads, count, PAGE_SIZE, width).transpose(0, 1)
        table[row, :count] = page_ids
        dense.append(values.float())
    lens = torch.tensor(lengths, dtype=torch.int32)
    return PagedRows(dense, cache.to(device), table.to(device), lens.to(device))


def sliced_rows(rows: Tensor) -> Tensor:
    """``rows [B, N, D]`` as uncompiled models pass queries: a slice of a fused projection, NaN
    between the rows.
    """
    return torch.cat([rows, torch.full_like(rows, float("nan"))], 1)[:, : rows.shape[1]]


def assert_close(name: str, reference: Tensor, result: Tensor, ratio: float) -> None:
    """``|result - reference| / |reference|`` within ``ratio``; NaN never passes."""
    reference, result = reference.float().cpu(), result.float().cpu()
    error = (result - reference).norm() / reference.norm().clamp(min=1e-12)
    assert error <= ratio, f"{name}: relative error {error:.2e} > {ratio:.0e}"
