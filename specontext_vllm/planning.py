"""`specontext plan`: what the memory model says of a model's config, without starting an engine."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from specontext_vllm.config import PAGE_SIZE, ConfigError, SpeContextConfig, pages_for
from specontext_vllm.draft_plan import Drafter, LosslessPlan, plan_lossless, step_bytes
from specontext_vllm.model_config import (
    WINDOWED_KINDS,
    is_full,
    kv_heads,
    layer_kinds,
    num_full_layers,
    num_kv_layers,
    num_layers_with_kv,
)
from specontext_vllm.residency.hot_size import prior_rate
from specontext_vllm.residency.memory_model import OTHERS_KEPT, KVShape, MemoryModel, TierPlan
from specontext_vllm.residency.step_time import StepTime
from specontext_vllm.residency.table_rows import default_captured_rows

GIB = 2**30
UTILIZATION = 0.92
"""vLLM's default share of the GPU (vllm/config/cache.py, gpu_memory_utilization)."""
ACTIVATIONS = 2 * GIB
"""An assumption for activations and graphs, which vLLM measures when it starts."""


@dataclass(frozen=True)
class OtherLayers:
    """The layers of a model that do not attend to the whole context.

    Attributes:
        count: all of them. What they keep beside the KV of windows, states, is not counted.
        windowed: those that keep the KV of a window.
        window: its tokens.
        page_bytes: one page of one of these.
        readers: those that read the KV of one of these instead.
    """

    count: int = 0
    windowed: int = 0
    window: int = 0
    page_bytes: int = 0
    readers: int = 0

    @property
    def with_states(self) -> int:
        """Those that keep no KV, or a state."""
        return self.count - self.windowed - self.readers

    def kv_bytes(self, length: int) -> int:
        """Their KV of a request with a context of ``length`` tokens."""
        return self.windowed * self._window_bytes(length)

    def read_bytes(self, length: int) -> int:
        """What a step reads of it."""
        return (self.windowed + self.readers) * self._window_bytes(length)

    def _window_bytes(self, length: int) -> int:
        # A window begins anywhere in a page.
        return min(pages_for(length), pages_for(self.window) + 1) * self.page_bytes


@dataclass(frozen=True)
class Model:
    """The figures of a model that a plan needs.

    Attributes:
        kv: shape of its KV in layers of full attention.
        weight_bytes, head_bytes: its weights, and those of a retrieval head of its shape.
        max_model_len: the longest context that vLLM serves it with, in tokens.
        others: its other layers.
        readers: layers of full attention that read the KV of another one.
    """

    kv: KVShape
    weight_bytes: int
    head_bytes: int
    max_model_len: int
    others: OtherLayers = OtherLayers()
    readers: int = 0

    @property
    def read(self) -> KVShape:
        """The KV that a step reads: that of another layer once more."""
        return replace(self.kv, num_layers=self.kv.num_layers + self.readers)


