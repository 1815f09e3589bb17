"""The largest weights of pages against a softmax over all tokens in sight."""

import pytest
import torch

from specontext_vllm.config import PAGE_SIZE
from specontext_vllm.retrieval.reference import grouped_logits, reduce_to_pages, token_scores
from specontext_vllm.triton_kernels.page_weights import page_weights

SHAPES = [
    pytest.param(2, 4, 2, 64, 150, 5, id="gqa-ragged"),
    pytest.param(1, 3, 1, 40, 64, 70, id="odd-group-odd-head-dim-many-positions"),
    pytest.param(1, 2, 2, 32, 17, 1, id="mha"),
    pytest.param(2, 32, 2, 64, 96, 7, id="16-query-heads-a-kv-head"),
]


@pytest.mark.parametrize(("batch", "heads", "kv_heads", "width", "tokens", "sampled"), SHAPES)
@pytest.mark.parametrize(
    "dtype",
    # Triton's interpreter has no bf16 dot.
    [
        pytest.param(torch.float32, id="fp32"),
        pytest.param(torch.bfloat16, id="bf16", marks=pytest.mark.gpu),
    ],
)
def test_kernel_is_the_softmax(batch, heads, kv_heads, width, tokens, sampled, dtype, device):
    query = 2 * torch.randn(batch, heads, sampled, width).to(dtype)
    # Keys as a model has them: heads between the tokens, and a stranger's behind the last one.
    wide = torch.full((batch, tokens + 3, kv_heads, width), float("nan"), dtype=dtype)
    wide[:, :tokens] = torch.randn(batch, tokens, kv_heads, width).to(dtype)
    key = wide.transpose(1, 2)[:, :, :tokens]
    place = torch.randint(0, tokens, (batch, sampled))
    place[0, 0] = 0
    logits = grouped_logits(query, key, scale=0.2)
    hidden = torch.arange(tokens) > place[:, None, :, None, None]
    scores = token_scores(logits.masked_fill(hidden, float("-inf")))
    wanted = reduce_to_pages(scores, PAGE_SIZE)[0]
    found = page_weights(query.to(device), key.to(device), place.to(device), 0.2, PAGE_SIZE)
    torch.testing.assert_close(found.cpu(), wanted, rtol=1e-4, atol=1e-4)
