"""The memory bandwidth of the device, and the time of each stage of a sparse decode step measured
on its own.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch

from benchmarks.shapes import Shape
from benchmarks.standstill import Standstill

ROTATED_CACHES = 4
"""KV caches that attention is timed on in turn: in an engine, the next layer's pages are never in
the L2 cache.
"""


def probe(
    shape: Shape, cells: list[tuple[str, int, int]], budget: int
) -> Iterator[tuple[str, Any]]:
    """Events ``("bandwidth", bytes/s)`` and, per cell ``(name, requests, context)``,
    ``("stages", (name, ms by stage))``.

    A cell that fails gives ``("failed", (name, reason))``.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    with Standstill() as others:
        others.stop_others()
        bandwidth = copy_bandwidth(device)
    yield "bandwidth", bandwidth
    for name, requests, context in cells:
        try:
            yield "stages", (name, measure_stages(shape, requests, context, budget, device))
        except Exception as error:
            yield "failed", (name, f"{type(error).__name__}: {error}"[:500])
        if device.type == "cuda":
            torch.cuda.empty_cache()


def copy_bandwidth(device: torch.device) -> float:
    """Bytes read plus bytes written a second by a large copy within the device's memory (4 GiB; 256
    MiB on a CPU).
    """
    source = torch.empty(
        (4 << 30 if device.type == "cuda" else 256 << 20) // 4, dtype=torch.int32, device=device
    ).random_()
    target = torch.empty_like(source)
    return 2 * source.nbytes / (1e-3 * timed(lambda _: target.copy_(source), device))


def timed(work: Callable[[int], Any], device: torch.device, repeats: int = 30) -> float:
    """Milliseconds of one ``work(i)``: the mean over repeats back to back, the median of three such
    rounds.
    """
    if device.type == "cpu":
        repeats = 3
    for i in range(3):
        work(i)
    rounds = []
    for _ in range(3):
        if device.type == "cpu":
            begin = time.perf_counter()
            for i in range(repeats):
                work(i)
            rounds.append(1e3 * (time.perf_counter() - begin) / repeats)
            continue
        start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        torch.cuda.synchronize()
        # The device sleeps (about 50 ms) while the host queues the launches, so that their cost on
        # the host is not timed.
        torch.cuda._sleep(100_000_000)
        start.record()
        for i in range(repeats):
            work(i)
        stop.record()
        torch.cuda.synchronize()
        rounds.append(start.elapsed_time(stop) / repeats)
    return statistics.median(rounds)


