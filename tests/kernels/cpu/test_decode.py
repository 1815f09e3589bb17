"""Page-sparse decode attention and cache writes in C++ against gather and softmax in float64."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from specontext_vllm.config import PAGE_SIZE, pages_for
from tests.paging import assert_close, sliced_rows

DTYPES = {torch.float32: 1e-5, torch.bfloat16: 4e-3, torch.float16: 5e-4}
"""Relative error: of the sums, or of the output's own rounding."""


@dataclass
class Case:
    """Sequences of random head pages; everything that no sequence names is NaN."""

    query: torch.Tensor
    pages: torch.Tensor
    table: torch.Tensor
    lengths: torch.Tensor
    scale: float

    @classmethod
    def make(cls, lengths, group, width, dtype, seed):
        """``lengths [rows][H]`` tokens."""
        generator = torch.Generator().manual_seed(seed)
        rows, heads = len(lengths), len(lengths[0])
        flat = [tokens for row in lengths for tokens in row]
        counts = [pages_for(tokens) for tokens in flat]
        names = torch.randperm(sum(counts) + 3, generator=generator)
        pages = torch.full((len(names), PAGE_SIZE, 2 * width), float("nan")).to(dtype)
        # What lies beyond a sequence in the table must not be looked at either.
        table = torch.full((len(flat), max(counts) + 1), 2**30, dtype=torch.int32)
        start = 0
        for sequence, (tokens, count) in enumerate(zip(flat, counts, strict=True)):
            ids = names[start : start + count]
            start += count
            table[sequence, :count] = ids
            kv = torch.full((count * PAGE_SIZE, 2 * width), float("nan"))
            kv[:tokens] = torch.randn(tokens, 2 * width, generator=generator)
            pages[ids] = kv.view(count, PAGE_SIZE, 2 * width).to(dtype)
        query = torch.randn(rows, heads * group, width, generator=generator).to(dtype)
        lens = torch.tensor(flat, dtype=torch.int32)
        return cls(query, pages, table, lens, float(width**-0.5))

    def run(self, ops, soft_cap=0.0, sinks=None):
        output = torch.full(self.query.shape, float("nan"), dtype=self.query.dtype)
        query = sliced_rows(self.query)
        ops.sparse_decode(
            query, self.pages, self.table, self.lengths, output, self.scale, soft_cap, sinks
        )
        return output

    def expected(self, soft_cap=0.0, sinks=None):
        rows, query_heads, width = self.query.shape
        heads = len(self.lengths) // rows
        group = query_heads // heads
        output = torch.zeros(rows, query_heads, width, dtype=torch.float64)
        for sequence, tokens in enumerate(self.lengths.tolist()):
            if tokens == 0:
                continue
            row, head = divmod(sequence, heads)
            ids = self.table[sequence, : pages_for(tokens)].long()
            keys, values = self.pages[ids].flatten(0, 1)[:tokens].double().split(width, -1)
            for g in range(head * group, (head + 1) * group):
                logits = keys @ self.query[row, g].double() * self.scale
                if soft_cap:
                    logits = soft_cap * (logits / soft_cap).tanh()
                sink = torch.empty(0) if sinks is None else sinks[g : g + 1]
                weights = torch.cat((logits, sink.double())).softmax(0)[:tokens]
                output[row, g] = weights @ values
        return output


CASES = [
    pytest.param([[1, 17], [63, 0], [200, 16]], 2, 64, id="ragged"),
    pytest.param([[100, 31, 5, 48]], 1, 32, id="mha"),
    pytest.param([[111]], 8, 128, id="mqa"),
    pytest.param([[1000, 777, 1024]] * 2, 3, 64, id="smollm2"),
    pytest.param([[300, 260]], 7, 40, id="odd"),
    pytest.param([[40, 33]], 5, 80, id="head-80"),
    pytest.param([[70]], 4, 256, id="head-256"),
    pytest.param([[5000, 3]], 2, 72, id="long-parts"),
]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("lengths", "group", "width"), CASES)
def test_decode_is_softmax_over_the_sequence_s_tokens(ops, lengths, group, width, dtype):
    case = Case.make(lengths, group, width, dtype, seed=group)
    assert_close("output", case.expected(), case.run(ops), DTYPES[dtype])


