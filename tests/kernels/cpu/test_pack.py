"""Pages packed for vLLM's prompt attention in C++, against the packings written out in torch."""

from __future__ import annotations

import pytest
import torch

from specontext_vllm.config import PAGE_SIZE


def packed(cache, pages, tokens, places, copy, in_pairs):
    """``pack_pages`` in torch, token by token."""
    width, block = cache.shape[-1] // 2, copy.shape[2] // 2
    copy = copy.clone()
    for page, count, place in zip(pages.tolist(), tokens.tolist(), places.tolist(), strict=True):
        blank = torch.zeros_like(cache[page])
        blank[:, :count] = cache[page, :, :count]
        keys, values = blank.split(width, -1)
        to, first = divmod(place * PAGE_SIZE, block)
        target = copy[to].flatten(1)
        key_half, value_half = target.chunk(2, dim=1)
        if in_pairs:
            # [H, token, pair, 2] -> [H, pair, token, 2], and [H, pair of tokens, group, dim, 2].
            span = slice(first * width, (first + PAGE_SIZE) * width)
            key_half[:, span] = keys.unflatten(-1, (-1, 2)).transpose(1, 2).flatten(1)
            pairs = values.unflatten(1, (-1, 2)).transpose(2, 3).unflatten(2, (-1, 16))
            groups = value_half.unflatten(1, (width // 16, block // 2, 16, 2))
            groups[:, :, first // 2 : first // 2 + 8] = pairs.transpose(1, 2)
        else:
            grid = key_half.unflatten(1, (width, block))
            grid[:, :, first : first + PAGE_SIZE] = keys.transpose(1, 2)
            grid = value_half.unflatten(1, (block, width))
            grid[:, first : first + PAGE_SIZE] = values
    return copy


def case(width, dtype, block=64, heads=3, count=7):
    cache = torch.randn(20, heads, PAGE_SIZE, 2 * width).to(dtype)
    pages = torch.randperm(20)[:count].int()
    tokens = torch.randint(1, PAGE_SIZE + 1, (count,)).int()
    tokens[0], tokens[1] = PAGE_SIZE, 0
    for page, held in zip(pages, tokens, strict=True):
        cache[page, :, held:] = float("nan")
    places = torch.randperm(4 * block // PAGE_SIZE)[:count].int()
    copy = torch.randn(4, heads, 2 * block, width).to(dtype)
    return cache, pages, tokens, places, copy


@pytest.mark.parametrize("number", [1, 2, 3])
@pytest.mark.parametrize(
    ("width", "dtype", "in_pairs"),
    [
        (64, torch.bfloat16, False),
        (64, torch.bfloat16, True),
        (80, torch.float16, False),
        (96, torch.float16, True),
        (48, torch.float32, False),
        (256, torch.bfloat16, True),
    ],
)
def test_pages_are_packed_and_nothing_else_is_written(ops, threads, width, dtype, in_pairs, number):
    threads(number)
    cache, pages, tokens, places, copy = case(width, dtype, count=16)
    expected = packed(cache, pages, tokens, places, copy, in_pairs)
    ops.pack_pages(cache, pages, tokens, places, copy, in_pairs)
    assert copy.isfinite().all()
    assert torch.equal(copy, expected)


@pytest.mark.parametrize(
    ("name", "value", "sentence"),
    [
        ("pages", 20, "pages: found one that is none of the 20"),
        ("tokens", 17, "tokens, places: found 17 tokens"),
        ("places", 16, "at 16 of 16"),
        ("places", -1, "at -1 of 16"),
    ],
)
def test_a_page_that_cannot_be_is_refused(ops, name, value, sentence):
    arguments = dict(zip(("cache", "pages", "tokens", "places", "copy"), case(64, torch.bfloat16)))
    arguments[name][3] = value
    before = arguments["copy"].clone()
    with pytest.raises(RuntimeError, match=sentence):
        ops.pack_pages(*arguments.values(), False)
    assert torch.equal(arguments["copy"], before)


def test_elements_of_four_bytes_have_no_pairs(ops):
    with pytest.raises(RuntimeError, match="kv_cache: needed contiguous pages"):
        ops.pack_pages(*case(64, torch.float32), True)
