"""What arrives is what was sent, and is the receiver's own."""

from __future__ import annotations

from dataclasses import fields

import pytest
import torch

from specontext_vllm.config import SpeContextConfig
from specontext_vllm.sidecar.messages import (
    SEPARATE_BYTES,
    Allocate,
    Configure,
    Embeddings,
    Learn,
    Learned,
    Refill,
    Select,
    Selected,
    decode,
    encode,
)


def ints(*shape: int, dtype: torch.dtype = torch.int32) -> torch.Tensor:
    return torch.randint(-(2**31), 2**31, shape, dtype=torch.int64).to(dtype)


def keys(*shape: int) -> torch.Tensor:
    """8-bit floats of every bit pattern, NaN included."""
    return torch.randint(0, 256, shape, dtype=torch.uint8).view(torch.float8_e4m3fn)


def select(tokens: int, changed: int) -> Select:
    return Select(
        token_ids=ints(tokens),
        positions=ints(tokens, dtype=torch.int64),
        slots=ints(tokens, dtype=torch.int64),
        query_starts=ints(4),
        seq_lens=ints(3),
        changed=ints(changed),
        blocks=ints(changed),
        seq_lens_bound=[7, 2**40, 0],
        num_decodes=2,
        budgets=(None, 512),
    )


SMALL = [
    Allocate(12),
    Configure(SpeContextConfig(budget=256, retrieval_head="a/folder")),
    Embeddings(5, torch.randn(3, 8, dtype=torch.bfloat16)),
    Refill(ints(2, dtype=torch.int64), keys(2, 2, 16, 4), torch.randn(2, 6, dtype=torch.bfloat16)),
    select(5, 3),
    select(1, 0),
    Selected(ints(4, 7), ints(4), torch.randn(9, dtype=torch.float64)),
    Selected(ints(0, 0), ints(0), torch.randn(9, dtype=torch.float64)),
    Learn([torch.randn(2, 5, dtype=torch.bfloat16) for _ in range(3)]),
    Learned(keys(0, 2, 8), torch.randn(1, 6)),
]
LARGE = [
    Learn([torch.randn(SEPARATE_BYTES // 8 + rest, 2, dtype=torch.float32) for rest in (-1, 0, 1)]),
    select(SEPARATE_BYTES // 8, 2),
]


@pytest.mark.parametrize("message", SMALL + LARGE, ids=lambda message: type(message).__name__)
def test_what_arrives_is_what_was_sent_and_the_receivers_own(message):
    wire = encode(message)
    channel = (wire[0], [array.copy() for array in wire[1]]) if isinstance(wire, tuple) else wire
    arrived = decode(channel)
    if isinstance(channel, tuple):
        for array in channel[1]:
            # The next message takes its place.
            array.fill(255)
    assert type(arrived) is type(message)
    for field in fields(message):
        sent, got = getattr(message, field.name), getattr(arrived, field.name)
        for a, b in zip(sent, got, strict=True) if isinstance(sent, list) else [(sent, got)]:
            if not isinstance(a, torch.Tensor):
                assert a == b and type(a) is type(b)
                continue
            assert (
                a.dtype == b.dtype
                and a.shape == b.shape
                and torch.equal(a.view(torch.uint8), b.view(torch.uint8))
            )
            # Writable, and nobody else's.
            b.view(torch.uint8).fill_(1)


@pytest.mark.parametrize("message", LARGE, ids=lambda message: type(message).__name__)
def test_large_tensors_travel_apart_and_small_ones_in_one_string(message):
    text, large = encode(message)
    sizes = [
        tensor.nbytes
        for value in vars(message).values()
        for tensor in (value if isinstance(value, list) else [value])
        if isinstance(tensor, torch.Tensor)
    ]
    assert [array.nbytes for array in large] == [
        size for size in sizes if size >= SEPARATE_BYTES
    ] and len(text) < sum(sizes) - sum(array.nbytes for array in large) + 2000
    assert isinstance(encode(SMALL[4]), bytes) and encode(None) is None and decode(None) is None


def test_a_tensor_that_is_a_part_of_another_arrives_alone():
    whole = torch.arange(24, dtype=torch.float32).view(4, 6)
    parts = [whole[1:3, ::2], whole.t(), whole[0, :1].as_strided((1,), (0,)), whole.bfloat16().t()]
    for sent, arrived in zip(parts, decode(encode(Learn(parts))).aux, strict=True):
        assert (
            torch.equal(arrived, sent)
            and arrived.dtype == sent.dtype
            and len(arrived.untyped_storage()) == sent.numel() * sent.itemsize
        )
