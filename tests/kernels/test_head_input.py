"""The input of the head's projections against a loop over rows."""

import pytest
import torch

from specontext_vllm.config import PAGE_SIZE
from specontext_vllm.triton_kernels.head_input import head_input
from tests.paging import assert_close

EPS = 1e-5


def rms_norm(x, weight):
    return x / (x.pow(2).mean() + EPS).sqrt() * weight


def naive(embeds, fused, block_table, positions, embed_norm, feature_norm):
    """``head_input`` in float32, row by row: the fused aux comes from the page of the token before,
    and token 0 has none.
    """
    rows = []
    for row, position in enumerate(positions.tolist()):
        before = torch.zeros(fused.shape[1])
        if position > 0:
            before = fused[int(block_table[row, (position - 1) // PAGE_SIZE])].float()
        rows.append(
            torch.cat(
                [
                    rms_norm(embeds[row].float(), embed_norm.float()),
                    rms_norm(before, feature_norm.float()),
                ]
            )
        )
    return torch.stack(rows)


@pytest.mark.parametrize(
    ("width", "hidden"),
    [pytest.param(64, 64, id="equal"), pytest.param(40, 100, id="odd-and-different")],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["fp32", "fp16"])
def test_rows_are_the_embedding_and_the_fused_aux_of_the_token_before(width, hidden, dtype, device):
    # Token 0; inside a page; the first and the second token of a page; the last one of a page.
    positions = torch.tensor([0, 5, 16, 17, 95, 160])
    rows, pages = len(positions), 11
    block_table = torch.randperm(rows * pages).view(rows, pages).int()
    embeds = torch.randn(rows, width).to(dtype)
    # Rows that no page of the batch names are NaN.
    fused = torch.full((rows * pages + 1, hidden), float("nan"), dtype=dtype)
    for row, position in enumerate(positions.tolist()):
        before = max(position - 1, 0) // PAGE_SIZE
        fused[int(block_table[row, before])] = torch.randn(hidden).to(dtype)
    norms = [(torch.rand(size) + 0.5).to(dtype) for size in (width, hidden)]
    inputs = (embeds, fused, block_table, positions, *norms)
    found = head_input(*[tensor.to(device) for tensor in inputs], EPS, PAGE_SIZE)
    assert found.dtype == dtype and found.shape == (rows, width + hidden)
    assert_close("inputs", naive(*inputs), found, 1e-5 if dtype == torch.float32 else 2e-3)
    assert (found[0, width:] == 0).all(), "token 0 has no token before it"
