"""Attention in 16 bits lies no further from float64 than stock vLLM's."""

import pytest
import torch

from benchmarks.rounding.errors import compare
from benchmarks.rounding.kernels import ours, stock
from benchmarks.rounding.layers import exact, random_layer, relative
from specontext_vllm.attention.triton import TritonProvider
from tests.conftest import CUDA

SHAPES = [
    pytest.param(1000, 2, 64, id="small"),
    *(
        pytest.param(
            tokens, group, head_dim, id=f"{tokens}-{group}-{head_dim}", marks=pytest.mark.gpu
        )
        for tokens in (1024, 2048)
        for group in (1, 4, 8)
        for head_dim in (64, 128)
    ),
]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("decode", [False, True], ids=["prefill", "decode"])
@pytest.mark.parametrize(("tokens", "group", "head_dim"), SHAPES)
def test_attention_is_as_near_to_float64_as_stocks(tokens, group, head_dim, decode, dtype, device):
    errors = compare([random_layer(dtype, tokens, group, head_dim, decode, device)])
    assert errors["ours_rms"] <= 1.1 * errors["stock_rms"]


@pytest.mark.slow
def test_the_decode_kernel_rounds_the_weights_and_the_output_and_nothing_else(device):
    layer = random_layer(torch.float16, 300, 2, 64, True, device)
    reference = exact(layer)
    error, _ = relative([ours(layer, TritonProvider)], [reference])
    least, _ = relative([exact(layer, torch.float16).half()], [reference])
    assert error <= 1.05 * least


@pytest.mark.skipif(CUDA, reason="is about vLLM's attention for CPUs")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("head_dim", [64, 112])
def test_prefill_on_a_cpu_gives_stocks_bits(dtype, head_dim):
    layer = random_layer(dtype, 1000, 3, head_dim, False, torch.device("cpu"))
    assert torch.equal(ours(layer), stock(layer))
