"""The servers under load, and what they hold afterwards."""

from __future__ import annotations

import asyncio
import json
import time
import urllib.request
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.shapes import Shape
from benchmarks.soak.client import Load, apply_load
from benchmarks.soak.outcome import Outcome
from specontext_vllm.config import PAGE_SIZE

MAX_MODEL_LEN = 1024
MEMORY_SHARE_CPU, MEMORY_SHARE_GPU = 0.3, 0.28
"""vLLM's --gpu-memory-utilization; of an H200 that holds an 8B model's weights in float32 and some
room, three times side by side.
"""
KV_BYTES_GPU = 4 << 30
"""Room for KV on a GPU. It is given, since vLLM would measure what is free, which depends on the
other soaks on this GPU.
"""


def server_arguments(settings: dict[str, Any] | None, pages: int, max_num_seqs: int) -> list[str]:
    """Options of `vllm serve`, without specontext if there are no ``settings``; few ``pages``:
    running requests run out of them and are preempted.
    """
    from specontext_vllm.demo.server import device_arguments, has_gpu

    on_gpu = has_gpu()
    # vLLM's own CPU attention takes blocks of 32 tokens only; the tokens in all are the same.
    block_size = 32 if settings is None and not on_gpu else PAGE_SIZE
    pages = -(-pages * PAGE_SIZE // block_size)
    plugin = (
        []
        if settings is None
        else [
            "--attention-backend",
            "specontext",
            "--additional-config",
            json.dumps({"specontext": settings}),
        ]
    )
    return [
        *plugin,
        "--block-size",
        str(block_size),
        "--max-model-len",
        str(MAX_MODEL_LEN),
        "--max-num-seqs",
        str(max_num_seqs),
        "--max-num-batched-tokens",
        "512",
        "--served-model-name",
        "demo",
        "--gpu-memory-utilization",
        str(MEMORY_SHARE_GPU if on_gpu else MEMORY_SHARE_CPU),
        "--num-gpu-blocks-override",
        str(pages),
        *(
            ["--dtype", "float32", "--kv-cache-memory-bytes", str(KV_BYTES_GPU)]
            if on_gpu
            else device_arguments()
        ),
    ]


def metric(url: str, name: str) -> float:
    """Sum of a vLLM metric over its labels."""
    from prometheus_client.parser import text_string_to_metric_families

    with urllib.request.urlopen(f"{url}/metrics", timeout=30) as response:
        families = text_string_to_metric_families(response.read().decode())
        return sum(
            sample.value for family in families for sample in family.samples if sample.name == name
        )


def settle(server: Any, prompt: list[int], plugin: bool) -> dict[str, Any]:
    """Wait until the server is idle, and count what it still holds; the worker's ledger only
    where the ``plugin`` has one.

    One more short request tells the worker that the last ones have ended; it is itself still in the
    ledger then.
    """
    deadline = time.monotonic() + 60
    while (
        metric(server.url, "vllm:num_requests_running")
        + metric(server.url, "vllm:num_requests_waiting")
        and time.monotonic() < deadline
    ):
        time.sleep(0.5)
    body = json.dumps(
        {"model": "demo", "prompt": prompt[:4], "max_tokens": 2, "temperature": 0}
    ).encode()
    urllib.request.urlopen(
        urllib.request.Request(
            f"{server.url}/v1/completions", body, {"Content-Type": "application/json"}
        ),
        timeout=60,
    ).read()
    time.sleep(1)
    return {
        "running": metric(server.url, "vllm:num_requests_running"),
        "waiting": metric(server.url, "vllm:num_requests_waiting"),
        "kv_cache_usage": metric(server.url, "vllm:kv_cache_usage_perc"),
        "preemptions": metric(server.url, "vllm:num_preemptions_total"),
        "prefix_hit_tokens": metric(server.url, "vllm:prefix_cache_hits_total"),
        "ledger": server.rpc("specontext_audit") if plugin else {},
        "stats": server.rpc("specontext_stats") if plugin else {},
    }


def soak_engine(
    model: Path, load: Load, settings: dict[str, Any] | None, pages: int, max_num_seqs: int
) -> tuple[Outcome, dict[str, Any]]:
    """Start a server, apply the load, and look at what is left; ``(outcome, settle's figures)``."""
    from specontext_vllm.demo.server import VllmServer

    with VllmServer(model, server_arguments(settings, pages, max_num_seqs)) as server:
        return run_load(load, server, settings is not None)


def run_load(load: Load, server: Any, plugin: bool) -> tuple[Outcome, dict[str, Any]]:
    """Apply the load to a running server, with our ``plugin`` or without; see ``soak_engine``."""
    outcome = asyncio.run(apply_load(server, load))
    return outcome, settle(server, load.prompts[0], plugin)


@dataclass(frozen=True)
class Engine:
    """One server.

    Attributes:
        title: what the tables call it.
        settings: of the plugin; None: vLLM without it.
        pages: KV room, in pages of 16 tokens.
        exact: whether every token must be dense attention's.
    """

    title: str
    settings: dict[str, Any] | None
    pages: int
    exact: bool


ENGINES = {
    # A budget over every context: the tokens are dense attention's, under preemption too.
    "one-tier": Engine("one tier, budget over the context", {"budget": MAX_MODEL_LEN}, 321, True),
    # After a preemption the pages of generated tokens are computed again, densely, so that the
    # tokens of a small budget depend on when requests are preempted.
    "two-tiers": Engine(
        "two tiers, budget 192",
        {"budget": 192, "host_kv_gib": 0.5, "gpu_kv_gib": 0.026},
        401,
        False,
    ),
    # The control: what vLLM does by itself under this load, above all how its memory grows.
    "stock": Engine("stock vLLM", None, 321, True),
}


def settings_of(engine: Engine, shape: Shape) -> dict[str, Any] | None:
    """The engine's settings for a shape: as many tokens in both tiers, and random weights for its
    head too.
    """
    if engine.settings is None or shape.name == "demo":
        return engine.settings
    larger = shape.kv_bytes_per_token / Shape.named("demo").kv_bytes_per_token
    scaled = {
        key: value * larger if key in ("host_kv_gib", "gpu_kv_gib") else value
        for key, value in engine.settings.items()
    }
    return {"retrieval_head": "dummy", **scaled}
