"""The two tiers of one worker's KV: frames on the GPU, a pinned pool on the host, and what moves
between them in a step.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from specontext_vllm.config import PAGE_SIZE, Loading
from specontext_vllm.float8 import KVScales
from specontext_vllm.residency.copy_stream import CopyStream
from specontext_vllm.residency.figures import TierFigures, TierStatus
from specontext_vllm.residency.frames import Changes
from specontext_vllm.residency.host_pool import HostPool
from specontext_vllm.residency.hot_buffers import HotBuffers
from specontext_vllm.residency.hot_size import HotSizePolicy
from specontext_vllm.residency.ledger import Ledger
from specontext_vllm.residency.memory_model import TierPlan
from specontext_vllm.residency.meter import Meter, late_share, miss_rates
from specontext_vllm.residency.moves import Moves
from specontext_vllm.residency.staging import StagedRows, Staging
from specontext_vllm.residency.tables import DeviceTables
from specontext_vllm.residency.transfer import fetch, write
from specontext_vllm.step_data import (
    Misses,
    PageTable,
    RowQueries,
    ScheduledStep,
    Selection,
    StepBatch,
    Stickiness,
)
from specontext_vllm.tier_data import DecodeRows, KVPools, LayerMemory

RETURN_BYTES = 32 * 2**20
"""KV of a returning layer to copy in one step, in addition to what the step before wrote: 0.7 ms on
a PCIe 5 link.
"""


class TieredKV:
    """KV pages of our layers over two tiers.

    A step calls ``follow`` (accounting, tables, layers that move), ``place_rows``, ``resolve``
    (misses, page tables of all layers), ``fetch``, ``stage``; then each layer calls ``write`` and
    reads ``page_table``, and for prompt rows ``prompt_block_table`` or, while it is offloaded,
    ``staged_rows``. Everything is enqueued on the current stream or the side stream; nothing waits
    for the GPU. A captured graph reads every number that may change (resident layers, misses,
    tables) from device memory, so it stays valid when a layer moves.

    Layers are numbered by their position in the caller's list of layers. Pages are of ``PAGE_SIZE``
    tokens (vLLM's kernel blocks); where vLLM's blocks are larger, the caller expands them first.

    Args:
        plan: the memory model's plan.
        num_layers, num_kv_heads, head_dim, dtype: shape of the KV on this worker.
        max_requests: requests in flight, at the most.
        max_rows: rows of the page table, padding of captured graphs included.
        table_pages: its columns.
        max_pages: pages of one request, at the most.
        keep_unreferenced: whether prefix caching is on.
        timed: whether to count late fetches, and by how much they are late.
        order: the layers in the order in which the model reads them; one whose KV others read is
            there again for each of these. None: each once.
        loading: see the setting of that name.
        frames_memory: makes what the frames are allocated in, and nothing else.

    Attributes:
        pools: the KV of both tiers.
        meter: what the kernels count.
        hot_size: the policy that picks the size of the hot buffers.
        copies: the side stream.
    """

    def __init__(
        self,
        plan: TierPlan,
        *,
        num_layers: int,
        num_kv_heads: int,
        head_dim: int,
        dtype: torch.dtype,
        max_requests: int,
        max_rows: int,
        table_pages: int,
        max_pages: int,
        keep_unreferenced: bool,
        timed: bool,
        order: Sequence[int] | None = None,
        loading: Loading = "adaptive",
        frames_memory: Callable[[], AbstractContextManager[Any]] = nullcontext,
        device: torch.device,
    ) -> None:
        self.plan, self.num_layers, self.num_kv_heads = plan, num_layers, num_kv_heads
        self.device, self.loading = device, loading
        page = (num_kv_heads, PAGE_SIZE, 2 * head_dim)
        with frames_memory():
            arena = torch.zeros(1 + plan.frames, *page, dtype=dtype, device=device)
        self._host_pool = HostPool((plan.host_layers, plan.num_pages, *page), dtype, device)
        self.pools = KVPools(arena, self._host_pool.tensor, num_layers - plan.host_layers)
        self.copies = CopyStream(device, num_layers)
        # Frame 0 is the null frame; then come the two staging areas.
        staging = plan.staging_pages
        self._ledger = Ledger(
            num_layers=num_layers,
            num_pages=plan.num_pages,
            frames=np.arange(1 + 2 * staging, 1 + plan.frames),
            host_layers=plan.host_layers,
            hot_pages=plan.hot_pages,
            max_requests=max_requests,
            keep_unreferenced=keep_unreferenced,
            return_pages=max(1, RETURN_BYTES // arena[0].nbytes),
            adaptive=loading == "adaptive",
        )
        self._tables = DeviceTables(
            num_layers=num_layers,
            num_pages=plan.num_pages,
            num_kv_heads=num_kv_heads,
            num_lanes=max_requests,
            hot_pages=plan.hot_pages,
            max_rows=max_rows,
            table_pages=table_pages,
            device=device,
        )
        self.meter = Meter(device)
        self._hot = HotBuffers(
            max_requests,
            num_kv_heads,
            plan.hot_pages,
            max_pages,
            max_rows=max_rows,
            table_pages=table_pages,
            num_layers=num_layers,
            resident=self._tables.tensors.resident,
            counts=self.meter.counts,
            device=device,
        )
        self.hot_size = HotSizePolicy(table_pages, plan.hot_pages)
        self._moves = Moves(self.pools, self._tables, self._hot, self.copies, self.meter.counts)
        self._staging = Staging(
            1,
            staging,
            num_layers=num_layers,
            order=range(num_layers) if order is None else order,
            num_kv_heads=num_kv_heads,
            copies=self.copies,
            fetch_layer=self._moves.fetch_layer,
            device=device,
        )
        mirrored = range(self.pools.first_mirrored, num_layers)
        self._fetch_all_misses = partial(self.fetch_misses, mirrored)
        self._figures = TierFigures(self.meter)
        self._late_counts = self.meter.counts if timed else None
        self._layers: list[LayerMemory] = []
        self._steps = 0

    def bind(self, selection: Selection) -> None:
        """Take over the lengths of ``selection``, which captured graphs read, and compile the
        kernels before a request waits for them.
        """
        tables = self._tables.tensors
        self._layers = [
            LayerMemory(
                layer,
                PageTable(tables.pages[layer], selection.lengths, self.num_kv_heads),
                tables.frames[layer],
                tables.resident,
                self.pools.arena,
                self.pools.mirror(layer),
            )
            for layer in range(self.num_layers)
        ]
        # One row without a lane: the kernels do nothing.
        row = torch.zeros(
            1, self._hot.state.slot_of.shape[2], dtype=torch.int32, device=self.device
        )
        self._resolve(selection, DecodeRows(self._tables.lanes, row[0, :1], row), 1)
        self.fetch(1)
        self._moves.fetch_layer(self.num_layers - 1, self.misses, tables.hot_frames[-1].view(-1))
        self._steps = 0

    def give_back_host_pool(self) -> None:
        """Let the system have the host pool's memory. No request may hold pages, and the device
        must have done all that it was asked for.
        """
        self._host_pool.give_back()

    def start_anew(self) -> None:
        """Take the host pool's memory again, and clear the frames, which have lost what they held.

        Raises:
            HostPoolError: others have the memory now.
        """
        self._host_pool.take_back()
        self.arena.zero_()

    # -- once a step

    def follow(self, step: ScheduledStep) -> None:
        """Follow what the scheduler decided for a step; see ``Ledger.follow``.

        Raises:
            RuntimeError: a layer of a step before waited for its misses in vain.
        """
        self.copies.check()
        news = self.meter.poll()
        hot_limit = None
        rates = None if news is None else miss_rates(news)
        if news is not None and rates is not None and self.loading == "adaptive":
            self.hot_size.observe(*rates, late_share(news))
            hot_limit = self.hot_size.choose(self._ledger)
        self.apply(self._ledger.follow(step, hot_limit))

    def apply(self, changes: Changes) -> None:
        """Bring the device up to the ledger."""
        self._moves.apply(changes, self._ledger.resident)

    def place_rows(self, names: Sequence[str], table_rows: int) -> None:
        """Note which request each decode row is; the rows after them are padding."""
        lanes = self._ledger.requests.lanes
        self._tables.place_rows([lanes[name] for name in names] + [-1] * (table_rows - len(names)))

    def resolve(self, selection: Selection, batch: StepBatch) -> None:
        """Find the step's misses and write every layer's page table. Runs on the device alone, so a
        graph may hold it; ``batch.table_rows`` must be at least 1.

        Args:
            selection: pages counted from the start of their request, those of drafts included.
            batch: the rows without their drafts.
        """
        if self.loading == "plain":
            self._hot.forget()
        rows = DecodeRows(self._tables.lanes, batch.seq_lens, batch.block_table)
        self._resolve(selection, rows, batch.table_rows)

    def fetch(self, table_rows: int) -> None:
        """Start to copy the misses that ``resolve`` found, and after them pages of a layer that is
        on its way back. With no ``table_rows`` nothing was resolved, and no misses are copied.
        """
        if table_rows:
            if self.loading != "plain":
                self.copies.start(self._fetch_all_misses)
            self._steps += 1
        else:
            self.misses.count.zero_()
        # After the misses, which the layers of this step wait for.
        self._moves.copy_returning()

    def stage(self, batch: StepBatch) -> None:
        """Start to bring the history of the step's prompt rows to the offloaded layers."""
        self._staging.stage(batch, self._ledger.resident)

    # -- once a layer

    def write(
        self,
        layer: int,
        key: Tensor,
        value: Tensor,
        slots: Tensor,
        decode_tokens: int,
        queries: RowQueries | None = None,
        scales: KVScales | None = None,
    ) -> None:
        """Write a layer's new tokens, once its misses have arrived.

        Args:
            key, value: ``[>= N, H, D]``.
            slots: ``[N]`` int64 logical slots, ``page * PAGE_SIZE + offset``; negative for padding.
            decode_tokens: leading tokens that belong to decode rows.
            queries: which of these are whose; None: one a row.
            scales: of KV in 8-bit floats.
        """
        memory = self._layers[layer]
        if decode_tokens and memory.mirror is not None:
            self.await_misses(layer)
        write(
            key,
            value,
            slots,
            memory,
            decode_tokens=decode_tokens,
            queries=queries,
            scales=scales,
        )

    def page_table(self, layer: int) -> PageTable:
        """What the layer's decode rows read."""
        return self._layers[layer].table

    def prompt_block_table(self, layer: int, block_table: Tensor) -> Tensor:
        """``[R, W]`` frames of logical pages, in a resident layer."""
        return self._layers[layer].frames[block_table.long()]

    def is_staged(self, layer: int) -> bool:
        """Whether the layer is offloaded, so that its prompt rows read ``staged_rows``."""
        return layer >= self._ledger.resident

    def staged_rows(self, place: int) -> Iterator[StagedRows]:
        """The prompt rows of an offloaded layer, by its place in the order, group by group; see
        ``Staging.rows``.
        """
        return self._staging.rows(place)

    def await_misses(self, layer: int) -> None:
        """Hold the current stream until the layer's misses are there."""
        if self.loading == "plain":
            self.fetch_misses(range(layer, layer + 1))
            return
        self.copies.wait(layer, self._tables.tensors.resident, self._late_counts)

    def fetch_misses(self, layers: range, done: Tensor | None = None) -> None:
        """Copy the step's misses of consecutive mirrored layers, on the current stream.

        Args:
            done: ``[L]`` int32 as in ``CopyProgress``.
        """
        tables = self._tables.tensors
        places = tables.hot_frames[layers.start : layers.stop].flatten(1)
        fetch(self.pools, self.misses, places, tables.resident, layers=layers, done=done)

    def _resolve(self, selection: Selection, rows: DecodeRows, num_rows: int) -> None:
        self._hot.resolve(selection, rows, num_rows)
        self.copies.announce()
        self._tables.write_pages(selection, self._hot.state.slots, rows, num_rows)

    # -- state and figures

    @property
    def arena(self) -> Tensor:
        """``[F, H, P, 2 * D]`` frames on the GPU, which every layer's KV cache is bound to."""
        return self.pools.arena

    @property
    def misses(self) -> Misses:
        """The misses of the last ``resolve``."""
        return self._hot.misses

    @property
    def lanes(self) -> Tensor:
        """``[max_rows]`` int32 lane of each decode row, which it keeps while its request runs."""
        return self._tables.lanes

    def stickiness(self, margin: float) -> Stickiness:
        """What selection needs to prefer pages that lie in hot buffers, by ``margin``."""
        return Stickiness(self._tables.lanes, self._hot.state.slot_of, margin)

    def audit(self) -> dict[str, int]:
        """Check the accounting; see ``Ledger.audit``."""
        return self._ledger.audit()

    def device_tensors(self) -> dict[str, Tensor]:
        """The tensors that grow with the plan and the load, on the GPU, by name."""
        found = {"arena": self.arena, "lanes": self.lanes}
        for group in (self._tables.tensors, self._hot.state, self._hot.misses):
            found |= vars(group)
        return found

    def resize_hot_buffers(self, pages: int) -> None:
        """Give every hot buffer up to ``pages`` slots, until the policy picks another size."""
        changes = Changes()
        self._ledger.limit_hot(pages, changes)
        self.apply(changes)

    @property
    def is_returning(self) -> bool:
        """Whether a layer is on its way back."""
        return self._ledger.is_returning

    def status(self) -> TierStatus:
        """What the host knows without waiting for the device."""
        return TierStatus(
            num_layers=self.num_layers,
            resident_layers=self._ledger.resident,
            moved_layers=self._moves.moved_layers,
            steps=self._steps,
            hot_tokens=self._ledger.hot_limit * PAGE_SIZE,
            free_frames=self._ledger.frames.num_free,
            num_tokens=self.plan.num_pages * PAGE_SIZE,
            host_pool_bytes=self.pools.host.nbytes,
            host_pool_used=self._ledger.used_share,
            head_page_bytes=self.arena[0, 0].nbytes,
            loaded_head_pages=self._moves.loaded_head_pages + self._staging.loaded_head_pages,
        )

    @torch.inference_mode()
    def stats(self, reset: bool = False) -> dict[str, int | float]:
        """Figures since the last reset; waits for the device.

        ``hit_rate``: share of the selected head pages that lay in their hot buffer;
        ``fetched_bytes``: copied for misses; ``loaded_bytes``: copied from the host pool for layers
        that moved, prefix hits and the history of prompt rows; ``late_share``: share of the layers'
        fetches that ended after their layer was ready, ``late_us`` by how much on average;
        ``hot_tokens``: size of a hot buffer now; ``host_pool_used``: share of the logical pages
        that running requests hold.
        """
        return self._figures.stats(self.status(), reset)

    def report(self) -> str | None:
        """One line for the log on the steps since the last report; see ``TierFigures.report``."""
        return self._figures.report(self.status(), with_lateness=self.device.type == "cuda")
