"""KV in 8-bit floats: every provider against float64 attention over keys and values that are
rounded the same way; NaN where nothing may be read.
"""

from itertools import accumulate, pairwise

import pytest
import torch

from specontext_vllm import cpu_kernels
from specontext_vllm.attention.cpu import CpuProvider
from specontext_vllm.attention.reference import TorchProvider
from specontext_vllm.attention.registry import choose_provider
from specontext_vllm.attention.triton import TritonProvider
from specontext_vllm.config import PAGE_SIZE, ConfigError, pages_for
from specontext_vllm.float8 import FP8, KVScales, to_float8
from specontext_vllm.step_data import PageTable, RowQueries
from tests.attention.test_providers import (
    flash_provider,
    make_sinks,
    prefill_rows,
    weights_of,
    xformers_provider,
)
from tests.conftest import CUDA
from tests.paging import PagedRows, assert_close, paged_rows, sliced_rows

NAN = 0x7F
"""The byte of the one NaN. Triton's interpreter takes it for 480, which is no less seen."""

SCALES = pytest.mark.parametrize(
    ("key_scale", "value_scale"),
    [pytest.param(1.0, 1.0, id="unscaled"), pytest.param(0.037, 2.5, id="scaled")],
)


def scales_of(key, value, device, query=0.02):
    return KVScales(*(torch.tensor(x, device=device) for x in (key, value, query)))


def stored(kv, scales):
    """``kv [..., 2 * D]`` as the cache has it, and what that stands for, in float64."""
    keys, values = kv.chunk(2, -1)
    keys, values = to_float8(keys, scales.key.cpu()), to_float8(values, scales.value.cpu())
    meant = torch.cat(
        (keys.double() * scales.key.double().cpu(), values.double() * scales.value.double().cpu()),
        -1,
    )
    return torch.cat((keys, values), -1), meant


def float8_rows(lengths, heads, head_dim, scales, device, seed):
    """``paged_rows`` in 8-bit floats; ``dense`` is what its content stands for."""
    rows = paged_rows(lengths, heads, 2 * head_dim, torch.float32, torch.device("cpu"), seed)
    return PagedRows(
        [stored(kv, scales)[1] for kv in rows.dense],
        stored(rows.cache, scales)[0].to(device),
        rows.block_table.to(device),
        rows.seq_lens.to(device),
    )


def attend(query, kv, scale, soft_cap, sink):
    """``query [D]`` over ``kv [T, 2 * D]`` in float64."""
    keys, values = kv.chunk(2, -1)
    return weights_of(keys @ query.double() * scale, soft_cap, sink) @ values


FP32 = [
    pytest.param(TorchProvider, torch.float32, id="torch-fp32"),
    pytest.param(TritonProvider, torch.float32, id="triton-fp32"),
]
ON_A_GPU = [
    pytest.param(TritonProvider, torch.bfloat16, id="triton-bf16", marks=pytest.mark.gpu),
    pytest.param(TritonProvider, torch.float16, id="triton-fp16", marks=pytest.mark.gpu),
]
ON_A_CPU = [
    pytest.param(CpuProvider, dtype, id=f"cpu-{name}")
    for name, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16))
    if not CUDA
]


