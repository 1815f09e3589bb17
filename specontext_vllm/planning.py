"""`specontext plan`: what the memory model says of a model's config, without starting an engine."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from specontext_vllm.config import PAGE_SIZE, ConfigError, SpeContextConfig, pages_for
from specontext_vllm.draft_plan import Drafter, LosslessPlan, plan_lossless, step_bytes
from specontext_vllm.model_config import (
    is_full,
    kv_heads,
    layer_kinds,
    num_full_layers,
    num_kv_layers,
)
from specontext_vllm.other_layers import OtherLayers, dtype_of, other_layers, refuse_beside_others
from specontext_vllm.residency.hot_size import prior_rate
from specontext_vllm.residency.memory_model import KVShape, MemoryModel, TierPlan
from specontext_vllm.residency.step_time import StepTime
from specontext_vllm.residency.table_rows import default_captured_rows

GIB = 2**30
UTILIZATION = 0.92
"""vLLM's default share of the GPU (vllm/config/cache.py, gpu_memory_utilization)."""
ACTIVATIONS = 2 * GIB
"""An assumption for activations and graphs, which vLLM measures when it starts."""


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

    @property
    def block_pages(self) -> int:
        """Pages of a vLLM block, which is longer where a state must fit into one."""
        states = self.others.states
        return 1 if states is None else states.block_tokens // PAGE_SIZE

    @property
    def empty_page_bytes(self) -> int:
        """What vLLM adds to a page where layers of full attention do not fill their groups, and
        where they are in several: each has caches of the head.
        """
        states, kv = self.others.states, self.kv
        if states is None:
            return 0
        groups = -(-kv.num_layers // states.group_layers)
        empty = groups * states.group_layers - kv.num_layers
        return empty * kv.page_bytes + (groups - 1) * kv.retriever_page_bytes

    def beside_bytes(self, requests: int, length: int, *, host: bool) -> int:
        """GPU memory for the other layers of so many requests of ``length`` tokens, with two tiers
        or with one.
        """
        if host:
            return self.others.apart_bytes(length, requests)
        extra = self.block_pages * self.kv.retriever_page_bytes
        return requests * self.others.held_bytes(length, extra)


def read_model(path: Path, kv_cache_dtype: str = "auto", prefix_caching: bool = True) -> Model:
    """Read a Hugging Face config.json. The weights are counted on torch's meta device; nothing is
    loaded.

    Args:
        path: folder of the model, or its config.json.
        kv_cache_dtype: vLLM's: "auto" for the model's own, "fp8" for 8-bit floats.
        prefix_caching: vLLM's --enable-prefix-caching.
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
        dtype = dtype_of(text)
        itemsize = 1 if kv_cache_dtype == "fp8" else dtype.itemsize
        others = other_layers(text, full, dtype, itemsize, prefix_caching)
        longest = _longest(text)
    except Exception as error:  # a broken config fails where one of its values is first used
        reason = " ".join(str(error).split()) or type(error).__name__
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
    refuse_beside_others(
        model.others, host_bytes, drafts=drafter is not None, lossless=config.is_lossless
    )
    room = int(UTILIZATION * gpu_bytes) - model.weight_bytes - model.head_bytes - ACTIVATIONS
    shape = model.kv
    if drafter is not None:
        room -= drafter.weight_bytes
        shape = replace(shape, drafter_page_bytes=drafter.page_bytes(shape.itemsize))
    beside = {
        host: model.beside_bytes(requests, max_model_len, host=host)
        for host in (False, bool(host_bytes))
    }
    if room <= max(beside.values()):
        raise ConfigError(
            f"--gpu-gib: {UTILIZATION:.0%} of {gpu_bytes / GIB:.1f} GiB do not hold the weights "
            f"({model.weight_bytes / GIB:.1f} GiB), the "
            f"retrieval head ({model.head_bytes / GIB:.2f} GiB), {ACTIVATIONS / GIB:.0f} GiB "
            "for activations and what layers with windows or states keep "
            f"({max(beside.values()) / GIB:.2f} GiB); give more."
        )

    def memory_model(host: bool) -> MemoryModel:
        # Beside two tiers vLLM's groups share no blocks, so none is filled up.
        empty = 0 if host else model.empty_page_bytes
        return MemoryModel(
            replace(shape, empty_page_bytes=empty),
            budget_pages=config.budget_pages,
            table_pages=config.table_pages(max_model_len),
            max_num_seqs=requests,
            max_model_len=max_model_len,
            captured_rows=default_captured_rows(requests),
            block_pages=model.block_pages,
        )

    memory = memory_model(bool(host_bytes))
    tiers = memory.plan(room - beside[bool(host_bytes)], host_bytes)
    alone = memory_model(False).plan(room - beside[False], 0)
    asked, requests = requests, tiers.lanes
    if miss_rate is None:
        miss_rate = prior_rate(tiers.hot_pages, config.table_pages(max_model_len))
    rows = []
    for length in _lengths(max_model_len):
        others = requests * (model.others.read_bytes(length) + model.others.state_bytes)
        full = requests * pages_for(length) * model.read.page_bytes * model.read.num_layers
        # Read in every step, like the weights.
        read = requests * model.others.step_bytes(length)
        law = StepTime(
            model.weight_bytes + model.head_bytes + read, link_bytes_per_s=link_bytes_per_s
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
                    + requests * model.others.held_bytes(length)
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
        bytes_read = step_bytes(model.read, weights, config.budget)
        lossless = plan_lossless(bytes_read, requests, [row["length"] for row in rows])
    return Plan(
        model,
        asked,
        requests,
        gpu_bytes,
        room - beside[bool(host_bytes)],
        tiers,
        alone,
        [min(n, max_model_len) for n in memory.thresholds(tiers, requests)],
        rows,
        drafter,
        lossless,
    )


def _lengths(longest: int) -> list[int]:
    lengths = [1024 * 2**i for i in range(20) if 1024 * 2**i < longest]
    middles = [3 * n // 2 for n in lengths if n >= 8192 and 3 * n // 2 < longest]
    return sorted({*lengths, *middles, longest})