def read_model(path: Path, kv_cache_dtype: str = "auto") -> Model:
    """Read a Hugging Face config.json. The weights are counted on torch's meta device; nothing is
    loaded.

    Args:
        path: folder of the model, or its config.json.
        kv_cache_dtype: vLLM's: "auto" for the model's own, "fp8" for 8-bit floats.
    Raises:
        ConfigError: no config.json, or not one of a causal language model that transformers knows.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    folder = path.parent if path.name == "config.json" else path
    if not (folder / "config.json").is_file():
        raise ConfigError(
            f"--model: {folder} holds no config.json; give a model's folder or its config.json."
        )
    try:
        config = AutoConfig.from_pretrained(str(folder))
        with torch.device("meta"):
            parameters = sum(
                p.numel() for p in AutoModelForCausalLM.from_config(config).parameters()
            )
        text = config.get_text_config()
        hidden, heads = text.hidden_size, text.num_attention_heads
        kinds, full, layers = layer_kinds(text), num_full_layers(text), num_kv_layers(text)
        places = [place for place, kind in enumerate(kinds) if is_full(kind, text)]
        num_kv_heads, head_dim = kv_heads(text, places[0] if places else 0)
        dtype = text.dtype if isinstance(text.dtype, torch.dtype) else torch.bfloat16
        itemsize = 1 if kv_cache_dtype == "fp8" else dtype.itemsize
        others = _other_layers(text, text.num_hidden_layers - full, itemsize)
        longest = _longest(text)
    except Exception as error:  # a broken config fails where one of its values is first used
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise ConfigError(
            f"--model: {folder}/config.json is not that of a causal language model that "
            f"transformers knows: {reason}"
        ) from None
    for found, what in (
        (layers == 0, "sliding windows or states in every layer"),
        (getattr(text, "kv_lora_rank", None), "multi-head latent attention (MLA)"),
    ):
        if found:
            raise ConfigError(
                f"--model: {folder}/config.json is of a model with {what}, whose memory plan does "
                "not know; plan for another one."
            )
    # The head: fc over three hidden states, q and k over two. Its cache: keys, and one fused aux
    # state a page. The planned GPU is assumed to have 8-bit floats, which the keys are kept in then
    # (retrieval/cache.py).
    head = 3 * hidden * hidden + 2 * hidden * head_dim * (heads + num_kv_heads)
    cache = num_kv_heads * PAGE_SIZE * head_dim + hidden * dtype.itemsize
    kv = KVShape(layers, num_kv_heads, head_dim, itemsize, cache)
    return Model(
        kv, parameters * dtype.itemsize, head * dtype.itemsize, longest, others, full - layers
    )


def _other_layers(text: Any, count: int, itemsize: int) -> OtherLayers:
    """The layers of a text model that do not attend to the whole context.

    Args:
        itemsize: bytes of one element of their KV.
    """
    windowed = [place for place, kind in enumerate(layer_kinds(text)) if kind in WINDOWED_KINDS]
    window = getattr(text, "sliding_window", None) or getattr(text, "attention_chunk_size", None)
    if not count or not windowed or not window:
        return OtherLayers(count)
    heads, width = kv_heads(text, windowed[0])
    readers = len(windowed) - sum(place < num_layers_with_kv(text) for place in windowed)
    page_bytes = heads * PAGE_SIZE * 2 * width * itemsize
    return OtherLayers(count, len(windowed) - readers, window, page_bytes, readers)


def _longest(config: Any) -> int:
    """The longest context of a language model, as vLLM derives it (vllm/config/model.py,
    _get_and_verify_max_len): scaled by RoPE's factor where the config gives the length before
    scaling."""
    rope = getattr(config, "rope_parameters", None) or {}
    scaled = rope.get("rope_type") in (
        "su",
        "longrope",
        "llama3",
        "yarn",
        "deepseek_yarn",
        "deepseek_llama_scaling",
    )
    derived = int(config.max_position_embeddings * (1 if scaled else rope.get("factor") or 1))
    return max(derived, getattr(config, "model_max_length", None) or 0)


@dataclass(frozen=True)
class Plan:
    """A planned engine under a load of equal requests.

    Attributes:
        asked: vLLM's max_num_seqs.
        requests: those that run at once, and the number of equal requests in the tables.
        kv_bytes: room on the GPU for KV, the head's caches and tables.
        tiers: the memory model's plan.
        alone: its plan without a host pool.
        thresholds: S_T[i] in tokens, i = 0..M.
        rows: figures of one context length each; see ``plan_report.lengths_table``.
        drafter: the draft model, if there is one.
        lossless: of an engine in lossless mode.
    """

    model: Model
    asked: int
    requests: int
    gpu_bytes: int
    kv_bytes: int
    tiers: TierPlan
    alone: TierPlan
    thresholds: list[int]
    rows: list[dict[str, Any]]
    drafter: Drafter | None = None
    lossless: LosslessPlan | None = None


def make_plan(
    model: Model,
    config: SpeContextConfig,
    *,
    gpu_bytes: int,
    host_bytes: int,
    requests: int,
    max_model_len: int,
    miss_rate: float | None,
    link_bytes_per_s: float,
    drafter: Drafter | None = None,
) -> Plan:
    """Plan an engine.

    Args:
        gpu_bytes: memory of the GPU.
        host_bytes: host pool; 0 for none.
        requests: vLLM's max_num_seqs.
        max_model_len: longest context, in tokens.
        miss_rate: share of the budget's pages fetched in a step; None for the engine's own estimate
            before it has measured (``prior_rate``).
        link_bytes_per_s: bandwidth of the PCIe link.
        drafter: the draft model of --speculative-config.
    Raises:
        ConfigError, MemoryModelError: one sentence with the numbers.
    """
    if not PAGE_SIZE <= max_model_len <= model.max_model_len:
        raise ConfigError(
            f"--length: found {max_model_len}; give {PAGE_SIZE} to {model.max_model_len} tokens, "
            "the model's own longest context."
        )
    if host_bytes and config.budget >= max_model_len:
        raise ConfigError(
            f"--budget: found {config.budget}, which holds the longest context ({max_model_len} "
            "tokens) whole, so that nothing could be left on the host; "
            f"give less, or --host-gib 0."
        )
    if config.is_lossless and (host_bytes or drafter):
        option, found = ("--host-gib", f"{host_bytes / GIB:g}") if host_bytes else ("--drafter", "")
        raise ConfigError(
            f"{option}: found {found or 'a folder'} with --mode lossless, in which the model "
            "drafts for itself and verifies over all pages on the GPU; leave it out."
        )
    if host_bytes and model.others.with_states:
        raise ConfigError(
            f"--host-gib: found {host_bytes / GIB:g}, but {model.others.with_states} layers of "
            "this model keep no KV, or a state, whose size this command does not know; give 0."
        )
    if host_bytes and model.others.windowed and drafter:
        raise ConfigError(
            f"--host-gib: found {host_bytes / GIB:g} with --drafter, and {model.others.windowed} "
            "layers of this model have windows; leave one of the two out."
        )
    beside = requests * model.others.kv_bytes(max_model_len) * (OTHERS_KEPT if host_bytes else 1)
    room = int(UTILIZATION * gpu_bytes) - model.weight_bytes - model.head_bytes - ACTIVATIONS
    room -= beside
    shape = model.kv
    if drafter is not None:
        room -= drafter.weight_bytes
        shape = replace(shape, drafter_page_bytes=drafter.page_bytes(shape.itemsize))
    if room <= 0:
        raise ConfigError(
            f"--gpu-gib: {UTILIZATION:.0%} of {gpu_bytes / GIB:.1f} GiB do not hold the weights "
            f"({model.weight_bytes / GIB:.1f} GiB), the "
            f"retrieval head ({model.head_bytes / GIB:.2f} GiB), {ACTIVATIONS / GIB:.0f} GiB "
            "for activations and what layers with windows keep "
            f"({beside / GIB:.2f} GiB); give more."
        )
    memory = MemoryModel(
        shape,
        budget_pages=config.budget_pages,
        table_pages=config.table_pages(max_model_len),
        max_num_seqs=requests,
        max_model_len=max_model_len,
        captured_rows=default_captured_rows(requests),
    )
    tiers = memory.plan(room, host_bytes)
    alone = memory.plan(room, 0)
    asked, requests = requests, tiers.lanes
    if miss_rate is None:
        miss_rate = prior_rate(tiers.hot_pages, config.table_pages(max_model_len))
    rows = []
    for length in _lengths(max_model_len):
        others = requests * model.others.read_bytes(length)
        full = requests * pages_for(length) * model.read.page_bytes * model.read.num_layers
        # Read in every step, like the weights.
        law = StepTime(
            model.weight_bytes + model.head_bytes + others, link_bytes_per_s=link_bytes_per_s
        )
        offloaded = memory.offloaded_layers(tiers, length, requests)
        row: dict[str, Any] = {
            "length": length,
            "full_share": full / (full + others),
            "dense_ms": 1e3 * law.dense_step(model.read, requests=requests, length=length),
        }
        if offloaded is not None:
            compute, transfer, moved = law.step(
                model.read,
                requests=requests,
                length=length,
                budget_pages=config.budget_pages,
                offloaded=offloaded,
                miss_rate=miss_rate,
            )
            kv = requests * pages_for(length) * model.kv.page_bytes
            row |= {
                "resident": model.kv.num_layers - offloaded,
                "moved_mb": moved / 1e6,
                "compute_ms": 1e3 * compute,
                "transfer_ms": 1e3 * transfer,
                "step_ms": 1e3 * max(compute, transfer),
                "gpu_gib": (
                    kv * (model.kv.num_layers - offloaded)
                    + offloaded * requests * tiers.hot_pages * model.kv.page_bytes
                    + requests * model.others.kv_bytes(length)
                )
                / GIB,
                "host_gib": kv * tiers.host_layers / GIB,
            }
        rows.append(row)
    if not any("resident" in row for row in rows):
        raise ConfigError(
            f"--requests: {requests} requests of {rows[0]['length']} tokens each do not fit; both "
            f"tiers hold {tiers.num_pages * PAGE_SIZE} tokens; "
            f"ask for fewer, or give more memory."
        )
    lossless = None
    if config.is_lossless:
        weights = model.weight_bytes + model.head_bytes
        read = step_bytes(model.read, weights, config.budget)
        lossless = plan_lossless(read, requests, [row["length"] for row in rows])
    return Plan(
        model,
        asked,
        requests,
        gpu_bytes,
        room,
        tiers,
        alone,
        memory.thresholds(tiers, requests),
        rows,
        drafter,
        lossless,
    )


def _lengths(longest: int) -> list[int]:
    lengths = [1024 * 2**i for i in range(20) if 1024 * 2**i < longest]
    middles = [3 * n // 2 for n in lengths if n >= 8192 and 3 * n // 2 < longest]
    return sorted({*lengths, *middles, longest})
