"""Compiles every kernel of the package for GPUs that need not be there, through the functions that
launch them; prints what each takes.

    python -m tests.kernels.compile_kernels 86 90       # compute capabilities times ten

A process of its own, since Triton's interpreter must be off. It forks one for each capability:
Triton keeps compiled kernels by device, not by target.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import sys
import traceback
from dataclasses import dataclass
from itertools import product
from typing import Any

os.environ.pop("TRITON_INTERPRET", None)  # before Triton is imported

import torch
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction

from specontext_vllm.float8 import FP8, KVScales
from specontext_vllm.step_data import Misses, PageTable, RowQueries, Selection, Stickiness
from specontext_vllm.tier_data import (
    CopyProgress,
    DecodeRows,
    HotState,
    LayerMemory,
    TierTables,
)
from specontext_vllm.triton_kernels.counters import COUNTERS
from specontext_vllm.triton_kernels.driven_scores import driven_scores
from specontext_vllm.triton_kernels.fetch_pages import await_pages, fetch_pages
from specontext_vllm.triton_kernels.head_input import add_own_states, head_input
from specontext_vllm.triton_kernels.head_rope import rope_and_cache
from specontext_vllm.triton_kernels.kept_mass import add_kept_mass
from specontext_vllm.triton_kernels.layer_tables import layer_tables
from specontext_vllm.triton_kernels.page_bounds import score_bounds, update_bounds
from specontext_vllm.triton_kernels.page_weights import page_weights
from specontext_vllm.triton_kernels.resolve_pages import resolve_pages
from specontext_vllm.triton_kernels.row_starts import row_starts
from specontext_vllm.triton_kernels.score_pages import score_pages
from specontext_vllm.triton_kernels.select_pages import select_pages
from specontext_vllm.triton_kernels.sparse_decode import WIDE_TILE, SplitWorkspace, sparse_decode
from specontext_vllm.triton_kernels.write_tiered import write_tiered

PAGE, BLOCKS, LAYERS, HOT, WIDTH = 16, 8, 2, 256, 8192
DRAFTED = 4
"""Query tokens of a row with three drafts."""


@dataclass(frozen=True)
class Shape:
    """Of a model's attention and of its head, whose query heads are as many here."""

    queries: int
    kv_heads: int
    head_dim: int
    hidden: int
    dtype: torch.dtype


SHAPES = {
    "Llama-3.1-8B": Shape(32, 8, 128, 4096, torch.bfloat16),
    "the demo model": Shape(4, 2, 64, 256, torch.float32),
    "16 query heads a KV head, of 96": Shape(32, 2, 96, 3072, torch.float16),
}


WHOLE, FIRST = 90, 120
"""For ``WHOLE`` every kernel is compiled in every shape. For the others a kernel without matrix
products is compiled in the first shape alone: elementwise code hangs on the GPU in bfloat16 and
8-bit floats only, and the first shape has both. For ``FIRST`` all are: its matrix products take as
much shared memory as those of 86, whose limit is the same.
"""


class AbsentGPU:
    """Triton's driver of a GPU that only its compiler needs to know."""

    def __init__(self, capability: int) -> None:
        self.capability = capability

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.capability, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


def compile_for(capability: int) -> list[dict[str, Any]]:
    """One entry per kernel and shape: ``kernel``, ``shape``, ``shared`` (bytes of shared memory a
    program), ``products`` (whether it multiplies matrices, whose code hangs on the GPU).
    """
    compiled: list[dict[str, Any]] = []
    same_elsewhere: set[str] = set()

    def launcher(kernel: JITFunction, grid: Any) -> Any:
        def launch(*arguments: Any, **options: Any) -> None:
            if kernel.__name__ in same_elsewhere:
                return
            made = kernel.run(*arguments, grid=grid, warmup=True, **options)
            assert made.metadata.target.arch == capability
            entry = {
                "kernel": kernel.__name__,
                "shape": name,
                "shared": made.metadata.shared,
                "products": "tt.dot" in made.asm["ttir"],
            }
            compiled.append(entry)

        return launch

    driver.set_active(AbsentGPU(capability))
    JITFunction.__getitem__ = launcher
    for name, shape in list(SHAPES.items())[: 1 if capability == FIRST else None]:
        # What a choice adds to a kernel is the same for each shape and GPU; their code is long to
        # compile, and shortest for few query heads a KV head.
        launch_all(
            shape,
            eight_bits=capability >= 89,
            choices=(capability, shape) == (WHOLE, SHAPES["the demo model"]),
            # The tile that takes most shared memory.
            wide=shape is SHAPES["Llama-3.1-8B"],
        )
        if capability != WHOLE:
            same_elsewhere = {entry["kernel"] for entry in compiled if not entry["products"]}
    return compiled


