"""The inputs of the head's projections against a loop over rows."""

import pytest
import torch

from specontext_vllm.config import PAGE_SIZE
from specontext_vllm.triton_kernels.head_input import add_own_states, head_input
from tests.guards import SENTINEL, Guarded
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


@pytest.mark.parametrize(
    ("width", "hidden"),
    [pytest.param(64, 64, id="equal"), pytest.param(40, 100, id="odd-and-different")],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["fp32", "fp16"])
def test_both_halves_of_a_keys_inputs_come_to_lie_in_one_row(width, hidden, dtype, device):
    """What is written before the model, what is written after it, and the padding rows' share."""
    positions, slots = torch.tensor([0, 17, 40]), torch.tensor([5 * PAGE_SIZE, 33, -1])
    block_table = torch.tensor([[5, 9, 9], [0, 2, 9], [4, 1, 3]]).int()
    embeds, own = torch.randn(3, width).to(dtype), torch.randn(3, hidden).to(dtype)
    cached = torch.randn(10, hidden).to(dtype)
    norms = [(torch.rand(size) + 0.5).to(dtype) for size in (width, hidden)]
    expected = [
        naive(embeds, cached, block_table, positions, *norms),
        torch.stack([rms_norm(row.float(), norms[1].float()) for row in own]),
    ]
    out = Guarded.make(4, width + 2 * hidden, dtype=dtype, device=device)
    kept = Guarded.make(10, hidden, dtype=dtype, device=device)
    kept.view.copy_(cached)
    inputs = (embeds, kept.view, block_table, positions, *norms)
    first = head_input(*[t.to(device) for t in inputs], EPS, PAGE_SIZE, out.view[:3])
    assert first.data_ptr() == out.view.data_ptr() and first.shape == (3, width + hidden)
    assert (out.view[:, width + hidden :] == SENTINEL).all()
    add_own_states(
        own.to(device),
        slots.to(device),
        norms[1].to(device),
        kept.view,
        out.view[:3, width + hidden :],
        EPS,
        PAGE_SIZE,
    )
    ratio = 1e-5 if dtype == torch.float32 else 2e-3
    assert_close("inputs", torch.cat(expected, -1), out.view[:3], ratio)
    assert (out.view[3] == SENTINEL).all(), "a row that is not of the step"
    cached[[5, 2, 9]] = own
    assert torch.equal(kept.view.cpu(), cached)
    out.check()
    kept.check()