@pytest.mark.parametrize(("provider", "dtype"), FP32 + ON_A_GPU + ON_A_CPU)
@SCALES
@pytest.mark.parametrize(
    ("lengths", "new", "heads", "group", "head_dim"),
    [
        pytest.param([1, 17, 63, 200], [1, 1, 1, 1], 2, 2, 64, id="gqa"),
        # Drafts, which lie on two pages; a row of padding.
        pytest.param([70, 33, 1030, 1], [4, 2, 1, 0], 2, 2, 64, id="drafts"),
        pytest.param([111], [1], 1, 8, 128, id="mqa"),
        pytest.param([33, 5], [1, 1], 2, 3, 40, id="odd"),
    ],
)
@pytest.mark.parametrize("extras", [False, True], ids=["plain", "sinks-and-cap"])
def test_decode_reads_the_tables_pages_and_no_more(
    provider, dtype, key_scale, value_scale, lengths, new, heads, group, head_dim, extras, device
):
    scales = scales_of(key_scale, value_scale, device)
    rows = float8_rows(lengths, heads, head_dim, scales, device, seed=len(lengths))
    generator = torch.Generator().manual_seed(4)
    table = PageTable.allocate(len(lengths), heads, max(map(pages_for, lengths)), device)
    named = torch.zeros(rows.cache.shape[:2], dtype=torch.bool)
    kept = {}
    for row, tokens in enumerate(lengths):
        for head in range(heads):
            # The pages of the new tokens, and some of those before.
            own = (tokens - max(new[row], 1)) // PAGE_SIZE
            old = torch.randperm(own, generator=generator)[: (own + 1) // 2].sort().values
            pages = torch.cat((old, torch.arange(own, pages_for(tokens))))
            blocks = rows.block_table[row].cpu()[pages]
            sequence = row * heads + head
            table.pages[sequence, : len(pages)] = (blocks * heads + head).to(device)
            places = (pages[:, None] * PAGE_SIZE + torch.arange(PAGE_SIZE)).flatten()
            kept[row, head] = places[places < tokens]
            table.lengths[sequence] = len(kept[row, head]) if new[row] else 0
            named[blocks.long(), head] = bool(new[row])
    rows.cache.view(torch.uint8)[~named.to(device)] = NAN
    starts = list(accumulate(new, initial=0))
    query = (2 * torch.randn(starts[-1], heads * group, head_dim)).to(dtype)
    queries = None
    if max(new) > 1:
        queries = RowQueries(torch.tensor(starts, dtype=torch.int32, device=device), max(new))
    soft_cap, sinks = (3.0, make_sinks(heads * group)) if extras else (0.0, None)
    scale = head_dim**-0.5
    attention = provider(heads * group, heads, head_dim, scale, dtype, soft_cap)
    attention.max_queries, attention.float8_kv = max(new), True
    attention.warm_up(PageTable.allocate(1, heads, 4, device))
    output = torch.full_like(query, float("nan")).to(device)
    attention.decode(
        sliced_rows(query.to(device)),
        rows.cache,
        table,
        len(lengths),
        output,
        queries,
        None if sinks is None else sinks.to(device),
        scales,
    )
    wanted = torch.zeros(query.shape, dtype=torch.float64)
    for (row, head), tokens in kept.items():
        for i in range(new[row]):
            seen = tokens[: len(tokens) - (new[row] - 1 - i)]
            for g in range(head * group, (head + 1) * group):
                wanted[starts[row] + i, g] = attend(
                    query[starts[row] + i, g],
                    rows.dense[row][head, seen],
                    scale,
                    soft_cap,
                    None if sinks is None else sinks[g].double(),
                )
    assert_close("output", wanted, output, 1e-5 if dtype == torch.float32 else 5e-3)


PREFILL = [
    pytest.param(TorchProvider, torch.float32, 1e-5, id="torch-fp32"),
    # It multiplies float32 on tf32 units.
    pytest.param(TritonProvider, torch.float32, 5e-3, id="triton-fp32", marks=pytest.mark.gpu),
    pytest.param(TritonProvider, torch.bfloat16, 1e-2, id="triton-bf16", marks=pytest.mark.gpu),
    # It rounds queries, and the softmax's weights, to 8-bit floats.
    pytest.param(flash_provider, torch.bfloat16, 6e-2, id="flash-bf16", marks=pytest.mark.gpu),
    *(
        pytest.param(CpuProvider, dtype, ratio, id=f"cpu-{name}")
        for name, dtype, ratio in (
            ("fp32", torch.float32, 1e-5),
            ("bf16", torch.bfloat16, 1e-2),
        )
        if not CUDA
    ),
]


@pytest.mark.parametrize(("provider", "dtype", "ratio"), PREFILL)
@SCALES
@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("has_sinks", [False, True], ids=["plain", "sinks"])
def test_prefill_is_causal_attention_over_the_whole_context(
    provider, dtype, ratio, key_scale, value_scale, head_dim, has_sinks, device
):
    lengths, new, heads, group = [40, 300, 17], [40, 33, 1], 2, 2
    scales = scales_of(key_scale, value_scale, device)
    rows = float8_rows(lengths, heads, head_dim, scales, device, seed=5)
    query = (2 * torch.randn(sum(new), heads * group, head_dim)).to(dtype)
    sinks = make_sinks(heads * group) if has_sinks else None
    output = torch.full_like(query, float("nan")).to(device)
    attention = provider(heads * group, heads, head_dim, head_dim**-0.5, dtype)
    attention.prefill(
        sliced_rows(query.to(device)),
        rows.cache,
        prefill_rows(rows, new, device),
        output,
        None if sinks is None else sinks.to(device),
        scales,
    )
    for row, (at, end) in enumerate(pairwise(accumulate(new, initial=0))):
        wanted = torch.stack(
            [
                attend(
                    query[token, head],
                    rows.dense[row][head // group, : lengths[row] - (end - 1 - token)],
                    head_dim**-0.5,
                    0.0,
                    None if sinks is None else sinks[head].double(),
                )
                for token in range(at, end)
                for head in range(heads * group)
            ]
        ).view(end - at, heads * group, head_dim)
        assert_close(f"row {row}", wanted, output[at:end], ratio)


@pytest.mark.parametrize(
    ("provider", "dtype"),
    [
        pytest.param(TorchProvider, torch.float32, id="torch-fp32"),
        pytest.param(TritonProvider, torch.float32, id="triton-fp32", marks=pytest.mark.gpu),
        pytest.param(TritonProvider, torch.bfloat16, id="triton-bf16", marks=pytest.mark.gpu),
        pytest.param(flash_provider, torch.bfloat16, id="flash-bf16", marks=pytest.mark.gpu),
        *ON_A_CPU,
    ],
)
@SCALES
def test_write_divides_and_rounds_and_skips_padding(
    provider, dtype, key_scale, value_scale, device
):
    heads, head_dim = 2, 32
    scales = scales_of(key_scale, value_scale, device)
    cache = torch.zeros(5, heads, PAGE_SIZE, 2 * head_dim, device=device).to(FP8)
    slots = torch.tensor([3, 40, -1, 16], device=device)
    key, value = (10 * torch.randn(2, 6, heads, head_dim)).to(dtype)
    # Beyond the largest; halfway between two numbers; too small for one; not a number.
    key[0, 0, :6] = torch.tensor([1e5, -1e5, 4096.0, 17 * key_scale, 1e-6, float("nan")]).to(dtype)
    value[1, 1, :4] = torch.tensor([3e4, -3e4, 19 * value_scale, float("nan")]).to(dtype)
    provider(heads, heads, head_dim, 1.0, dtype).write(
        key.to(device), value.to(device), cache, slots, scales
    )
    wanted = torch.zeros(5, heads, PAGE_SIZE, 2 * head_dim)
    for row in (0, 1, 3):
        slot = int(slots[row])
        wanted[slot // PAGE_SIZE, :, slot % PAGE_SIZE] = stored(
            torch.cat((key[row], value[row]), -1), scales
        )[0].float()
    torch.testing.assert_close(cache.float().cpu(), wanted, rtol=0, atol=0, equal_nan=True)
    assert wanted.nan_to_num().abs().max() == 448


def test_cpu_kernels_and_the_definition_store_the_same_bytes(monkeypatch):
    """All that two bytes can be, as bfloat16: every rounding and both ends of the range."""
    if CUDA or not cpu_kernels.available():
        pytest.skip("no kernels for CPUs here")
    cpu = torch.device("cpu")
    every = torch.arange(-(2**15), 2**15).to(torch.int16).view(torch.bfloat16)
    key, value = every.view(2, -1, 2, 64)
    slots = torch.randperm(len(key))
    for scale in (1.0, 0.7, 1e-3):
        caches = [torch.zeros(len(key) // PAGE_SIZE, 2, PAGE_SIZE, 128).to(FP8) for _ in range(2)]
        for provider, cache in zip((CpuProvider, TorchProvider), caches, strict=True):
            provider(4, 2, 64, 1.0, torch.bfloat16).write(
                key, value, cache, slots, scales_of(scale, 2 * scale, cpu)
            )
        # Either sign of NaN is one.
        ours, wanted = (cache.float() for cache in caches)
        torch.testing.assert_close(ours, wanted, rtol=0, atol=0, equal_nan=True)
        assert wanted.isnan().any() and wanted.nan_to_num().abs().max() == 448


@pytest.mark.gpu
def test_xformers_is_refused():
    xformers_provider(8, 2, 128, 0.1, torch.bfloat16)
    with pytest.raises(ConfigError, match="found 'xformers', which reads no 8-bit floats"):
        choose_provider("xformers", 8, 2, 128, 0.1, torch.bfloat16, "cuda", float8_kv=True)