@torch.inference_mode()
def measure_stages(
    shape: Shape, requests: int, context: int, budget: int, device: torch.device
) -> dict[str, float]:
    """Milliseconds a decode step of ``requests`` contexts of ``context`` tokens spends in each of
    the plugin's stages.

    ``head``: the head's projections, its K write and the fusing of the aux states; ``scoring``;
    ``selection``: choice of the pages, page table and attention schedule; ``attention``: all
    layers. Each is the plugin's own function, at this shape.
    """
    from specontext_vllm.attention.registry import choose_provider
    from specontext_vllm.config import PAGE_SIZE, SpeContextConfig, pages_for
    from specontext_vllm.retrieval.checkpoint import dummy_checkpoint
    from specontext_vllm.retrieval.head import RetrievalHead
    from specontext_vllm.retrieval.local import LocalRetriever
    from specontext_vllm.retrieval.scoring import ScoreInputs, row_starts
    from specontext_vllm.retrieval.selection import select_rows
    from specontext_vllm.step_data import PageScores, PageTable, Selection, StepBatch

    dtype, heads, kv_heads, d = (
        torch.bfloat16,
        shape.num_attention_heads,
        shape.num_key_value_heads,
        shape.head_dim,
    )
    config = SpeContextConfig(retrieval_head="dummy", budget=budget)
    checkpoint = dummy_checkpoint(
        hidden_size=shape.hidden_size,
        num_layers=shape.num_hidden_layers,
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=d,
        rope_theta=10000.0,
        max_position=shape.max_position_embeddings,
        dtype=dtype,
        seed=0,
    )
    head = RetrievalHead(
        checkpoint, max_position=shape.max_position_embeddings, dtype=dtype, device=device
    )
    embedding = torch.randn(shape.vocab_size, shape.hidden_size, dtype=dtype, device=device)
    width = config.table_pages(shape.max_position_embeddings)
    retriever = LocalRetriever(
        config,
        head,
        lambda ids: torch.nn.functional.embedding(ids, embedding),
        num_kv_heads=kv_heads,
        max_model_len=shape.max_position_embeddings,
        table_pages=width,
        device=device,
        max_rows=requests,
    )
    pages = pages_for(context)
    blocks = requests * pages
    retriever.allocate_cache(blocks)
    cache = retriever.cache
    assert cache is not None
    # In parts: torch draws no 8-bit normal numbers, and all of them in 32 bits would not fit.
    for part in cache.keys.split(4096):
        part.copy_(torch.randn(part.shape, device=device))
    cache.fused.normal_()

    rows = range(requests)
    block_table = torch.randperm(blocks, device=device).view(requests, pages).int()
    position = context - 1
    batch = StepBatch(
        token_ids=torch.randint(shape.vocab_size, (requests,), device=device),
        positions=torch.full((requests,), position, dtype=torch.int64, device=device),
        slots=block_table[:, position // PAGE_SIZE].long() * PAGE_SIZE + position % PAGE_SIZE,
        query_starts=torch.arange(requests + 1, dtype=torch.int32, device=device),
        seq_lens=torch.full((requests,), context, dtype=torch.int32, device=device),
        block_table=block_table,
        seq_lens_bound=[context] * requests,
        num_decodes=requests,
        table_rows=requests,
        num_tokens=requests,
    )
    table = PageTable.allocate(requests, kv_heads, width, device)
    totals, choosing = retriever.row_totals, pages > config.budget_pages
    scores = PageScores.allocate(heads, kv_heads, blocks, device)
    starts = row_starts(batch.seq_lens, rows)
    picked = Selection.into(table)
    aux = [
        torch.randn(requests, shape.hidden_size, dtype=dtype, device=device)
        for _ in range(checkpoint.spec.num_aux)
    ]
    provider = choose_provider(
        config.attention_provider, heads, kv_heads, d, d**-0.5, dtype, device.type
    )
    caches = [
        torch.randn(blocks, kv_heads, PAGE_SIZE, 2 * d, dtype=dtype, device=device)
        for _ in range(ROTATED_CACHES)
    ]
    query = torch.randn(requests, heads, d, dtype=dtype, device=device)
    output = torch.empty_like(query)

    def select(_: int) -> None:
        select_rows(
            scores,
            batch.seq_lens,
            starts,
            block_table,
            picked,
            totals,
            sinks=config.sink_pages,
            recents=config.recent_pages,
            rows=rows,
        )
        provider.plan(table, requests)

    # The head's own entry point, so that the time is that of the fused path of this device.
    step_shape = retriever.shape_step(batch)
    project = timed(lambda _: retriever.project(batch, step_shape), device)
    fuse = timed(lambda _: retriever.learn(batch, requests, aux), device)
    scoring = 0.0
    if choosing:
        inputs = ScoreInputs(
            block_table,
            batch.seq_lens,
            starts,
            rows,
            max_pages=pages,
            min_pages=totals,
            queries=retriever.project(batch, step_shape),
            keys=cache.keys,
        )
        scoring = timed(lambda _: inputs.score_keys(scores), device)
    selection = timed(select, device)
    attention = timed(
        lambda i: provider.decode(query, caches[i % ROTATED_CACHES], table, requests, output),
        device,
    )
    return {
        "head": project + fuse,
        "scoring": scoring,
        "selection": selection,
        "attention": shape.num_hidden_layers * attention,
    }
