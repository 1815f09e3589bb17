"""Every provider against float32 gather + softmax: other pages for each head, ragged tails, NaN
where nothing may be read.
"""

from itertools import accumulate, pairwise

import pytest
import torch

from specontext_vllm import cpu_kernels
from specontext_vllm.attention import cpu_prefill
from specontext_vllm.attention.cpu import CpuProvider
from specontext_vllm.attention.provider import PrefillRows
from specontext_vllm.attention.reference import TorchProvider
from specontext_vllm.attention.registry import choose_provider
from specontext_vllm.attention.triton import TritonProvider
from specontext_vllm.config import PAGE_SIZE, ConfigError, pages_for
from specontext_vllm.step_data import PageTable, RowQueries
from tests.conftest import CUDA
from tests.paging import assert_close, paged_rows, sliced_rows


def random_table(rows, heads, device, seed, drop_tail=False):
    """A table that keeps random pages of each head, and the set of (block, head) pairs it names."""
    generator = torch.Generator().manual_seed(seed)
    lengths = rows.seq_lens.tolist()
    table = PageTable.allocate(
        len(lengths) + 1, heads, max(map(pages_for, lengths)), rows.cache.device
    )
    table.pages.fill_(int(rows.block_table.max()) * heads)
    kept = {}
    for row, tokens in enumerate(lengths):
        count = pages_for(tokens)
        for head in range(heads):
            n = int(torch.randint(1, count + 1, (1,), generator=generator))
            pages = torch.randperm(count, generator=generator)[:n].sort().values
            if not drop_tail and count - 1 not in pages:
                pages[-1] = count - 1
            used = n * PAGE_SIZE - ((count * PAGE_SIZE - tokens) if pages[-1] == count - 1 else 0)
            sequence = row * heads + head
            table.pages[sequence, :n] = (rows.block_table[row].cpu()[pages] * heads + head).to(
                rows.cache.device
            )
            table.lengths[sequence] = used
            kept[row, head] = torch.cat(
                [
                    torch.arange(p * PAGE_SIZE, min((p + 1) * PAGE_SIZE, tokens))
                    for p in pages.tolist()
                ]
            )
    return table, kept


def reference(query, rows, kept, heads, head_dim, scale, soft_cap=0.0, sinks=None):
    group = query.shape[1] // heads
    out = torch.zeros(query.shape, dtype=torch.float32)
    for (row, head), tokens in kept.items():
        kv = rows.dense[row][head, tokens]
        for g in range(group):
            logits = kv[:, :head_dim] @ query[row, head * group + g].float() * scale
            weight = weights_of(
                logits, soft_cap, None if sinks is None else sinks[head * group + g]
            )
            out[row, head * group + g] = weight @ kv[:, head_dim:]
    return out


def weights_of(logits, soft_cap, sink):
    """The softmax of capped logits ``[..., T]``, beside a logit ``[...]`` that has no value."""
    if soft_cap:
        logits = soft_cap * (logits / soft_cap).tanh()
    if sink is None:
        return logits.softmax(-1)
    return torch.cat((logits, sink.expand(*logits.shape[:-1], 1)), -1).softmax(-1)[..., :-1]


PROVIDERS = [
    pytest.param(TorchProvider, torch.float32, id="torch-fp32"),
    pytest.param(TritonProvider, torch.float32, id="triton-fp32"),
    # Triton's interpreter has no bf16 dot.
    pytest.param(TritonProvider, torch.bfloat16, id="triton-bf16", marks=pytest.mark.gpu),
]


def flash_provider(*arguments):
    from specontext_vllm.attention.flash import FlashAttentionProvider

    return FlashAttentionProvider(*arguments)


def xformers_provider(*arguments):
    from specontext_vllm.attention.xformers import XformersProvider, load_cuda_runtime_12

    load_cuda_runtime_12()
    library = pytest.importorskip("xformers._cpp_lib")
    if not library._built_with_cuda:
        pytest.skip("this xformers was built for another PyTorch or CUDA and refuses every kernel")
    return XformersProvider(*arguments)


