"""What fits where, and how long a step takes: the memory model of tiered KV (paper C3, with its
errata mended).
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from specontext_vllm.config import PAGE_SIZE, pages_for
from specontext_vllm.sizes import in_gib

HOT_FACTORS = (2.0, 1.5, 1.0)
"""Sizes of the hot buffers that are tried, in units of the page table's width: twice it halves the
misses (benchmarks, transfer).
"""

HOT_SHARE = 0.8
"""Share of the logical pages that larger hot buffers must leave."""

LEAST_GAIN = 1.02
"""Host memory must gain at least so much capacity, or the engine is refused."""


class MemoryModelError(ValueError):
    """What was asked for does not fit; the message is one sentence with the numbers."""


def table_rows(max_num_seqs: int, captured_rows: int) -> int:
    """Rows of the page tables: most decode rows of a step, padding to the ``captured_rows`` of the
    largest graph included (0: nothing is captured).
    """
    return max(max_num_seqs, captured_rows)


def default_captured_rows(max_num_seqs: int) -> int:
    """Rows of the largest decode step that vLLM captures as a graph by default
    (vllm/config/vllm.py, ``_set_cudagraph_sizes``).

    Where one token of each request fits ``--max-num-batched-tokens``; on Blackwell data-centre GPUs
    the limit is 1024, not 512.
    """
    most = min(2 * max_num_seqs, 512)
    if most >= 8:
        step = 8 if most < 256 else 16
        largest = most // step * step
    else:
        largest = max(rows for rows in (1, 2, 4) if rows <= most)
    return max(largest, max_num_seqs) if max_num_seqs <= most else largest


@dataclass(frozen=True)
class KVShape:
    """KV of one worker.

    Attributes:
        num_layers, num_kv_heads, head_dim: of the target, heads on this worker.
        itemsize: bytes of one element.
        head_page_bytes: bytes that the retrieval head's caches take for one page; 0 without a head.
    """

    num_layers: int
    num_kv_heads: int
    head_dim: int
    itemsize: int
    head_page_bytes: int

    @property
    def page_bytes(self) -> int:
        """One page of one layer, K and V."""
        return self.num_kv_heads * PAGE_SIZE * 2 * self.head_dim * self.itemsize


@dataclass(frozen=True)
class TierPlan:
    """Sizes of the two tiers.

    Attributes:
        num_pages: T, logical pages that the scheduler hands out.
        host_layers: M, layers (the last ones) that the host pool mirrors and that may be offloaded.
        hot_pages: S, most frames of one request's hot buffer in one layer.
        frames: F, page-sized places on the GPU, staging areas included.
        staging_pages: pages of each of the two staging areas.
        host_bytes, gpu_bytes: what both tiers take.
        parts: bytes on the GPU by what they are for.
    """

    num_pages: int
    host_layers: int
    hot_pages: int
    frames: int
    staging_pages: int
    host_bytes: int
    gpu_bytes: int
    parts: dict[str, int]


class MemoryModel:
    """The paper's M_part for a paged engine.

    M_part charges ``(L_GPU + 1 + alpha) S + L_CPU B`` tokens a request. Here the 1 is the head's
    own page (K only), alpha is 0 (nothing repeats K and V), B is the hot buffer, and weights and
    activations are no part of it: vLLM measures them.

    Args:
        shape: the KV.
        budget_pages, table_pages: pages a KV head reads in a step, and the most it may.
        max_num_seqs: n, requests in flight, each of which may hold a hot buffer.
        max_model_len: longest context, in tokens; the staging areas hold it twice.
        captured_rows: decode rows of the largest captured graph, padding included; 0 where nothing
            is captured.
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
    ) -> None:
        self.shape, self.budget_pages, self.table_pages = shape, budget_pages, table_pages
        self.max_num_seqs, self.max_pages, self.captured_rows = (
            max_num_seqs,
            pages_for(max_model_len),
            captured_rows,
        )

    @property
    def in_flight_bytes(self) -> int:
        """KV of all layers of as many and as long requests as may run at once."""
        return self.shape.num_layers * self.max_num_seqs * self.max_pages * self.shape.page_bytes

    def size(self, num_pages: int, host_layers: int, hot_pages: int) -> TierPlan:
        """Bytes of a plan in the worst case: every page in use, every mirrored layer offloaded,
        every hot buffer full.
        """
        shape, lanes = self.shape, self.max_num_seqs
        staging = self.max_pages if host_layers else 0
        hot = min(num_pages, lanes * hot_pages)
        frames = (shape.num_layers - host_layers) * num_pages + host_layers * hot + 2 * staging
        parts = {
            "resident layers": (shape.num_layers - host_layers) * num_pages * shape.page_bytes,
            "hot buffers": host_layers * hot * shape.page_bytes,
            "staging": 2 * staging * shape.page_bytes,
            "retrieval head's caches": num_pages * shape.head_page_bytes,
        }
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
        )

    def _table_bytes(self, num_pages: int, hot_pages: int) -> int:
        """int32 tables: frames, hot frames, page tables of all layers, slot maps and their state,
        the step's slots, misses and sorting.
        """
        layers, heads, lanes = self.shape.num_layers, self.shape.num_kv_heads, self.max_num_seqs
        return 4 * (
            layers * num_pages
            + layers * lanes * hot_pages
            + lanes * heads * (self.max_pages + 3 * hot_pages)
            + table_rows(lanes, self.captured_rows)
            * heads
            * ((layers + 3) * self.table_pages + (1 << (hot_pages - 1).bit_length()))
        )

    @property
    def _widths(self) -> list[int]:
        """Sizes of the hot buffers that are tried, in pages, the largest first."""
        return sorted(
            {min(self.max_pages, int(factor * self.table_pages)) for factor in HOT_FACTORS},
            reverse=True,
        )

    def least_gpu_bytes(self, host_bytes: int, tokens: int) -> int:
        """The least GPU memory for KV that holds one request of ``tokens`` tokens beside vLLM's
        null block, with up to ``host_bytes`` in a host pool.
        """
        pages, width = 1 + pages_for(tokens), self._widths[-1]
        plans = (self.size(pages, layers, width) for layers in range(self.shape.num_layers + 1))
        return min(plan.gpu_bytes for plan in plans if plan.host_bytes <= host_bytes)

    def plan(self, gpu_bytes: int, host_bytes: int, num_pages: int | None = None) -> TierPlan:
        """The plan with the most logical pages, and the largest hot buffers that leave 80 % of
        them, and with a host pool 2 % more than without.

        Args:
            gpu_bytes, host_bytes: room for KV, the head's caches and tables; for the host pool.
            num_pages: the user's own number of pages; then the plan with the fewest mirrored layers
                is taken.
        Raises:
            MemoryModelError: nothing fits, or host memory would gain less than 2 %.
        """
        widths = self._widths
        if num_pages is not None:
            return self._fixed(gpu_bytes, host_bytes, num_pages, widths)
        best = {width: self._largest(gpu_bytes, host_bytes, width) for width in widths}
        most = max(plan.num_pages for plan in best.values())
        if most == 0:
            gpu, host = in_gib(gpu_bytes, host_bytes)
            raise MemoryModelError(
                f"{gpu} GiB of memory for KV and {host} GiB of host memory hold not one page; "
                f"give more, or lower --max-num-seqs ({self.max_num_seqs}) or --max-model-len "
                f"({self.max_pages * PAGE_SIZE})."
            )
        alone = self._largest(gpu_bytes, 0, widths[-1]).num_pages
        # Larger hot buffers must not cost the longest request its room, beside vLLM's null block.
        least = max(
            HOT_SHARE * most, LEAST_GAIN * alone if host_bytes else 0, min(most, 1 + self.max_pages)
        )
        if most < least:
            raise MemoryModelError(self._no_gain(gpu_bytes, host_bytes, alone, widths[-1]))
        return self._with_spare_frames(
            next(best[width] for width in widths if best[width].num_pages >= least), gpu_bytes
        )

    def _with_spare_frames(self, plan: TierPlan, gpu_bytes: int) -> TierPlan:
        """What the worst case leaves of the GPU memory becomes frames too: lighter loads then keep
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

    def _largest(self, gpu_bytes: int, host_bytes: int, hot_pages: int) -> TierPlan:
        found = self.size(0, 0, hot_pages)
        for host_layers in range(self.shape.num_layers + 1 if host_bytes else 1):
            low, high = 0, 1 + max(gpu_bytes, host_bytes) // self.shape.page_bytes
            while low < high:
                middle = (low + high + 1) // 2
                plan = self.size(middle, host_layers, hot_pages)
                fits = plan.gpu_bytes <= gpu_bytes and plan.host_bytes <= host_bytes
                low, high = (middle, high) if fits else (low, middle - 1)
            if low > found.num_pages:
                found = self.size(low, host_layers, hot_pages)
        return found

    def _fixed(
        self, gpu_bytes: int, host_bytes: int, num_pages: int, widths: list[int]
    ) -> TierPlan:
        for host_layers in range(self.shape.num_layers + 1):
            for width in widths:
                plan = self.size(num_pages, host_layers, width)
                if plan.gpu_bytes <= gpu_bytes and plan.host_bytes <= host_bytes:
                    return self._with_spare_frames(plan, gpu_bytes)
        least = self.size(num_pages, self.shape.num_layers, widths[-1])
        gpu, least_gpu, host, least_host = in_gib(
            gpu_bytes, least.gpu_bytes, host_bytes, least.host_bytes
        )
        raise MemoryModelError(
            f"--num-gpu-blocks-override {num_pages} pages need {least_gpu} GiB of memory for KV "
            f"and {least_host} GiB of host memory with every "
            f"layer offloaded, but there are {gpu} and {host}; lower it."
        )

    def _no_gain(self, gpu_bytes: int, host_bytes: int, alone: int, width: int) -> str:
        # More hot buffers never leave more pages.
        pays, fails = 0, self.max_num_seqs
        while fails - pays > 1:
            lanes = (pays + fails) // 2
            model = MemoryModel(
                self.shape,
                budget_pages=self.budget_pages,
                table_pages=self.table_pages,
                max_num_seqs=lanes,
                max_model_len=self.max_pages * PAGE_SIZE,
                captured_rows=self.captured_rows,
            )
            if model._largest(gpu_bytes, host_bytes, width).num_pages >= LEAST_GAIN * alone:
                pays = lanes
            else:
                fails = lanes
        hot, gpu, host = in_gib(
            self.shape.num_layers * self.max_num_seqs * width * self.shape.page_bytes,
            gpu_bytes,
            host_bytes,
        )
        least = MemoryModel(
            self.shape,
            budget_pages=1,
            table_pages=1,
            max_num_seqs=1,
            max_model_len=self.max_pages * PAGE_SIZE,
            captured_rows=self.captured_rows,
        )
        if not pays and least._largest(gpu_bytes, host_bytes, 1).num_pages < LEAST_GAIN * alone:
            return (
                f"{host} GiB of host memory add less than {LEAST_GAIN - 1:.0%} to what {gpu} GiB "
                "of memory for KV hold, however small the hot buffers; give "
                f"more, or set host_kv_gib to 0."
            )
        remedy = (
            f"--max-num-seqs {pays} is the largest that pays; use that,"
            if pays
            else "none smaller pays either;"
        )
        return (
            f"hot buffers for --max-num-seqs {self.max_num_seqs} may take {hot} GiB of the {gpu} "
            "GiB of memory for KV, so that "
            f"{host} GiB of host memory gain nothing; {remedy} lower the budget (a buffer holds "
            f"{width * PAGE_SIZE} tokens), or set host_kv_gib to 0."
        )

    def thresholds(self, plan: TierPlan, requests: int) -> list[int]:
        """S_T[i]: the longest context, in tokens, of ``requests`` equal requests that fits with
        ``i`` layers offloaded, i = 0..M.

        It is what the ledger does: frames hold whole contexts of L - i layers and hot buffers of i.
            Derived from M_part itself
        (paper C3): the paper's threshold formula drops a factor, and its "place on GPU" means the
        CPU. 0 where not even one page fits.
        """
        layers, found = self.shape.num_layers, []
        room = (plan.frames - 2 * plan.staging_pages) // requests
        for offloaded in range(plan.host_layers + 1):
            # Contexts shorter than a hot buffer take as much room offloaded as resident.
            pages = room // layers
            if pages >= plan.hot_pages and offloaded:
                pages = (
                    (room - offloaded * plan.hot_pages) // (layers - offloaded)
                    if offloaded < layers
                    else plan.num_pages
                )
            found.append(PAGE_SIZE * min(pages, plan.num_pages // requests, self.max_pages))
        return found

    def offloaded_layers(self, plan: TierPlan, length: int, requests: int) -> int | None:
        """Fewest layers to offload for ``requests`` requests of ``length`` tokens; None when even
        all M do not suffice.
        """
        return next(
            (i for i, longest in enumerate(self.thresholds(plan, requests)) if longest >= length),
            None,
        )


@dataclass(frozen=True)
class StepTime:
    """The time law: a step takes the longer of its compute and its transfers.

    Attributes:
        weight_bytes: read once a step, the head's included.
        gpu_bytes_per_s: memory bandwidth of the GPU. link_bytes_per_s: of the PCIe link at 8 KiB
            rows.
        overhead_s: what a step costs beyond the bytes it reads; 1.5 to 2.0 ms measured (benchmarks,
            decode).
    """

    weight_bytes: int
    gpu_bytes_per_s: float = 4.3e12
    link_bytes_per_s: float = 50e9
    overhead_s: float = 1.7e-3

    def step(
        self,
        shape: KVShape,
        *,
        requests: int,
        length: int,
        budget_pages: int,
        offloaded: int,
        miss_rate: float,
    ) -> tuple[float, float, int]:
        """Seconds of compute, seconds of transfer, and bytes over PCIe of one decode step.

        Args:
            length: context, in tokens. miss_rate: share of the budget's pages that must be fetched.
        """
        pages = pages_for(length)
        read = self.weight_bytes + requests * (
            shape.num_layers * min(pages, budget_pages) * shape.page_bytes
            + (pages > budget_pages) * pages * shape.head_page_bytes
        )
        moved = int(offloaded * requests * min(pages, budget_pages) * miss_rate * shape.page_bytes)
        return self.overhead_s + read / self.gpu_bytes_per_s, moved / self.link_bytes_per_s, moved

    def dense_step(self, shape: KVShape, *, requests: int, length: int) -> float:
        """Seconds of a decode step that reads every page of every layer from GPU memory."""
        read = (
            self.weight_bytes + requests * shape.num_layers * pages_for(length) * shape.page_bytes
        )
        return self.overhead_s + read / self.gpu_bytes_per_s
