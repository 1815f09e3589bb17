"""How many pages a worker's memory for KV holds, with one tier and with two, and what the log says
of it.

vLLM: an engine's workers on this machine, and its log.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from vllm.distributed.parallel_state import get_tp_group, in_the_same_node_as
from vllm.logger import init_logger

from specontext_vllm.config import CONFIG_KEY, PAGE_SIZE, ConfigError, SpeContextConfig
from specontext_vllm.engine.drafts import num_drafts
from specontext_vllm.engine.kv_group import Block
from specontext_vllm.engine.memory import (
    memory_model,
    override_pages,
    refuse_less_than_one_request,
)
from specontext_vllm.engine.names import ENGINES_KEY
from specontext_vllm.engine.our_layers import OurLayers
from specontext_vllm.engine.refusals import refuse_kv_groups
from specontext_vllm.residency.memory_model import MemoryModel, MemoryModelError, TierPlan
from specontext_vllm.residency.pool_size import worker_host_bytes
from specontext_vllm.retrieval.layer_selection import LayerSelector
from specontext_vllm.retrieval.protocol import Retriever
from specontext_vllm.sizes import in_gib

logger = init_logger("vllm.specontext")


class KVPlan:
    """How much KV a worker has memory for: planned from what vLLM offers, asked again once there is
    a KV cache.

    Args:
        vllm_config: the engine's configuration.
        layers: those that are selected for.
        retriever: what keeps something of each page of theirs.
    """

    def __init__(self, vllm_config: Any, layers: OurLayers, retriever: Retriever) -> None:
        self._vllm_config, self._layers, self._retriever = vllm_config, layers, retriever
        self._config = SpeContextConfig.from_additional_config(vllm_config.additional_config)
        self._tiers: TierPlan | None = None

    def num_blocks(self, gpu_bytes: int, block: Block) -> int:
        """Blocks that vLLM's scheduler may hand out when there are ``gpu_bytes`` of GPU memory for
        KV: what they hold beside the head's caches, together with the host pool. All workers must
        call it together.

        Args:
            block: what a block is like; see ``kv_group.expected_block``.
        Raises:
            ConfigError: a sentence with the numbers when that is too little; a host pool for
                several groups of layers.
        """
        memory = self._memory_model(block)
        if not self._config.host_kv_gib:
            return plan_one_tier(self._vllm_config, memory, gpu_bytes, block.num_bytes)
        refuse_kv_groups(self._config, block.groups)
        self._tiers = plan_two_tiers(
            self._vllm_config, memory, gpu_bytes, beside_others=block.apart_bytes is not None
        )
        return self._tiers.num_pages // memory.block_pages

    def _memory_model(self, block: Block) -> MemoryModel:
        shape = self._layers.shape
        kept_per_layer = LayerSelector.bytes_per_block(
            self._config,
            block.layers,
            shape.num_kv_heads,
            shape.head_dim,
            self._vllm_config.model_config.dtype,
        )
        return memory_model(
            self._vllm_config,
            len(self._layers.kv_names),
            shape,
            self._retriever.bytes_per_block + kept_per_layer,
            block.pages,
            block.other_bytes // block.pages,
            (block.apart_bytes or 0) if self._config.host_kv_gib else 0,
        )

    @property
    def lanes(self) -> int | None:
        """Requests that may run at once beside two tiers; None: there is one tier."""
        return self._tiers.lanes if self._tiers and self._tiers.host_layers else None

    def of_two_tiers(self, num_pages: int, is_profiling: bool) -> TierPlan | None:
        """The plan of both tiers for ``num_pages`` pages; None: there is one tier."""
        if not self._config.host_kv_gib or (self._tiers and not self._tiers.host_layers):
            return None
        if is_profiling:
            # vLLM captures a few graphs to learn what they take; they read the null frame only.
            hot = self._config.table_pages(
                self._vllm_config.model_config.max_model_len, num_drafts(self._vllm_config)
            )
            lanes = self._vllm_config.scheduler_config.max_num_seqs
            return TierPlan(num_pages, len(self._layers.kv_names), hot, 1, 0, 0, 0, {}, lanes)
        assert self._tiers is not None
        return replace(self._tiers, num_pages=min(self._tiers.num_pages, num_pages))


def plan_one_tier(vllm_config: Any, memory: MemoryModel, gpu_bytes: int, block_bytes: int) -> int:
    """Blocks that ``gpu_bytes`` of GPU memory hold with what the retriever keeps of them.

    Args:
        block_bytes: what vLLM counts for a block; see ``kv_group.expected_block``.
    Raises:
        ConfigError: a sentence with the numbers when gpu_kv_gib is too small.
    """
    refuse_less_than_one_request(vllm_config, memory, gpu_bytes, 0)
    retriever_bytes = memory.block_pages * memory.shape.retriever_page_bytes
    logger.info(
        "SpeContext: what the retriever keeps takes %.1f %% of the KV memory.",
        100 * retriever_bytes / (block_bytes + retriever_bytes),
    )
    return gpu_bytes // (block_bytes + retriever_bytes)


def plan_two_tiers(
    vllm_config: Any, memory: MemoryModel, gpu_bytes: int, *, beside_others: bool = False
) -> TierPlan:
    """What ``gpu_bytes`` of GPU memory and the host pool hold together; without a mirrored layer
    one tier is enough. All workers must call it together.

    Args:
        beside_others: other layers have blocks of their own, as they have beside two tiers alone.
    Raises:
        ConfigError: a sentence with the numbers when they hold too little, or beside other layers
            enough without the host pool.
    """
    config = SpeContextConfig.from_additional_config(vllm_config.additional_config)
    host_bytes = worker_host_bytes(
        config.host_kv_gib,
        memory.in_flight_bytes,
        workers=workers_on_this_machine(),
        engines=vllm_config.additional_config[ENGINES_KEY],
    )
    refuse_less_than_one_request(vllm_config, memory, gpu_bytes, host_bytes)
    try:
        plans = memory.plan if config.loading == "adaptive" else memory.plan_all_offloaded
        plan = plans(gpu_bytes, host_bytes, override_pages(vllm_config, memory))
    except MemoryModelError as error:
        raise ConfigError(f"additional_config.{CONFIG_KEY}.host_kv_gib: {error}") from None
    if plan.host_layers:
        _log_two_tiers(vllm_config, memory, plan, gpu_bytes)
    elif beside_others:
        raise ConfigError(
            f"additional_config.{CONFIG_KEY}.host_kv_gib: found {config.host_kv_gib}, but the "
            f"{plan.num_pages // memory.block_pages} blocks of --num-gpu-blocks-override fit "
            "without it; set it to 0, or ask for more blocks."
        )
    else:
        logger.warning(
            "SpeContext tiers: host_kv_gib %s, but no layer is mirrored: the %d blocks of "
            "--num-gpu-blocks-override take %s GiB, and the engine "
            "has %s GiB for KV without it. It runs with one tier; leave host_kv_gib out, or "
            "ask for more blocks.",
            config.host_kv_gib,
            plan.num_pages // memory.block_pages,
            *in_gib(plan.gpu_bytes, gpu_bytes),
        )
    return plan


def _log_two_tiers(vllm_config: Any, memory: MemoryModel, plan: TierPlan, gpu_bytes: int) -> None:
    on_gpu = vllm_config.device_config.device_type == "cuda"
    where = "on the GPU" if on_gpu else "in the engine's own memory for KV"
    logger.info(
        "SpeContext tiers: %d tokens fit, of which %d in all layers %s; %d of %d layers are "
        "mirrored in %.2f GiB of host "
        "memory; hot buffers of %d tokens a request; %.2f GiB %s.",
        plan.num_pages * PAGE_SIZE,
        memory.plan(gpu_bytes, 0).num_pages * PAGE_SIZE,
        where,
        plan.host_layers,
        memory.shape.num_layers,
        plan.host_bytes / 2**30,
        plan.hot_pages * PAGE_SIZE,
        plan.gpu_bytes / 2**30,
        where,
    )
    requests = plan.lanes
    if requests < memory.lanes:
        fixed = vllm_config.cache_config.num_gpu_blocks_override is not None
        config = SpeContextConfig.from_additional_config(vllm_config.additional_config)
        logger.info(
            "SpeContext tiers: %d requests run at once, each with hot buffers; others of "
            "--max-num-seqs %d wait, since more hot buffers %s.",
            requests,
            vllm_config.scheduler_config.max_num_seqs,
            "do not fit"
            if fixed or config.loading != "adaptive"
            else "would take more than half of what the host pool adds",
        )
    longest = memory.thresholds(plan, requests)
    if memory.other_bytes:
        logger.info(
            "SpeContext tiers: layers of other kinds have blocks of their own, %.2f GiB %s.",
            memory.other_bytes / 2**30,
            where,
        )
    logger.info(
        "SpeContext tiers: %d requests keep every layer %s up to %d tokens each, and fit up to "
        "%d with all mirrored layers offloaded.",
        requests,
        where,
        longest[0],
        longest[-1],
    )


def workers_on_this_machine() -> int:
    """Tensor-parallel workers of this engine that share this machine's memory; all workers must
    call it together.
    """
    group = get_tp_group()
    neighbours = 1
    for source in range(group.world_size if group.world_size > 1 else 0):
        same = in_the_same_node_as(group.cpu_group, source)
        if source == group.rank_in_group:
            neighbours = sum(same)
    return neighbours
