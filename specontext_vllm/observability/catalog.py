"""Every metric that specontext adds to vLLM's /metrics; dashboard, `specontext top` and
docs/metrics.md are tested against this list.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from specontext_vllm.retrieval.counters import KEPT_MASS_EDGES

PREFIX = "vllm:specontext_"
SECONDS = (5e-5, 1e-4, 2e-4, 5e-4, 1e-3, 2e-3, 5e-3, 1e-2, 2e-2, 5e-2, 0.1, 0.2, 0.5)
"""Upper bounds of the buckets of times."""


@dataclass(frozen=True)
class Metric:
    """One metric family.

    Attributes:
        name: as /metrics prints it; a histogram's is followed by _bucket, _sum and _count.
        unit: of its values.
        text: its help text.
        edges: upper bounds of a histogram's buckets, +Inf left out.
        per_rank: whether tensor-parallel ranks differ and each has its own series, labelled
            tp_rank; else rank 0 speaks for all.
    """

    name: str
    kind: Literal["counter", "gauge", "histogram"]
    unit: str
    text: str
    edges: tuple[float, ...] = ()
    per_rank: bool = True

    @property
    def family(self) -> str:
        """The name without the suffix that every counter's samples have."""
        return self.name.removesuffix("_total")

    @property
    def samples(self) -> tuple[str, ...]:
        """Names of its samples in /metrics."""
        return (
            tuple(self.name + suffix for suffix in ("_bucket", "_sum", "_count"))
            if self.kind == "histogram"
            else (self.name,)
        )


def _counter(name: str, unit: str, text: str, *, per_rank: bool = True) -> Metric:
    return Metric(f"{PREFIX}{name}_total", "counter", unit, text, per_rank=per_rank)


def _gauge(name: str, unit: str, text: str) -> Metric:
    return Metric(PREFIX + name, "gauge", unit, text)


def _histogram(name: str, unit: str, text: str, edges: tuple[float, ...]) -> Metric:
    return Metric(PREFIX + name, "histogram", unit, text, edges)


DECODE_STEPS = _counter("decode_steps", "steps", "Steps with decode rows.", per_rank=False)
DECODE_ROWS = _counter(
    "decode_rows",
    "rows",
    "Decode rows: tokens made one at a time from selected pages.",
    per_rank=False,
)
PAGES_READ = _counter(
    "head_pages_read",
    "head pages",
    "Head pages (16 tokens of one KV head) that decode rows read; each layer reads the same.",
)
PAGES_HELD = _counter(
    "head_pages_held",
    "head pages",
    "Head pages of the decode rows' whole contexts, which dense attention would have read.",
)
OWN_BUDGET_ROWS = _counter(
    "own_budget_rows",
    "rows",
    "Decode rows of requests that have a specontext_budget of their own.",
    per_rank=False,
)
OWN_BUDGET_PAGES = _counter(
    "own_budget_pages_read",
    "head pages",
    "Head pages that those rows read within their budgets.",
    per_rank=False,
)
DENSE_ROWS = _counter(
    "dense_rows",
    "rows",
    "Decode rows of requests that ask for specontext_mode dense.",
    per_rank=False,
)
DENSE_PAGES = _counter(
    "dense_pages_read",
    "head pages",
    "Head pages that those rows read: all of their contexts.",
    per_rank=False,
)
KEPT_MASS_RATIO = _histogram(
    "kept_mass_ratio",
    "ratio",
    "Share of the retrieval head's own attention that lies on the selected pages, for each decode "
    "row of steps that chose pages.",
    KEPT_MASS_EDGES,
)
FALLBACK_ROWS = _counter(
    "fallback_rows",
    "rows",
    "Decode rows under confidence_threshold, which read fallback_budget tokens instead of budget.",
)
SELECT_SECONDS = _histogram(
    "head_select_seconds",
    "seconds",
    "Time before the forward pass: the head's queries and keys, scores, selection and, with a host "
    "pool, misses and page tables. "
    "Sampled in one of 16 steps with decode rows, on the device's clock.",
    SECONDS,
)
LEARN_SECONDS = _histogram(
    "head_learn_seconds",
    "seconds",
    "Time after the forward pass in which the head learns the step's tokens. Sampled in one of 16 "
    "steps, on the device's clock.",
    SECONDS,
)
HITS = _counter(
    "hot_buffer_hits",
    "head pages",
    "Selected head pages that were in their request's hot buffer; its content is followed while "
    "all layers are resident, too.",
)
MISSES = _counter(
    "hot_buffer_misses",
    "head pages",
    "Selected head pages that were not in it: each is fetched for every offloaded layer "
    "(fetched_bytes).",
)
FETCHED_BYTES = _counter(
    "fetched_bytes", "bytes", "KV fetched from the host pool for decode rows, all layers."
)
LOADED_BYTES = _counter(
    "loaded_bytes",
    "bytes",
    "KV copied from the host pool besides: for layers that moved, prefix hits and the history of "
    "prefill rows.",
)
PREFETCHES = _counter(
    "prefetches", "layers", "Layers of decode steps that waited for their misses, late or not."
)
LATE_PREFETCHES = _counter(
    "late_prefetches", "layers", "Those whose misses arrived after the layer was ready for them."
)
LATE_SECONDS = _counter(
    "late_prefetch_seconds", "seconds", "Time that layers stood waiting for late prefetches."
)
LAYER_MOVES = _counter("layer_moves", "layers", "Layers that were offloaded or came back.")
RESIDENT_LAYERS = _gauge(
    "resident_layers", "layers", "Layers with every page of the running requests on the GPU."
)
OFFLOADED_LAYERS = _gauge("offloaded_layers", "layers", "Layers with only hot buffers on the GPU.")
HOT_BUFFER_TOKENS = _gauge(
    "hot_buffer_tokens", "tokens", "Size of a request's hot buffer, per KV head."
)
HOST_POOL_BYTES = _gauge("host_pool_bytes", "bytes", "Pinned host memory that holds KV.")
HOST_POOL_USED = _gauge(
    "host_pool_used_ratio",
    "ratio",
    "Share of the host pool's pages that hold KV of requests in flight.",
)
LOSSLESS_STEPS = _counter(
    "lossless_steps",
    "steps",
    "Steps with decode rows over their whole contexts (mode lossless), with drafts or without.",
    per_rank=False,
)
LOSSLESS_VERIFIED_STEPS = _counter(
    "lossless_verified_steps", "steps", "Those that verified drafts.", per_rank=False
)
LOSSLESS_DRAFTS = _counter(
    "lossless_drafts",
    "drafts",
    "Drafts of a row, summed over those; vllm:spec_decode_* say how many are accepted.",
    per_rank=False,
)
SIDECAR_UP = _gauge(
    "sidecar_up",
    "0 or 1",
    "1 while the sidecar's actor selects, 0 while requests are read whole for want of it.",
)
SIDECAR_RESTARTS = _counter(
    "sidecar_restarts",
    "restarts",
    "Times that the sidecar's actor was replaced after it had died or hung.",
)
SIDECAR_DENSE_ROWS = _counter(
    "sidecar_dense_rows",
    "rows",
    "Decode rows read whole because the sidecar was away or did not know their pages.",
)
SIDECAR_LOST_PAGES = _gauge(
    "sidecar_lost_pages",
    "pages",
    "Pages that the sidecar does not know, since it was away when they were written.",
)
SIDECAR_WAIT_SECONDS = _counter(
    "sidecar_wait_seconds", "seconds", "Time that steps waited for the sidecar's selection."
)

METRICS: tuple[Metric, ...] = tuple(
    value for value in globals().values() if isinstance(value, Metric)
)
