"""What fits where: the memory model of tiered KV (paper, section C3; see
docs/how-it-works/memory-model.md for its errata).
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from specontext_vllm.config import PAGE_SIZE, pages_for
from specontext_vllm.residency.lanes import MIN_GAIN, most_lanes, no_gain, paying_lanes
from specontext_vllm.residency.table_rows import table_rows
from specontext_vllm.sizes import in_gib

HOT_FACTORS = (2.0, 1.5, 1.0)
"""Sizes of the hot buffers to try, in units of the page table's width. Twice the width halves the
misses (`python -m benchmarks transfer`).
"""

HOT_SHARE = 0.8
"""Larger hot buffers may cost at most the rest of the logical pages."""

OTHERS_KEPT = 2
"""Layers of other kinds beside two tiers have blocks for so many times what the requests in flight
hold of them: the rest stays in the prefix cache for a while.
"""


class MemoryModelError(ValueError):
    """The sizes do not fit; the message is one sentence with the numbers."""


@dataclass(frozen=True)
class KVShape:
    """KV of one worker.

    Attributes:
        num_layers: layers that SpeContext serves.
        num_kv_heads, head_dim: KV heads on this worker, and their width.
        itemsize: bytes of one element.
        retriever_page_bytes: bytes that the retriever keeps of one page of all layers: the head's
            caches, and the page vectors of a rule that has some.
        drafter_page_bytes: KV of one page in a drafter's layers, which stay on the GPU.
        empty_page_bytes: what vLLM adds to a page of all layers to make groups equally large.
    """

    num_layers: int
    num_kv_heads: int
    head_dim: int
    itemsize: int
    retriever_page_bytes: int
    drafter_page_bytes: int = 0
    empty_page_bytes: int = 0

    @property
    def page_bytes(self) -> int:
        """One page of one layer, K and V."""
        return self.num_kv_heads * PAGE_SIZE * 2 * self.head_dim * self.itemsize


@dataclass(frozen=True)
class TierPlan:
    """Sizes of the two tiers.

    Attributes:
        num_pages: T, logical pages that the scheduler hands out.
        host_layers: M, the last layers, which the host pool mirrors and which may be offloaded.
        hot_pages: S, frames of one request's hot buffer in one layer, at the most.
        frames: F, page-sized places on the GPU, staging areas included.
        staging_pages: pages of each of the two staging areas.
        host_bytes, gpu_bytes: size of the two tiers.
        parts: bytes on the GPU by purpose.
        lanes: n, requests that run at once, each of which may have a hot buffer.
    """

    num_pages: int
    host_layers: int
    hot_pages: int
    frames: int
    staging_pages: int
    host_bytes: int
    gpu_bytes: int
    parts: dict[str, int]
    lanes: int


class MemoryModel:
    """The paper's M_part for a paged engine.

    M_part charges ``(L_GPU + 1 + alpha) S + L_CPU B`` tokens a request. Here the 1 is the head's
    own page (K only), alpha is 0 (K and V are not repeated for query heads), B is the hot buffer,
    and weights and activations are left out: vLLM measures them.

    Args:
        shape: the KV.
        budget_pages, table_pages: pages a KV head reads in a step; width of the page table.
        max_num_seqs: rows that a step's tables have room for.
        lanes: n, requests that may run at once, each with a hot buffer; None: ``max_num_seqs``. A
            plan has fewer where so many would cost what the host pool gains.
        max_model_len: longest context, in tokens; the staging areas hold it twice.
        captured_rows: decode rows of the largest captured graph, padding included; 0 where nothing
            is captured.
        block_pages: pages of a vLLM block, the unit in which a request gets them.
        other_bytes: GPU memory of layers that SpeContext does not serve, whatever the pages.
    """

    def __init__(
        self,
        shape: KVShape,
        *,
        budget_pages: int,
        table_pages: int,
        max_num_seqs: int,
        max_model_len: int,
        captured_rows: int = 0,
        block_pages: int = 1,
        other_bytes: int = 0,
        lanes: int | None = None,
    ) -> None:
        self.lanes = max_num_seqs if lanes is None else lanes
        self.block_pages, self.other_bytes = block_pages, other_bytes
        self.shape, self.budget_pages, self.table_pages = shape, budget_pages, table_pages
        self.max_num_seqs, self.max_pages, self.captured_rows = (
            max_num_seqs,
            self._held_pages(max_model_len),
            captured_rows,
        )

    def _held_pages(self, tokens: int) -> int:
        """Pages that a request of ``tokens`` tokens holds: those of whole blocks."""
        return -(-pages_for(tokens) // self.block_pages) * self.block_pages

    @property
    def in_flight_bytes(self) -> int:
        """KV bytes of all layers of ``lanes`` requests of ``max_model_len`` tokens."""
        return self.shape.num_layers * self.lanes * self.max_pages * self.shape.page_bytes

    def size(self, num_pages: int, host_layers: int, hot_pages: int) -> TierPlan:
        """Bytes of a plan in the worst case: every page in use, every mirrored layer offloaded,
        every hot buffer full.
        """
        shape, lanes = self.shape, self.lanes
        staging = self.max_pages if host_layers else 0
        hot = min(num_pages, lanes * hot_pages)
        frames = (shape.num_layers - host_layers) * num_pages + host_layers * hot + 2 * staging
        parts = {
            "resident layers": (shape.num_layers - host_layers) * num_pages * shape.page_bytes,
            "hot buffers": host_layers * hot * shape.page_bytes,
            "staging": 2 * staging * shape.page_bytes,
            "retrieval head's caches": num_pages * shape.retriever_page_bytes,
        }
        if shape.drafter_page_bytes:
            parts["drafter's KV"] = num_pages * shape.drafter_page_bytes
        if shape.empty_page_bytes:
            parts["empty, in vLLM's groups of layers"] = num_pages * shape.empty_page_bytes
        if self.other_bytes:
            parts["layers of other kinds"] = self.other_bytes
        if host_layers:
            parts["tables"] = self._table_bytes(num_pages, hot_pages)
        return TierPlan(
            num_pages,
            host_layers,
            hot_pages,
            frames,
            staging,
            host_layers * num_pages * shape.page_bytes,
            sum(parts.values()),
            parts,
            lanes,
        )

    def _table_bytes(self, num_pages: int, hot_pages: int) -> int:
        """int32 tables: frames, hot frames, page tables of all layers, slot maps with their state
        (stamps are int64), and the step's slots, misses and sorting.
        """
        layers, heads, lanes = self.shape.num_layers, self.shape.num_kv_heads, self.lanes
        return 4 * (
            layers * num_pages
            + layers * lanes * hot_pages
            + lanes * heads * (self.max_pages + 4 * hot_pages)
            + table_rows(self.max_num_seqs, self.captured_rows)
            * heads
            * ((layers + 3) * self.table_pages + (1 << (hot_pages - 1).bit_length()))
        )

    @property
    def _widths(self) -> list[int]:
        """Sizes of the hot buffers to try, in pages, largest first."""
        return sorted(
            {min(self.max_pages, int(factor * self.table_pages)) for factor in HOT_FACTORS},
            reverse=True,
        )

    def min_gpu_bytes(self, host_bytes: int, tokens: int) -> int:
        """The smallest GPU memory for KV that holds one request of ``tokens`` tokens and vLLM's
        null block, with up to ``host_bytes`` in a host pool.
        """
        pages, width = self.block_pages + self._held_pages(tokens), self._widths[-1]
        one = self.with_lanes(1)
        plans = (one.size(pages, layers, width) for layers in range(self.shape.num_layers + 1))
        return min(plan.gpu_bytes for plan in plans if plan.host_bytes <= host_bytes)

    def plan(self, gpu_bytes: int, host_bytes: int, num_pages: int | None = None) -> TierPlan:
        """The plan with the most lanes beside which a host pool pays, and of these the one with the
        largest hot buffers that keep ``HOT_SHARE`` of the largest possible number of logical pages,
        and with a host pool ``MIN_GAIN`` times the number without one.

        Args:
            gpu_bytes: room for KV, the head's caches and tables.
            host_bytes: room for the host pool.
            num_pages: a fixed number of pages, of whole blocks; the plan then mirrors as few
                layers as it can.
        Raises:
            MemoryModelError: nothing fits, or the host pool would gain less than ``MIN_GAIN``.
        """
        widths = self._widths
        if num_pages is not None:
            return self._fixed(gpu_bytes, host_bytes, num_pages)
        return paying_lanes(self, gpu_bytes, host_bytes, widths[-1])._adaptive(
            gpu_bytes, host_bytes
        )

    def _adaptive(self, gpu_bytes: int, host_bytes: int) -> TierPlan:
        """``plan`` with all of these lanes."""
        widths = self._widths
        best = {width: self.largest(gpu_bytes, host_bytes, width) for width in widths}
        max_pages = max(plan.num_pages for plan in best.values())
        if max_pages == 0:
            gpu, host = in_gib(gpu_bytes, host_bytes)
            raise MemoryModelError(
                f"{gpu} GiB of memory for KV and {host} GiB of host memory hold not one page; "
                f"give more, or lower --max-num-seqs ({self.max_num_seqs}) or --max-model-len "
                f"({self.max_pages * PAGE_SIZE})."
            )
        alone = self.largest(gpu_bytes, 0, widths[-1]).num_pages
        # The longest request and vLLM's null block must fit beside larger hot buffers too.
        min_pages = max(
            HOT_SHARE * max_pages,
            MIN_GAIN * alone if host_bytes else 0,
            min(max_pages, self.block_pages + self.max_pages),
        )
        if max_pages < min_pages:
            raise MemoryModelError(no_gain(self, gpu_bytes, host_bytes, widths[-1]))
        return self._with_spare_frames(
            next(best[width] for width in widths if best[width].num_pages >= min_pages), gpu_bytes
        )

    def plan_all_offloaded(
        self, gpu_bytes: int, host_bytes: int, num_pages: int | None = None
    ) -> TierPlan:
        """The plan that mirrors every layer, has the largest hot buffers and no room for a resident
        layer, for as many lanes as fit; arguments as for ``plan``, but None for the pages of
        the longest requests in all lanes.

        Raises:
            MemoryModelError: it does not fit.
        """

        def offloaded(model: MemoryModel) -> TierPlan:
            pages = num_pages or model.block_pages + model.lanes * model.max_pages
            return model.size(pages, model.shape.num_layers, model._widths[0])

        def fits(model: MemoryModel) -> bool:
            plan = offloaded(model)
            return plan.gpu_bytes <= gpu_bytes and plan.host_bytes <= host_bytes

        plan = offloaded(most_lanes(self, fits))
        if plan.gpu_bytes > gpu_bytes or plan.host_bytes > host_bytes:
            raise MemoryModelError(
                "{} GiB of memory for KV and {} GiB of host memory are less than the {} and {} "
                "that every layer offloaded needs; give more, or set loading to adaptive.".format(
                    *in_gib(gpu_bytes, host_bytes, plan.gpu_bytes, plan.host_bytes)
                )
            )
        return plan

    def _with_spare_frames(self, plan: TierPlan, gpu_bytes: int) -> TierPlan:
        """Turn the GPU memory that the worst case leaves into frames, with which lighter loads keep
        more layers resident.
        """
        shape = self.shape
        useful = shape.num_layers * plan.num_pages + 2 * plan.staging_pages - plan.frames
        spare = min((gpu_bytes - plan.gpu_bytes) // shape.page_bytes, useful)
        if not plan.host_layers or spare <= 0:
            return plan
        size = spare * shape.page_bytes
        return replace(
            plan,
            frames=plan.frames + spare,
            gpu_bytes=plan.gpu_bytes + size,
            parts=plan.parts | {"spare frames": size},
        )

    def largest(self, gpu_bytes: int, host_bytes: int, hot_pages: int) -> TierPlan:
        found = self.size(0, 0, hot_pages)
        for host_layers in range(self.shape.num_layers + 1 if host_bytes else 1):
            low, high = 0, 1 + max(gpu_bytes, host_bytes) // self.shape.page_bytes
            while low < high:
                middle = (low + high + 1) // 2
                plan = self.size(middle, host_layers, hot_pages)
                fits = plan.gpu_bytes <= gpu_bytes and plan.host_bytes <= host_bytes
                low, high = (middle, high) if fits else (low, middle - 1)
            low -= low % self.block_pages
            if low > found.num_pages:
                found = self.size(low, host_layers, hot_pages)
        return found

    def _fixed(self, gpu_bytes: int, host_bytes: int, num_pages: int) -> TierPlan:
        """``plan`` of a fixed number of pages, with as many lanes as fit."""
        widths = self._widths

        def first(model: MemoryModel) -> TierPlan | None:
            plans = (
                model.size(num_pages, host_layers, width)
                for host_layers in range(self.shape.num_layers + 1)
                for width in widths
            )
            return next(
                (p for p in plans if p.gpu_bytes <= gpu_bytes and p.host_bytes <= host_bytes), None
            )

        if (plan := first(most_lanes(self, lambda model: first(model) is not None))) is not None:
            return self._with_spare_frames(plan, gpu_bytes)
        smallest = self.with_lanes(1).size(num_pages, self.shape.num_layers, widths[-1])
        gpu, min_gpu, host, min_host = in_gib(
            gpu_bytes, smallest.gpu_bytes, host_bytes, smallest.host_bytes
        )
        raise MemoryModelError(
            f"--num-gpu-blocks-override {num_pages // self.block_pages} blocks need {min_gpu} GiB "
            "of memory for KV "
            f"and {min_host} GiB of host memory with every "
            f"layer offloaded, but there are {gpu} and {host}; lower it."
        )

    def with_lanes(
        self, lanes: int, *, budget_pages: int | None = None, table_pages: int | None = None
    ) -> MemoryModel:
        """The same with another number of lanes, or another budget."""
        return MemoryModel(
            self.shape,
            budget_pages=self.budget_pages if budget_pages is None else budget_pages,
            table_pages=self.table_pages if table_pages is None else table_pages,
            max_num_seqs=self.max_num_seqs,
            lanes=lanes,
            max_model_len=self.max_pages * PAGE_SIZE,
            captured_rows=self.captured_rows,
            block_pages=self.block_pages,
            other_bytes=self.other_bytes,
        )

    def thresholds(self, plan: TierPlan, requests: int) -> list[int]:
        """S_T[i]: the longest context, in tokens, that ``requests`` equal requests can have with
        ``i`` layers offloaded, i = 0..M; 0 where not even one page fits.

        The frames hold whole contexts in L - i layers and hot buffers in i, as in ``Ledger``. The
        formula follows from M_part (paper, section C3); the paper's own threshold formula drops a
        factor.
        """
        layers, found = self.shape.num_layers, []
        room = (plan.frames - 2 * plan.staging_pages) // requests
        for offloaded in range(plan.host_layers + 1):
            # A context shorter than its hot buffer takes the same room offloaded as resident.
            pages = room // layers
            if pages >= plan.hot_pages and offloaded:
                pages = (
                    (room - offloaded * plan.hot_pages) // (layers - offloaded)
                    if offloaded < layers
                    else plan.num_pages
                )
            pages = min(pages, plan.num_pages // requests, self.max_pages)
            found.append(PAGE_SIZE * (pages - pages % self.block_pages))
        return found

    def offloaded_layers(self, plan: TierPlan, length: int, requests: int) -> int | None:
        """The smallest number of layers to offload for ``requests`` requests of ``length`` tokens;
        None when M are too few.
        """
        return next(
            (i for i, longest in enumerate(self.thresholds(plan, requests)) if longest >= length),
            None,
        )