PROVIDERS += [
    pytest.param(flash_provider, torch.bfloat16, id="flash-bf16", marks=pytest.mark.gpu),
    # Pages where they lie; with heads of 40 gathered, as in float32.
    pytest.param(xformers_provider, torch.bfloat16, id="xformers-bf16", marks=pytest.mark.gpu),
    pytest.param(xformers_provider, torch.float32, id="xformers-fp32", marks=pytest.mark.gpu),
]


@pytest.mark.parametrize(("provider", "dtype"), PROVIDERS)
@pytest.mark.parametrize(
    ("lengths", "heads", "group", "head_dim"),
    [
        pytest.param([1, 17, 63, 200], 2, 2, 64, id="gqa"),
        pytest.param([100, 31], 4, 1, 32, id="mha"),
        pytest.param([111], 1, 8, 128, id="mqa"),
        pytest.param([33, 5], 2, 3, 40, id="odd"),
    ],
)
@pytest.mark.parametrize("drop_tail", [False, True], ids=["tail-kept", "tail-dropped"])
def test_decode_reads_the_tables_pages_and_nothing_else(
    provider, dtype, lengths, heads, group, head_dim, drop_tail, device
):
    rows = paged_rows(lengths, heads, 2 * head_dim, dtype, device, seed=len(lengths))
    table, kept = random_table(rows, heads, device, seed=11, drop_tail=drop_tail)
    # Whatever the table does not name is poisoned.
    named = torch.zeros(rows.cache.shape[:2], dtype=torch.bool)
    for sequence in range(len(lengths) * heads):
        ids = table.pages[sequence, : pages_for(int(table.lengths[sequence]))].cpu()
        named[ids // heads, ids % heads] = True
    rows.cache[~named.to(device)] = float("nan")
    scale = head_dim**-0.5
    query = torch.randn(len(lengths), heads * group, head_dim).to(dtype)
    output = torch.full(
        (len(lengths), heads * group, head_dim), float("nan"), dtype=dtype, device=device
    )
    attention = provider(heads * group, heads, head_dim, scale, dtype)
    attention.plan(table, len(lengths))
    attention.decode(sliced_rows(query.to(device)), rows.cache, table, len(lengths), output)
    expected = reference(query, rows, kept, heads, head_dim, scale)
    assert_close("output", expected, output, 1e-5 if dtype == torch.float32 else 1e-2)


@pytest.mark.parametrize(
    ("provider", "dtype"),
    [p for p in PROVIDERS if "xformers" not in p.id]
    + [
        pytest.param(CpuProvider, dtype, id=f"cpu-{name}")
        for name, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16))
        if not CUDA
    ],
)
@pytest.mark.parametrize(
    ("lengths", "new", "heads", "group", "head_dim"),
    [
        # A row without drafts among others, whose tokens lie on two pages; a row of padding.
        pytest.param([70, 33, 200, 1], [4, 2, 1, 0], 2, 2, 64, id="gqa"),
        # All that the row has is new.
        pytest.param([4, 17, 35], [4, 4, 4], 4, 1, 32, id="mha-uniform"),
        # Parts that only the last queries read anything of.
        pytest.param([1030, 1026], [8, 3], 1, 5, 40, id="mqa-odd"),
    ],
)
def test_each_of_a_row_s_tokens_reads_the_list_up_to_itself(
    provider, dtype, lengths, new, heads, group, head_dim, device
):
    rows = paged_rows(lengths, heads, 2 * head_dim, dtype, device, seed=len(lengths))
    generator = torch.Generator().manual_seed(4)
    table = PageTable.allocate(len(lengths), heads, max(map(pages_for, lengths)), rows.cache.device)
    # The pages of the new tokens, and some of those before.
    kept = {}
    for row, tokens in enumerate(lengths):
        for head in range(heads):
            own = (tokens - max(new[row], 1)) // PAGE_SIZE
            old = torch.randperm(own, generator=generator)[: (own + 1) // 2].sort().values
            pages = torch.cat((old, torch.arange(own, pages_for(tokens))))
            sequence = row * heads + head
            table.pages[sequence, : len(pages)] = (
                rows.block_table[row].cpu()[pages] * heads + head
            ).to(device)
            places = (pages[:, None] * PAGE_SIZE + torch.arange(PAGE_SIZE)).flatten()
            kept[row, head] = places[places < tokens]
            table.lengths[sequence] = len(kept[row, head]) if new[row] else 0
    named = torch.zeros(rows.cache.shape[:2], dtype=torch.bool)
    for sequence in range(len(lengths) * heads):
        ids = table.pages[sequence, : pages_for(int(table.lengths[sequence]))].cpu()
        named[ids // heads, ids % heads] = True
    rows.cache[~named.to(device)] = float("nan")
    starts = list(accumulate(new, initial=0))
    query = torch.randn(starts[-1], heads * group, head_dim).to(dtype)
    output = torch.full_like(query, float("nan")).to(device)
    attention = provider(heads * group, heads, head_dim, head_dim**-0.5, dtype)
    attention.max_queries = max(new)
    queries = RowQueries(torch.tensor(starts, dtype=torch.int32, device=device), max(new))
    attention.decode(
        sliced_rows(query.to(device)), rows.cache, table, len(lengths), output, queries
    )
    for row, count in enumerate(new):
        for i in range(count):
            seen = {
                (0, head): kept[row, head][: len(kept[row, head]) - (count - 1 - i)]
                for head in range(heads)
            }
            token = starts[row] + i
            rows_of_one = type(rows)(**{**vars(rows), "dense": [rows.dense[row]]})
            expected = reference(
                query[token : token + 1], rows_of_one, seen, heads, head_dim, head_dim**-0.5
            )
            assert_close(
                f"row {row} token {i}",
                expected,
                output[token : token + 1],
                1e-5 if dtype == torch.float32 else 1e-2,
            )


@pytest.mark.parametrize(
    ("lengths", "heads", "dtype"),
    [
        # One sequence in more parts than are combined at a time; a row of padding.
        pytest.param([2100, 0], 1, torch.float32, id="many-parts"),
        pytest.param([2048] * 24, 8, torch.bfloat16, id="full-gpu", marks=pytest.mark.gpu),
        pytest.param([40000, 17, 5000], 8, torch.bfloat16, id="ragged", marks=pytest.mark.gpu),
    ],
)
def test_the_parts_of_a_sequence_are_combined_alike_in_whatever_order_they_end(
    lengths, heads, dtype, device
):
    group, head_dim = 4, 64
    rows = paged_rows(
        [max(tokens, 1) for tokens in lengths], heads, 2 * head_dim, dtype, device, seed=2
    )
    table = PageTable.allocate(len(lengths), heads, max(map(pages_for, lengths)), device)
    kept = {}
    for row, tokens in enumerate(lengths):
        for head in range(heads):
            sequence, pages = row * heads + head, pages_for(tokens)
            table.pages[sequence, :pages] = rows.block_table[row, :pages] * heads + head
            table.lengths[sequence] = tokens
            kept[row, head] = torch.arange(tokens)
    query = torch.randn(len(lengths), heads * group, head_dim).to(dtype)
    attention = TritonProvider(heads * group, heads, head_dim, head_dim**-0.5, dtype)
    attention.warm_up(PageTable.allocate(1, heads, 4, device))
    results = []
    for _ in range(100 if device.type == "cuda" else 3):
        output = torch.full_like(query, float("nan")).to(device)
        attention.decode(query.to(device), rows.cache, table, len(lengths), output)
        results.append(output)
    assert not attention.workspace.ended.any()
    assert_close(
        "output",
        reference(query, rows, kept, heads, head_dim, head_dim**-0.5),
        results[0],
        1e-5 if dtype == torch.float32 else 1e-2,
    )
    assert all(torch.equal(results[0], again) for again in results)
    for row, tokens in enumerate(lengths):
        assert tokens or not results[0][row].any()


CPU_PREFILL = [
    pytest.param(CpuProvider, dtype, id=f"cpu-{name}")
    for name, dtype in (
        ("fp32", torch.float32),
        ("bf16", torch.bfloat16),
        ("fp16", torch.float16),
    )
    if not CUDA
]
LENGTHS, NEW = [40, 100, 17], [40, 33, 1]


CAPS_AND_SINKS = pytest.mark.parametrize(
    ("soft_cap", "has_sinks"),
    [(2.0, False), (0.0, True), (2.0, True)],
    ids=["cap", "sinks", "both"],
)


def make_sinks(heads):
    """Of each head another one: negligible, as heavy as a token, and heavier than all of them."""
    return torch.tensor([-200.0, 0.5, 3.0, 200.0])[torch.arange(heads) % 4]


@pytest.mark.parametrize(
    ("provider", "dtype"),
    [p for p in PROVIDERS if "xformers" not in p.id]
    + ([] if CUDA else [pytest.param(CpuProvider, torch.float32, id="cpu-fp32")]),
)
@CAPS_AND_SINKS
@pytest.mark.parametrize("drafts", [0, 2], ids=["one token", "drafts"])
def test_decode_caps_logits_and_counts_sinks_once_a_head(
    provider, dtype, soft_cap, has_sinks, drafts, device
):
    """Rows of one part and of several; a row of padding."""
    lengths, heads, group, head_dim = [40, 1000, 16], 2, 2, 64
    rows = paged_rows(lengths, heads, 2 * head_dim, dtype, device, seed=6)
    table, kept = random_table(rows, heads, device, seed=12)
    table.lengths[-heads:] = 0
    query = 3 * torch.randn(len(lengths) + 1, heads * group, head_dim)
    query, scale = query.to(dtype), head_dim**-0.5
    sinks = make_sinks(heads * group) if has_sinks else None
    attention = provider(heads * group, heads, head_dim, scale, dtype, soft_cap)
    attention.max_queries = 1 + drafts
    queries = None
    if drafts:
        # One token a row, of as many as there may be.
        starts = torch.arange(len(lengths) + 2, dtype=torch.int32, device=device)
        queries = RowQueries(starts, 1 + drafts)
    output = torch.full_like(query, float("nan")).to(device)
    attention.decode(
        query.to(device),
        rows.cache,
        table,
        len(lengths) + 1,
        output,
        queries,
        None if sinks is None else sinks.to(device),
    )
    expected = reference(query, rows, kept, heads, head_dim, scale, soft_cap, sinks)
    assert_close("output", expected, output, 1e-5 if dtype == torch.float32 else 1e-2)
    plain = reference(query, rows, kept, heads, head_dim, scale)
    assert (expected - plain).abs().max() > 0.1


def prefill_rows(rows, new, device):
    starts = torch.tensor([0, *torch.tensor(new).cumsum(0)], dtype=torch.int32, device=device)
    lengths = rows.seq_lens.tolist()
    return PrefillRows(
        starts, rows.seq_lens, rows.block_table, max(new), max(lengths), starts.tolist()
    )


def causal_reference(query, rows, new, group, head_dim, soft_cap=0.0, sinks=None):
    """``[N, num_heads, D]`` float32: each row's query tokens over its context."""
    found, at = [], 0
    for kv, count in zip(rows.dense, new, strict=True):
        kv, tokens = kv.repeat_interleave(group, 0), kv.shape[1]
        q = query[at : at + count].float().transpose(0, 1)
        scores = q @ kv[..., :head_dim].transpose(1, 2) * head_dim**-0.5
        causal = torch.ones(count, tokens, dtype=torch.bool).tril(tokens - count)
        if soft_cap:
            scores = soft_cap * (scores / soft_cap).tanh()
        own = None if sinks is None else sinks[:, None, None]
        weights = weights_of(scores.masked_fill(~causal, float("-inf")), 0.0, own)
        found.append((weights @ kv[..., head_dim:]).transpose(0, 1))
        at += count
    return torch.cat(found)


@pytest.mark.parametrize(
    ("provider", "dtype"),
    [p for p in PROVIDERS if "triton" not in p.id]
    + [
        pytest.param(TritonProvider, torch.float32, id="triton-fp32", marks=pytest.mark.gpu),
        *CPU_PREFILL,
    ],
)
def test_prefill_is_causal_attention_over_the_whole_context(provider, dtype, device):
    heads, group, head_dim = 2, 2, 64
    rows = paged_rows(LENGTHS, heads, 2 * head_dim, dtype, device, seed=5)
    query = torch.randn(sum(NEW), heads * group, head_dim).to(dtype)
    output = torch.full_like(query, float("nan")).to(device)
    attention = provider(heads * group, heads, head_dim, head_dim**-0.5, dtype)
    attention.prefill(query.to(device), rows.cache, prefill_rows(rows, NEW, device), output)
    expected = causal_reference(query, rows, NEW, group, head_dim)
    # vLLM's Triton attention multiplies float32 on tf32 units.
    exact = dtype == torch.float32 and provider in (TorchProvider, CpuProvider)
    for row, (at, end) in enumerate(pairwise(accumulate(NEW, initial=0))):
        assert_close(f"row {row}", expected[at:end], output[at:end], 1e-5 if exact else 1e-2)


@pytest.mark.parametrize(
    ("provider", "dtype"),
    [p for p in PROVIDERS if "triton" not in p.id and "xformers" not in p.id]
    + [
        pytest.param(TritonProvider, torch.float32, id="triton-fp32", marks=pytest.mark.gpu),
        *CPU_PREFILL,
    ],
)
@CAPS_AND_SINKS
def test_prefill_caps_logits_and_counts_sinks(provider, dtype, soft_cap, has_sinks, device):
    heads, group, head_dim = 2, 2, 64
    rows = paged_rows(LENGTHS, heads, 2 * head_dim, dtype, device, seed=5)
    query = (3 * torch.randn(sum(NEW), heads * group, head_dim)).to(dtype)
    sinks = make_sinks(heads * group) if has_sinks else None
    output = torch.full_like(query, float("nan")).to(device)
    attention = provider(heads * group, heads, head_dim, head_dim**-0.5, dtype, soft_cap)
    attention.prefill(
        query.to(device),
        rows.cache,
        prefill_rows(rows, NEW, device),
        output,
        None if sinks is None else sinks.to(device),
    )
    expected = causal_reference(query, rows, NEW, group, head_dim, soft_cap, sinks)
    exact = dtype == torch.float32 and provider in (TorchProvider, CpuProvider)
    assert_close("output", expected, output, 1e-5 if exact else 1e-2)


@pytest.mark.parametrize(("provider", "dtype"), CPU_PREFILL)
@pytest.mark.parametrize(
    ("lengths", "new", "heads", "group", "head_dim"),
    [
        pytest.param([300, 5, 129, 64], [300, 5, 129, 64], 1, 8, 128, id="from-the-start"),
        pytest.param([2500], [470], 3, 3, 64, id="long-history"),
        pytest.param([127, 33, 400], [1, 0, 111], 2, 1, 32, id="a-row-without-tokens"),
        # Packed in units of 16.
        pytest.param([200, 77], [63, 77], 2, 2, 80, id="heads-of-80"),
        # vLLM's attention does not take these.
        pytest.param([200, 77], [63, 77], 2, 2, 40, id="heads-of-40"),
    ],
)
def test_prefill_on_a_cpu(provider, dtype, lengths, new, heads, group, head_dim, monkeypatch):
    cpu = torch.device("cpu")
    rows = paged_rows(lengths, heads, 2 * head_dim, dtype, cpu, seed=7)
    query = torch.randn(sum(new), heads * group, head_dim).to(dtype)
    attention = provider(heads * group, heads, head_dim, head_dim**-0.5, dtype)
    expected = causal_reference(query, rows, new, group, head_dim)
    ratio = 1e-5 if dtype == torch.float32 else 5e-3

    def attend():
        output = torch.full_like(query, float("nan"))
        attention.prefill(sliced_rows(query), rows.cache, prefill_rows(rows, new, cpu), output)
        assert_close("output", expected, output, ratio)
        return output

    first = attend()
    assert (attention.dense is None) == (head_dim == 40)
    if attention.dense is None:
        return
    # Nothing that other rows have left in the copy is read.
    attention.dense._copy.fill_(float("nan"))
    assert torch.equal(first, attend())
    # Less room than for two of the rows: they attend one after the other.
    attention = provider(heads * group, heads, head_dim, head_dim**-0.5, dtype)
    monkeypatch.setattr(cpu_prefill, "COPY_BYTES", 1)
    attend()
    longest = -(-max(lengths) // cpu_prefill.BLOCK_SIZE)
    assert len(attention.dense._copy) == longest


@pytest.mark.parametrize(
    ("isa", "head_dim", "dtype"),
    [
        ("vec", 64, torch.bfloat16),
        ("vec", 128, torch.float32),
        ("vec16", 80, torch.float16),
        ("amx", 64, torch.bfloat16),
    ],
)
def test_our_packing_is_vllm_s(isa, head_dim, dtype, monkeypatch):
    if not cpu_kernels.available():
        pytest.skip(str(cpu_kernels.why_not()))
    if isa == "amx" and not torch.cpu._is_avx512_bf16_supported():
        pytest.skip("vLLM's build for this CPU has no packing for matrix units")
    cpu, lengths, new = torch.device("cpu"), [300, 5, 129, 64], [1, 5, 100, 64]
    rows = paged_rows(lengths, 2, 2 * head_dim, dtype, cpu, seed=7)
    dense = CpuProvider(4, 2, head_dim, 1.0, dtype).dense
    assert dense is not None and set(cpu_prefill.IN_PAIRS) >= {dense.isa}
    dense.isa = isa
    step = prefill_rows(rows, new, cpu)
    (group,) = dense._groups(tuple(step.offsets), tuple(lengths))

    def packed():
        dense._copy_context(rows.cache, step.block_table, group)
        taken, dense._copy = dense._copy, torch.empty(0, *dense._copy.shape[1:], dtype=dtype)
        assert taken[: group.num_blocks].isfinite().all()
        return taken

    ours = packed()
    monkeypatch.setattr(cpu_kernels, "available", lambda: False)
    assert torch.equal(ours, packed())


@pytest.mark.parametrize("name", ["flash", "triton", "xformers"])
def test_a_provider_that_needs_a_gpu_is_refused_on_a_cpu(name):
    with pytest.raises(ConfigError, match=f"attention_provider: found '{name}'"):
        choose_provider(name, 4, 2, 64, 0.1, torch.float32, "cpu")


@pytest.mark.gpu
def test_xformers_reads_pages_where_they_lie_if_it_can():
    assert xformers_provider(8, 2, 128, 0.1, torch.bfloat16).paged
    assert not xformers_provider(8, 2, 40, 0.1, torch.bfloat16).paged
    assert not xformers_provider(8, 2, 128, 0.1, torch.float32).paged


@pytest.mark.gpu
@pytest.mark.parametrize("provider", [TritonProvider, xformers_provider])
def test_a_captured_decode_follows_the_table(provider):
    device, heads, group, head_dim = torch.device("cuda"), 2, 4, 64
    rows = paged_rows([100, 200], heads, 2 * head_dim, torch.bfloat16, device, seed=3)
    table, kept = random_table(rows, heads, device, seed=1)
    query = torch.randn(2, heads * group, head_dim, device=device).to(torch.bfloat16)
    output = torch.full_like(query, float("nan"))
    attention = provider(heads * group, heads, head_dim, head_dim**-0.5, torch.bfloat16)
    attention.plan(table, 2)
    attention.decode(query, rows.cache, table, 2, output)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        attention.decode(query, rows.cache, table, 2, output)
    other, kept = random_table(rows, heads, device, seed=2)
    table.pages.copy_(other.pages)
    table.lengths.copy_(other.lengths)
    output.fill_(float("nan"))
    graph.replay()
    assert_close(
        "output", reference(query.cpu(), rows, kept, heads, head_dim, head_dim**-0.5), output, 1e-2
    )


@pytest.mark.parametrize(
    ("provider", "dtype"),
    [
        PROVIDERS[0],
        pytest.param(flash_provider, torch.bfloat16, id="flash-bf16", marks=pytest.mark.gpu),
        pytest.param(TritonProvider, torch.float32, id="triton-fp32", marks=pytest.mark.gpu),
    ],
)
def test_write_stores_rows_and_skips_padding(provider, dtype, device):
    heads, head_dim = 2, 32
    cache = torch.zeros(5, heads, PAGE_SIZE, 2 * head_dim, dtype=dtype, device=device)
    slots = torch.tensor([3, 40, -1, 16], device=device)
    key, value = (torch.randn(6, heads, head_dim, device=device).to(dtype) for _ in range(2))
    provider(heads, heads, head_dim, 1.0, dtype).write(key, value, cache, slots)
    for row in (0, 1, 3):
        slot = int(slots[row])
        assert torch.equal(
            cache[slot // PAGE_SIZE, :, slot % PAGE_SIZE], torch.cat([key[row], value[row]], -1)
        )
    assert int((cache != 0).any(-1).any(1).sum()) == 3
