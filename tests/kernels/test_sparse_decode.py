"""Decode attention over page tables against a softmax over the gathered pages. The providers' tests
(tests/attention) run it behind their interface.
"""

import pytest
import torch

from specontext_vllm.config import PAGE_SIZE, pages_for
from specontext_vllm.triton_kernels.sparse_decode import SplitWorkspace, sparse_decode
from tests.paging import assert_close, sliced_rows


def random_lists(lengths, blocks):
    """Per sequence as many distinct head pages as its tokens need; behind them one that must not
    be read, the last.
    """
    width = max(pages_for(tokens) for tokens in lengths) + 2
    pages = torch.full((len(lengths), width), blocks - 1, dtype=torch.int32)
    for sequence, tokens in enumerate(lengths):
        pages[sequence, : pages_for(tokens)] = torch.randperm(blocks - 1)[: pages_for(tokens)]
    return pages


def naive(query, head_pages, pages, lengths, scale):
    """Attention of each sequence in float64; zeros where it has no token."""
    rows, heads, d = query.shape
    num_kv_heads = len(lengths) // rows
    out = torch.zeros(rows, num_kv_heads, heads // num_kv_heads, d, dtype=torch.float64)
    for sequence, tokens in enumerate(lengths):
        if tokens == 0:
            continue
        row, head = divmod(sequence, num_kv_heads)
        kv = head_pages[pages[sequence, : pages_for(tokens)].long()].flatten(0, 1)[:tokens].double()
        q = query[row].view(num_kv_heads, -1, d)[head].double()
        out[row, head] = (q @ kv[:, :d].T * scale).softmax(-1) @ kv[:, d:]
    return out.view(rows, heads, d)


@pytest.mark.parametrize("parts", [1, 24, 200], ids="{}-parts".format)
@pytest.mark.parametrize(
    ("lengths", "heads", "group", "d"),
    [
        # Each (row, KV head) has a list of its own, of its own length; 0: a padding row.
        pytest.param([1, 300, 16, 17, 0, 0], 2, 2, 64, id="gqa"),
        pytest.param([33, 160, 700, 5], 4, 1, 32, id="mha"),
        pytest.param([99, 640], 1, 5, 40, id="mqa-odd"),
        pytest.param([700, 99], 1, 20, 32, id="mqa-wide"),
    ],
)
@pytest.mark.parametrize(
    "dtype",
    # Triton's interpreter has no bf16 dot.
    [
        pytest.param(torch.float32, id="fp32"),
        pytest.param(torch.bfloat16, id="bf16", marks=pytest.mark.gpu),
    ],
)
def test_each_sequence_attends_over_its_pages_and_no_other(
    lengths, heads, group, d, dtype, parts, device
):
    rows, blocks = len(lengths) // heads, 80
    pages = random_lists(lengths, blocks)
    head_pages = torch.randn(blocks, PAGE_SIZE, 2 * d).to(dtype)
    # Whatever no list names is NaN: other pages, and the places behind the last token.
    named = torch.zeros(blocks, PAGE_SIZE, dtype=torch.bool)
    for sequence, tokens in enumerate(lengths):
        for place, page in enumerate(pages[sequence, : pages_for(tokens)].tolist()):
            named[page, : min(PAGE_SIZE, tokens - place * PAGE_SIZE)] = True
    head_pages[~named] = float("nan")
    query = torch.randn(rows, heads * group, d).to(dtype)
    output = torch.full((rows, heads * group, d), float("nan"), dtype=dtype, device=device)
    workspace = SplitWorkspace.allocate(parts, group, d, device)
    sparse_decode(
        sliced_rows(query.to(device)),
        head_pages.to(device),
        pages.to(device),
        torch.tensor(lengths, dtype=torch.int32, device=device),
        output,
        d**-0.5,
        workspace,
    )
    wanted = naive(query, head_pages, pages, lengths, d**-0.5)
    assert_close("output", wanted, output, 1e-5 if dtype == torch.float32 else 1e-2)
    assert not workspace.ended.any(), "the next call would combine too early"