@settings(max_examples=40, deadline=None)
@given(
    lengths=st.integers(1, 3).flatmap(
        lambda heads: st.lists(
            st.lists(st.integers(0, 600), min_size=heads, max_size=heads), min_size=1, max_size=4
        )
    ),
    group=st.integers(1, 9),
    width=st.integers(4, 32).map(lambda eights: 8 * eights),
    dtype=st.sampled_from(list(DTYPES)),
    soft_cap=st.sampled_from([0.0, 1.5, 30.0]),
    with_sinks=st.booleans(),
    seed=st.integers(0, 2**31),
)
def test_decode_of_any_shape(ops, lengths, group, width, dtype, soft_cap, with_sinks, seed):
    case = Case.make(lengths, group, width, dtype, seed)
    sinks = torch.randn(len(lengths[0]) * group) * 3 if with_sinks else None
    expected = case.expected(soft_cap, sinks)
    output = case.run(ops, soft_cap, sinks)
    assert output.isfinite().all()
    assert_close("output", expected, output, DTYPES[dtype])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_result_depends_on_neither_threads_nor_neighbours(ops, dtype, threads):
    lengths = [[1000, 3000], [17, 0], [4100, 900]]
    case = Case.make(lengths, 3, 64, dtype, seed=1)
    results = []
    for number in (1, 2, 3):
        threads(number)
        results.append(case.run(ops))
    assert all(torch.equal(results[0], again) for again in results[1:])
    alone = Case(case.query[2:], case.pages, case.table[4:], case.lengths[4:], case.scale)
    assert torch.equal(alone.run(ops), results[0][2:])


def test_large_logits_do_not_overflow(ops):
    case = Case.make([[400]], 2, 64, torch.float32, seed=3)
    case.query *= 1000
    assert_close("output", case.expected(), case.run(ops), 1e-3)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda c: c.table.fill_(len(c.pages)), "table: found a page that is none of the"),
        (lambda c: c.table.fill_(-1), "table: found a page that is none of the"),
        (lambda c: c.lengths.fill_(10_000), "lengths: found 10000 tokens in a table of"),
        (lambda c: setattr(c, "pages", c.pages.half()), "must have one dtype"),
        (lambda c: setattr(c, "pages", c.pages[..., :-2]), "needed a contiguous"),
        (lambda c: setattr(c, "lengths", c.lengths.long()), "lengths: found Long, needed int32"),
    ],
)
def test_what_cannot_be_is_refused(ops, change, sentence):
    case = Case.make([[100, 40]], 2, 64, torch.float32, seed=3)
    change(case)
    with pytest.raises(RuntimeError, match=sentence):
        case.run(ops)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_write_stores_each_token_and_nothing_else(ops, dtype, threads):
    heads, width = 3, 40
    for number, count in ((1, 5), (2, 900), (3, 900)):
        threads(number)
        cache = torch.full((80, heads, PAGE_SIZE, 2 * width), float("nan"), dtype=dtype)
        slots = torch.randperm(80 * PAGE_SIZE)[:count]
        slots[::7] = -1
        # Slices of a fused projection, and more rows than slots.
        fused = torch.randn(count + 2, 3, heads, width).to(dtype)
        key, value = fused[:, 1], fused[:, 2]
        ops.write_kv(key, value, cache, slots)
        expected = torch.full_like(cache, float("nan"))
        for token, slot in enumerate(slots.tolist()):
            if slot >= 0:
                expected[slot // PAGE_SIZE, :, slot % PAGE_SIZE] = torch.cat(
                    (key[token], value[token]), -1
                )
        torch.testing.assert_close(cache, expected, rtol=0, atol=0, equal_nan=True)


def test_a_write_beyond_the_cache_is_refused(ops):
    cache = torch.zeros(2, 1, PAGE_SIZE, 16)
    key = torch.ones(1, 1, 8)
    with pytest.raises(RuntimeError, match="slots: found one beyond the 32 of the cache"):
        ops.write_kv(key, key, cache, torch.tensor([32]))
    assert not cache.any()
