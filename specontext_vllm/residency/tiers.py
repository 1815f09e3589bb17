"""Tiered KV of one worker: an arena of frames on the GPU, a pinned host pool behind it, and what
moves between them.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from specontext_vllm.config import PAGE_SIZE, pages_for
from specontext_vllm.residency.host_pool import allocate_host_pool
from specontext_vllm.residency.hot_buffers import HotBuffers
from specontext_vllm.residency.hot_size import HotSizePolicy
from specontext_vllm.residency.ledger import Changes, Ledger, StartedRequest
from specontext_vllm.residency.memory_model import TierPlan
from specontext_vllm.residency.meter import Meter, late_share, miss_rates, ratios
from specontext_vllm.residency.transfer import Copier, fetch, write
from specontext_vllm.triton_kernels.counters import FILLED, MISSED

NULL_FRAME = 0
"""Frame that every unused table entry points at: captured graphs read it when they warm up, nothing
else does.
"""

RETURN_BYTES = 32 * 2**20
"""KV of a returning layer that is copied in one step, beside what the step before wrote: 0.7 ms of
a PCIe 5 link, in a decode step of several.
"""


@dataclass(frozen=True)
class Stage:
    """Prefill rows whose whole context lies in a staging area for one layer.

    Attributes:
        rows: the rows, counted from the first prefill row.
        tokens: their query tokens, counted from the first prefill token.
        block_table: ``[R, W]`` int32 frames of the rows' pages.
        slots: ``[N]`` int64 places of the query tokens in the arena.
    """

    rows: slice
    tokens: slice
    block_table: Tensor
    slots: Tensor


@dataclass(frozen=True)
class _Group:
    """A ``Stage`` before it is known which staging area it gets: all places count from the area's
    start.
    """

    rows: slice
    tokens: slice
    pages: Tensor
    slots: Tensor
    sources: Tensor
    targets: Tensor
    count: Tensor
    head_pages: int


class TieredKV:
    """KV pages of all layers over two tiers.

    A step goes: ``begin_step`` (host books, tables, layers that move), ``resolve`` (misses and the
        layers' page tables),
    ``fetch_misses``, then per layer ``write``, and for prefill rows of an offloaded layer
    ``stages``. All of it is enqueued on the current stream and, for copies, on a side stream;
    nothing waits for the GPU. What a captured decode graph replays reads every number that may
    change (resident layers, misses, tables) from device memory, so a move needs no new graph.

    Args:
        plan: the memory model's plan.
        num_layers, num_kv_heads, head_dim, dtype: shape of the KV on this worker.
        max_requests: most requests in flight.
        max_rows: rows of the page table, padding of captured graphs included.
        table_pages: its columns.
        max_pages: most pages of one request.
        keep_unreferenced: whether prefix caching is on.
        timed: whether to count prefetches that are late, and by how much.
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
        device: torch.device,
    ) -> None:
        self.plan, self.num_layers, self.num_kv_heads, self.device = (
            plan,
            num_layers,
            num_kv_heads,
            device,
        )
        self.first_mirrored = num_layers - plan.host_layers
        page = (num_kv_heads, PAGE_SIZE, 2 * head_dim)
        self.arena = torch.zeros(1 + plan.frames, *page, dtype=dtype, device=device)
        self.host = allocate_host_pool((plan.host_layers, plan.num_pages, *page), dtype, device)
        staging = plan.staging_pages
        areas = torch.arange(1, 1 + 2 * staging, dtype=torch.int32, device=device)
        self._areas = areas[:staging], areas[staging:]
        self.ledger = Ledger(
            num_layers=num_layers,
            num_pages=plan.num_pages,
            frames=np.arange(1 + 2 * staging, 1 + plan.frames),
            host_layers=plan.host_layers,
            hot_pages=plan.hot_pages,
            max_requests=max_requests,
            keep_unreferenced=keep_unreferenced,
            return_pages=max(1, RETURN_BYTES // self.arena[0].nbytes),
        )
        self.resident = torch.full((1,), num_layers, dtype=torch.int32, device=device)
        self.meter = Meter(device)
        self.hot = HotBuffers(
            max_requests,
            num_kv_heads,
            plan.hot_pages,
            max_pages,
            max_rows=max_rows,
            table_pages=table_pages,
            num_layers=num_layers,
            resident=self.resident,
            counts=self.meter.counts,
            device=device,
        )
        self.hot_size = HotSizePolicy(table_pages, plan.hot_pages)

        def cells(*shape: int) -> Tensor:
            return torch.full(shape, NULL_FRAME, dtype=torch.int32, device=device)

        self.frames = cells(num_layers, plan.num_pages)
        self.hot_frames = cells(num_layers, max_requests, plan.hot_pages)
        self.tables = cells(num_layers, max_rows * num_kv_heads, table_pages)
        self.lanes = torch.full((max_rows,), -1, dtype=torch.int32, device=device)
        self._placed = [-1] * max_rows
        self._always = cells(1)
        self._copier = Copier(device, num_layers)
        self._groups: list[_Group] = []
        self._lengths = torch.zeros(max_rows * num_kv_heads, dtype=torch.int32, device=device)
        self._beside: list[Tensor] = []
        """What the side stream may still read."""
        self._returning: tuple[int, np.ndarray] | None = None
        self.steps = self.moved_layers = self.loaded_head_pages = 0
        self._resident_before = num_layers
        self._stats_base = 0, 0, 0
        self._late = self.meter.counts if timed else None
        self._reported = self.meter.seen, 0

    @property
    def head_page_bytes(self) -> int:
        """Bytes of one page of one KV head of one layer."""
        return self.arena[0, 0].nbytes

    @property
    def hot_tokens(self) -> int:
        """Size of a request's hot buffer now, in tokens per KV head."""
        return self.ledger.hot_limit * PAGE_SIZE

    def bind(self, pages: Tensor, lengths: Tensor) -> None:
        """Share the page table's ``pages [max_rows * H, K]`` and ``lengths [max_rows * H]``, which
        captured graphs read, and make ready.
        """
        self._lengths = lengths
        # One row without a lane: nothing happens, but Triton compiles its kernels before a request
        # waits for them.
        row = torch.zeros(1, self.hot.slot_of.shape[2], dtype=torch.int32, device=self.device)
        self.resolve(pages, lengths, row[0, :1], row, 1)
        self.fetch_misses(1)
        self._fetch_one(
            self.num_layers - 1,
            self.hot.sources,
            self.hot.targets,
            self.hot.count,
            self.hot_frames[-1].view(-1),
        )
        self.steps = 0

    # -- once a step
    # ----------------------------------------------------------------------------------------------------

    def begin_step(
        self,
        released: Iterable[str],
        started: Iterable[StartedRequest],
        grown: Iterable[tuple[str, list[int]]],
        decoding: Iterable[str],
        prefilling: Iterable[str] = (),
        written: Iterable[tuple[str, int]] = (),
    ) -> None:
        """Follow the scheduler through one step; see ``Ledger.begin_step``.

        Raises:
            RuntimeError: a layer of a step before has waited for its misses in vain.
        """
        self._copier.check()
        news = self.meter.poll()
        size = None
        if news is not None and (rates := miss_rates(news)) is not None:
            self.hot_size.observe(*rates, late_share(news))
            size = self.hot_size.choose(self.ledger)
        self.follow(
            self.ledger.begin_step(released, started, grown, decoding, size, prefilling, written)
        )

    def follow(self, changes: Changes) -> None:
        """Bring the device up to the ledger: tables first, then fills and loads.

        Raises:
            RuntimeError: the step before had pages to copy and never came to ``fetch_misses``.
        """
        if self._returning is not None:
            raise RuntimeError(
                "specontext: a layer on its way back was not copied in the step before; please "
                "report it."
            )
        # Where no layer was offloaded nothing waited for the copies of the step before, which read
        # these tables.
        self._copier.join()
        self._beside.clear()
        _, pages = self.frames.shape
        _, lanes, slots = self.hot_frames.shape
        self._set(
            self.frames, [(layer * pages + page, frame) for layer, page, frame in changes.frames]
        )
        self._set(
            self.hot_frames,
            [
                ((layer * lanes + lane) * slots + slot, frame)
                for layer, lane, slot, frame in changes.hot
            ],
        )
        if changes.capacities:
            self._set(
                self.hot.capacity,
                [(np.array(list(changes.capacities)), np.array(list(changes.capacities.values())))],
            )
        if changes.trimmed:
            self.hot.trim()
        if changes.lanes:
            self.hot.reset(self._upload(np.array(changes.lanes, np.int64)))
        self.moved_layers += abs(self.ledger.resident - self._resident_before)
        if self.ledger.resident != self._resident_before:
            self._resident_before = self.ledger.resident
            self.resident.fill_(self.ledger.resident)
        if changes.offloaded:
            held = self.hot.contents()
            self.meter.counts[FILLED] += held[2][0] * len(changes.offloaded)
            # Behind these copies the step's misses queue, for which every decode row that reads the
            # layer waits.
            with self._copier.aside():
                for layer in changes.offloaded:
                    self._fetch_one(layer, *held, self.hot_frames[layer].view(-1))
            self._beside += held
        for layer, loaded in changes.loads:
            if layer < self.ledger.resident:
                self._load(layer, *self._page_list(loaded))
        self._returning = changes.returning

    def place_rows(self, names: Sequence[str], table_rows: int) -> None:
        """Note which lane each row of the step has; the rows behind them are padding."""
        lanes = [self.ledger.lanes[name] for name in names] + [-1] * (table_rows - len(names))
        if lanes != self._placed[:table_rows]:
            self._placed[:table_rows] = lanes
            self.lanes[:table_rows].copy_(
                self._upload(np.array(lanes, np.int32)), non_blocking=True
            )

    def resolve(
        self,
        selection: Tensor,
        lengths: Tensor,
        seq_lens: Tensor,
        block_table: Tensor,
        table_rows: int,
    ) -> None:
        """Find the step's misses and write every layer's page table. It reads and writes only the
        device, so a graph may hold it.

        Args:
            selection, lengths: ``[>= table_rows * H, K]``, ``[>= table_rows * H]`` int32; ids are
                ``page * H + head`` with the page counted from the request's start.
            seq_lens, block_table: the step's, logical.
            table_rows: rows with a selection, padding included; at least one.
        """
        self.hot.resolve(selection, lengths, seq_lens, self.lanes, block_table, table_rows)
        self._copier.expect()
        self._write_tables(selection, lengths, block_table, table_rows)

    def fetch_misses(self, table_rows: int) -> None:
        """Start the copies of what ``resolve`` has found, or with no rows forget what it found
        before; behind them those of a layer that comes back.
        """
        if table_rows:
            self._start_copies()
            self.steps += 1
        else:
            self.hot.count.zero_()
        if self._returning is not None:
            # Behind the misses, which are waited for in this step.
            layer, pages = self._returning
            listed = self._page_list(pages)
            with self._copier.aside():
                self._load(layer, *listed)
            self._beside += listed
            self._returning = None

    def _write_tables(
        self, selection: Tensor, lengths: Tensor, block_table: Tensor, rows: int
    ) -> None:
        heads = self.num_kv_heads
        if selection.is_cuda:
            from specontext_vllm.triton_kernels.layer_tables import layer_tables

            layer_tables(
                selection,
                self.hot.slots,
                lengths,
                self.lanes,
                block_table,
                self.frames,
                self.hot_frames,
                self.resident,
                self.tables,
                num_rows=rows,
                num_kv_heads=heads,
                page_size=PAGE_SIZE,
            )
            return
        resident = self.ledger.resident
        for row in range(rows):
            lane = int(self.lanes[row])
            for head in range(heads if lane >= 0 else 0):
                sequence = row * heads + head
                count = pages_for(int(lengths[sequence]))
                blocks = block_table[row, (selection[sequence, :count] // heads).long()].long()
                slots = self.hot.slots[sequence, :count].long()
                self.tables[:resident, sequence, :count] = (
                    self.frames[:resident, blocks] * heads + head
                )
                self.tables[resident:, sequence, :count] = (
                    self.hot_frames[resident:, lane, slots] * heads + head
                )

    def begin_prefill(
        self,
        block_table: Tensor,
        positions: Tensor,
        seq_lens: Sequence[int],
        query_lens: Sequence[int],
    ) -> None:
        """Plan how the step's prefill rows pass through the staging areas, and fill the first;
        nothing when no layer is offloaded.

        Args:
            block_table: ``[R, W]`` int32 of the prefill rows. positions: ``[N]`` of their query
                tokens.
            seq_lens, query_lens: R host integers each.
        """
        self._groups = []
        if self.ledger.resident == self.num_layers:
            return
        first = tokens = 0
        while first < len(seq_lens):
            last, held = first, 0
            while last < len(seq_lens) and held + pages_for(seq_lens[last]) <= len(self._areas[0]):
                held += pages_for(seq_lens[last])
                last += 1
            span = slice(first, last)
            count = sum(query_lens[span])
            self._groups.append(
                self._group(
                    block_table[span],
                    positions[tokens : tokens + count],
                    seq_lens[span],
                    query_lens[span],
                    span,
                    tokens,
                )
            )
            first, tokens = last, tokens + count
        if self._groups:
            self._copier.fork()
            self._stage(0)
            self._stage(1)

    def _group(
        self,
        block_table: Tensor,
        positions: Tensor,
        seq_lens: Sequence[int],
        query_lens: Sequence[int],
        rows: slice,
        first_token: int,
    ) -> _Group:
        heads, device = self.num_kv_heads, self.device
        pages = [pages_for(n) for n in seq_lens]
        offsets = np.concatenate([[0], np.cumsum(pages)])[:-1]
        history = [pages_for(n - q) for n, q in zip(seq_lens, query_lens, strict=True)]
        owner = np.repeat(np.arange(len(pages)), history)
        page = np.concatenate([np.arange(n) for n in history]) if sum(history) else np.zeros(0, int)
        head = torch.arange(heads, dtype=torch.int32, device=device)
        blocks = block_table[
            self._upload(owner.astype(np.int64)), self._upload(page.astype(np.int64))
        ]
        places = self._upload((offsets[owner] + page).astype(np.int32))
        starts = self._upload(np.repeat(offsets, query_lens).astype(np.int64))
        columns = torch.arange(max(pages), dtype=torch.int32, device=device)
        return _Group(
            rows=rows,
            tokens=slice(first_token, first_token + sum(query_lens)),
            pages=self._upload(offsets.astype(np.int32))[:, None] + columns,
            slots=starts * PAGE_SIZE + positions,
            sources=(blocks[:, None] * heads + head).flatten(),
            targets=(places[:, None] * heads + head).flatten(),
            count=self._upload(np.array([len(page) * heads], np.int32)),
            head_pages=len(page) * heads,
        )

    # -- once a layer
    # ---------------------------------------------------------------------------------------------------

    def write(self, layer: int, key: Tensor, value: Tensor, slots: Tensor, decodes: int) -> None:
        """Store a layer's new tokens, once its misses have arrived.

        Args:
            key, value: ``[>= N, H, D]``. slots: ``[N]`` int64 logical slots, negative for padding.
            decodes: leading tokens that belong to decode rows.
        """
        mirrored = layer >= self.first_mirrored
        if mirrored and decodes:
            self._await_copies(layer)
        write(
            key,
            value,
            slots,
            self.tables[layer],
            self._lengths,
            self.frames[layer],
            self.resident,
            self.arena,
            self.host[layer - self.first_mirrored] if mirrored else None,
            layer=layer,
            decodes=decodes,
        )

    def stages(self, layer: int) -> Iterator[Stage]:
        """The prefill rows of an offloaded layer, group by group, each with its context in a
        staging area.

        While one group attends, the next one's history is on its way into the other area.
        """
        for index, group in enumerate(self._groups):
            use = (layer - self.ledger.resident) * len(self._groups) + index
            area = self._areas[use % 2]
            self._copier.wait_staged(use)
            base = int(1 + (use % 2) * len(area))
            yield Stage(
                group.rows, group.tokens, group.pages + base, group.slots + base * PAGE_SIZE
            )
            self._copier.release_staged(use)
            self._stage(use + 2)
        if layer == self.num_layers - 1:
            # A made-up batch that follows has none.
            self._groups = []

    def attends_staged(self, layer: int) -> bool:
        """Whether this layer's prefill rows go through ``stages``."""
        return layer >= self.ledger.resident

    def _stage(self, use: int) -> None:
        groups = self._groups
        if not groups or use >= (self.num_layers - self.ledger.resident) * len(groups):
            return
        layer, group = self.ledger.resident + use // len(groups), groups[use % len(groups)]
        self.loaded_head_pages += group.head_pages
        with self._copier.staging(use):
            self._fetch_one(layer, group.sources, group.targets, group.count, self._areas[use % 2])

    # -- copies
    # ---------------------------------------------------------------------------------------------------------

    def _start_copies(self) -> None:
        self._copier.start(
            lambda done: self._fetch_misses(range(self.first_mirrored, self.num_layers), done)
        )

    def _await_copies(self, layer: int) -> None:
        self._copier.wait(layer, self.resident, self._late)

    def _fetch_misses(self, layers: range, done: Tensor | None) -> None:
        hot = self.hot
        places = self.hot_frames[layers.start : layers.stop].flatten(1)
        self._fetch(layers, hot.sources, hot.targets, hot.count, places, self.resident, done)

    def _fetch(
        self,
        layers: range,
        sources: Tensor,
        targets: Tensor,
        count: Tensor,
        places: Tensor,
        resident: Tensor,
        done: Tensor | None = None,
    ) -> None:
        fetch(
            self.host,
            self.arena,
            sources,
            targets,
            count,
            places,
            resident,
            layers=layers,
            first_mirrored=self.first_mirrored,
            done=done,
        )

    def _fetch_one(
        self, layer: int, sources: Tensor, targets: Tensor, count: Tensor, places: Tensor
    ) -> None:
        self._fetch(range(layer, layer + 1), sources, targets, count, places[None], self._always)

    def _load(self, layer: int, places: Tensor, count: Tensor) -> None:
        self._fetch_one(layer, places, places, count, self.frames[layer])

    def _page_list(self, pages: np.ndarray) -> tuple[Tensor, Tensor]:
        """Head pages of whole pages, which are their own places in a frame table, and how many they
        are.
        """
        heads = self.num_kv_heads
        ids = (pages[:, None] * heads + np.arange(heads)).astype(np.int32).ravel()
        self.loaded_head_pages += len(ids)
        return self._upload(ids), self._upload(np.array([len(ids)], np.int32))

    def _set(self, table: Tensor, entries: Sequence[tuple[np.ndarray, np.ndarray]]) -> None:
        if entries:
            where = np.concatenate([index for index, _ in entries]).astype(np.int64)
            values = np.concatenate([value for _, value in entries]).astype(np.int32)
            # An entry that changed twice in a step has its last value.
            where, last = np.unique(where[::-1], return_index=True)
            table.view(-1).scatter_(0, self._upload(where), self._upload(values[::-1][last]))

    def _upload(self, values: np.ndarray) -> Tensor:
        tensor = torch.from_numpy(np.ascontiguousarray(values))
        return (
            tensor
            if self.device.type == "cpu"
            else tensor.pin_memory().to(self.device, non_blocking=True)
        )

    # -- figures
    # --------------------------------------------------------------------------------------------------------

    @torch.inference_mode()
    def stats(self, reset: bool = False) -> dict[str, int | float]:
        """Figures since the last reset; waits for the device.

        ``hit_rate``: share of the selected head pages that were in their hot buffer;
        ``fetched_bytes``: over all steps; ``loaded_bytes``: what was copied from the host pool
        besides, for layers that moved, prefix hits and the history of prefill rows; ``late_share``:
        of the layers' prefetches, those that arrived after their layer was ready, and ``late_us``
        by how much in the mean; ``hot_tokens``: size of a hot buffer now; ``host_pool_used``: share
        of the logical pages that requests in flight hold.
        """
        counted = self.meter.read(reset)
        steps, moved, loaded = self._stats_base
        if reset:
            self._stats_base = self.steps, self.moved_layers, self.loaded_head_pages
        return {
            "tier_steps": self.steps - steps,
            "missed_head_pages": int(counted[MISSED]),
            **ratios(counted, self.head_page_bytes),
            "loaded_bytes": (int(counted[FILLED]) + self.loaded_head_pages - loaded)
            * self.head_page_bytes,
            "resident_layers": self.ledger.resident,
            "num_layers": self.num_layers,
            "layer_moves": self.moved_layers - moved,
            "hot_tokens": self.hot_tokens,
            "free_frames": self.ledger.free_frames,
            "host_pool_bytes": self.host.nbytes,
            "host_pool_used": self.ledger.used_share,
        }

    def report(self) -> str | None:
        """One line on the steps since the last report, as far as the host has seen them without
        waiting; None if nothing happened.
        """
        seen, steps = self._reported
        counted, passed = self.meter.seen - seen, self.steps - steps
        self._reported = self.meter.seen, self.steps
        if passed <= 0 or not counted.any():
            return None
        figures = ratios(counted, self.head_page_bytes)
        late = (
            f"{figures['late_share']:.1%} of the prefetches late by {figures['late_us']:.0f} us in "
            "the mean, "
            if self.device.type == "cuda"
            else ""
        )
        return (
            f"hit rate {figures['hit_rate']:.1%}, {figures['fetched_bytes'] / passed / 1e6:.1f} MB "
            f"fetched a step, {late}{self.ledger.resident} of "
            f"{self.num_layers} layers resident, hot buffers of {self.hot_tokens} tokens, "
            f"{self.ledger.used_share:.1%} of {self.plan.num_pages * PAGE_SIZE} tokens in use"
        )