def attempt(capability: int) -> list[dict[str, Any]] | str:
    """What ``compile_for`` gives, or how it failed."""
    try:
        return compile_for(capability)
    except Exception:
        return traceback.format_exc()


def launch_all(shape: Shape, eight_bits: bool, choices: bool, wide: bool) -> None:
    """Every launching function with tensors of the shape; ``eight_bits``: 8-bit keys of the head,
    too; ``choices``: selections without held pages or fallback, too; ``wide``:
    as many query tokens a row as make a wide tile, too.
    """
    h, g, d, e, dtype = (
        shape.kv_heads,
        shape.queries // shape.kv_heads,
        shape.head_dim,
        shape.hidden,
        shape.dtype,
    )
    rows, kept = 2, 128
    resident, count, epoch = cells(1), cells(1), cells(1)
    counts = torch.zeros(COUNTERS, dtype=torch.int64)
    positions, slots = torch.zeros(rows, dtype=torch.int64), torch.zeros(rows, dtype=torch.int64)
    block_table, seq_lens, starts, lanes = cells(rows, WIDTH), cells(rows), cells(rows), cells(rows)
    queries = torch.zeros(rows, h * g, d, dtype=dtype)
    page_max, page_lse = torch.zeros(h * g, 64), torch.zeros(h * g, 64)
    pages, lengths = cells(rows * h, kept), cells(rows * h)
    some = {"first_row": 0, "num_rows": rows, "max_pages": WIDTH, "min_pages": cells(rows)}

    head_input(
        torch.zeros(rows, e, dtype=dtype),
        torch.zeros(BLOCKS, e, dtype=dtype),
        block_table,
        positions,
        *torch.ones(2, e, dtype=dtype),
        1e-5,
        PAGE,
    )
    key_inputs = torch.zeros(rows, 3 * e, dtype=dtype)
    add_own_states(
        torch.zeros(rows, e, dtype=dtype),
        slots,
        torch.ones(e, dtype=dtype),
        torch.zeros(BLOCKS, e, dtype=dtype),
        key_inputs[:, 2 * e :],
        1e-5,
        PAGE,
    )
    projected, cos_sin = torch.zeros(rows, h * g * d, dtype=dtype), torch.zeros(64, d)
    rope_and_cache(projected, cos_sin, positions, slots, None, h * g, None, 1e-5)
    for key_dtype in (dtype, torch.float8_e4m3fn) if eight_bits else (dtype,):
        keys = torch.zeros(BLOCKS, h, PAGE, d).to(key_dtype)
        for norm in (None, torch.ones(h * g + h, d, dtype=dtype)):
            rope_and_cache(
                torch.zeros(rows, (h * g + h) * d, dtype=dtype),
                torch.zeros(64, d),
                positions,
                slots,
                keys,
                h * g,
                norm,
                1e-5,
            )
        for keyless in (0, 1)[: 2 if choices else 1]:
            score_pages(
                queries,
                keys,
                block_table,
                seq_lens,
                starts,
                page_max,
                page_lse,
                **some,
                keyless=keyless,
            )
    sticky = Stickiness(lanes, cells(rows, h, WIDTH), 0.5)
    # The last is of a head with queries for groups of layers, one query each.
    for stickiness, groups in ((None, 1), (sticky, 1), (None, g))[0 if choices else 1 :]:
        for threshold in (None, 0.5)[0 if choices else 1 :]:
            select_pages(
                page_max,
                page_lse,
                cells(groups * h, 64),
                seq_lens,
                starts,
                block_table,
                cells(groups * rows * h, kept),
                cells(groups * rows * h),
                torch.zeros(rows, groups * h),
                page_size=PAGE,
                num_kv_heads=h,
                groups=groups,
                first_row=0,
                num_rows=rows,
                max_pages=WIDTH,
                totals=cells(rows),
                sink_pages=1,
                recent_pages=5,
                fallback_threshold=threshold,
                stickiness=stickiness,
            )

    driven_scores(
        torch.zeros(BLOCKS, h),
        *torch.zeros(2, dtype=torch.int64).split(1),
        block_table,
        seq_lens,
        starts,
        page_max,
        page_size=PAGE,
        **some,
    )
    page_weights(
        torch.zeros(1, h * g, 64, d, dtype=dtype),
        torch.zeros(1, h, 64, d, dtype=dtype),
        cells(1, 64),
        d**-0.5,
        PAGE,
    )
    row_starts(seq_lens, 0, rows, PAGE)
    add_kept_mass(
        torch.zeros(rows, h),
        seq_lens,
        torch.zeros(11),
        *torch.zeros(12, dtype=torch.float64).split([1, 11]),
    )

    kv_cache, bounds = (
        torch.zeros(BLOCKS, h, PAGE, 2 * d, dtype=dtype),
        torch.zeros(BLOCKS, h, 2, d, dtype=dtype),
    )
    stored = [(kv_cache, None)]
    if eight_bits:
        stored.append((kv_cache.to(FP8), KVScales(*torch.ones(3, 1))))
    for cache, _ in stored:
        update_bounds(cache, slots, bounds)
    score_bounds(queries, bounds, block_table, seq_lens, starts, page_max, page_size=PAGE, **some)
    kv_pages, scale = kv_cache.view(BLOCKS * h, PAGE, 2 * d), d**-0.5
    # What 8 bits add is the same for each shape; this one is compiled for each GPU.
    decoded = stored if dtype == torch.bfloat16 else stored[:1]
    tokens = [1, DRAFTED] if choices else [1]
    if wide:
        tokens.append(WIDE_TILE // g)
    for most, (cache, scales) in product(tokens, decoded):
        sparse_decode(
            queries.repeat(most, 1, 1),
            cache.view(kv_pages.shape),
            pages,
            lengths,
            torch.zeros_like(queries).repeat(most, 1, 1),
            scale,
            SplitWorkspace.allocate(96, g * most, d, torch.device("cpu")),
            None if most == 1 else RowQueries(cells(rows + 1), most),
            scales=scales,
        )
    if choices:
        sparse_decode(
            queries,
            kv_pages,
            pages,
            lengths,
            torch.zeros_like(queries),
            scale,
            SplitWorkspace.allocate(96, g, d, torch.device("cpu")),
            soft_cap=50.0,
            sinks=torch.zeros(g * h),
        )

    hot, words = cells(LAYERS, rows, HOT), PAGE * 2 * d * dtype.itemsize // 4
    selection = Selection(pages, lengths, torch.zeros(rows, h))
    decode_rows = DecodeRows(lanes, seq_lens, block_table)
    misses = Misses(cells(64), cells(64), count)
    state = HotState(
        capacity=cells(rows),
        slot_of=cells(rows, h, WIDTH),
        page_of=cells(rows, h, HOT),
        source_of=cells(rows, h, HOT),
        stamp=cells(rows, h, HOT).long(),
        step=cells(1).long(),
        slots=cells(rows * h, kept),
        order=cells(rows * h, HOT),
    )
    resolve_pages(
        selection,
        decode_rows,
        state,
        misses,
        resident=resident,
        counts=counts,
        num_layers=LAYERS,
        num_rows=rows,
        page_size=PAGE,
    )
    tables = TierTables(resident, cells(LAYERS, BLOCKS), hot, cells(LAYERS, rows * h, kept))
    layer_tables(
        selection,
        state.slots,
        decode_rows,
        tables,
        num_rows=rows,
        num_kv_heads=h,
        page_size=PAGE,
    )
    new = torch.zeros(rows, h, d, dtype=dtype)
    for done in (None, cells(LAYERS)):
        fetch_pages(
            cells(64, words),
            cells(64, words),
            misses,
            cells(LAYERS, 64),
            resident,
            layers=range(LAYERS),
            first_source=0,
            layer_sources=32,
            num_kv_heads=h,
            done=done,
        )
    for counted in (None, counts):
        progress = CopyProgress(cells(LAYERS), epoch, cells(1))
        await_pages(progress, resident, counted, layer=1, seconds=20)
    drafted = RowQueries(cells(rows + 1), 4)
    for (cache, scales), mirrored, queries in product(stored, (False, True), (None, drafted)):
        if queries is not None and not mirrored:
            continue
        write_tiered(
            new,
            new,
            slots,
            LayerMemory(
                layer=0,
                table=PageTable(tables.pages[0], lengths, h),
                frames=cells(BLOCKS),
                resident=resident,
                arena=cache,
                mirror=cache if mirrored else None,
            ),
            decode_tokens=1,
            queries=queries,
            scales=scales,
        )


def cells(*shape: int) -> Tensor:
    return torch.zeros(shape, dtype=torch.int32)


if __name__ == "__main__":
    capabilities = [int(argument) for argument in sys.argv[1:]]
    with multiprocessing.get_context("fork").Pool(len(capabilities)) as pool:
        print(json.dumps(dict(zip(sys.argv[1:], pool.map(attempt, capabilities, chunksize=1)))))
