"""The parts of a worker's runtime, made from vLLM's configuration.

vLLM: this worker's rank, what a model can hand out, and its log.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor
from vllm.config import CUDAGraphMode
from vllm.distributed.parallel_state import get_tensor_model_parallel_rank
from vllm.logger import init_logger
from vllm.model_executor.models.interfaces import supports_eagle3

from specontext_vllm.config import CONFIG_KEY, ConfigError, SpeContextConfig, pages_for
from specontext_vllm.engine.drafts import num_drafts, refuse_other_aux_layers
from specontext_vllm.engine.embedding import embedding_of
from specontext_vllm.engine.find_head import load_head
from specontext_vllm.engine.kv_dtype import kv_dtype
from specontext_vllm.engine.layers import LayerShape
from specontext_vllm.engine.metadata import max_table_rows
from specontext_vllm.engine.names import AUX_LAYERS_KEY, BACKEND_NAME
from specontext_vllm.engine.our_layers import OurLayers
from specontext_vllm.engine.pipeline import FollowingRetriever, Stages, hand_out_aux
from specontext_vllm.residency.host_pool import HostPoolError
from specontext_vllm.residency.memory_model import TierPlan
from specontext_vllm.residency.tiers import TieredKV
from specontext_vllm.retrieval.checkpoint import HeadCheckpoint, describe_aux_layers
from specontext_vllm.retrieval.draft_lists import DraftLists
from specontext_vllm.retrieval.graphs import StepGraphs
from specontext_vllm.retrieval.head import RetrievalHead
from specontext_vllm.retrieval.layer_selection import LayerSelector
from specontext_vllm.retrieval.local import LocalRetriever
from specontext_vllm.retrieval.protocol import Retriever
from specontext_vllm.retrieval.shard import shard_checkpoint
from specontext_vllm.sidecar.remote import RemoteRetriever
from specontext_vllm.step_data import PageTable

logger = init_logger("vllm.specontext")


def make_retriever(
    vllm_config: Any,
    config: SpeContextConfig,
    model: Any,
    shape: LayerShape,
    device: torch.device,
    drafter: torch.nn.Module | None = None,
    stages: Stages | None = None,
) -> Retriever:
    """The retriever of one worker; the model hands out what its head reads from now on.

    Args:
        model: the loaded target.
        shape: of the layers that are selected for.
        drafter: a loaded EAGLE-3 draft model, some of whose weights may be the head's.
        stages: of a pipeline, whose first one alone has the head.
    Raises:
        ConfigError: the model cannot hand out auxiliary hidden states.
    """
    follows = stages is not None and not stages.is_first
    kind = FollowingRetriever if follows else LocalRetriever
    if config.retrieval_head is None:
        return _make_local(vllm_config, config, None, model, shape, device, kind=kind)
    if not supports_eagle3(model):
        raise ConfigError(
            f"model: {type(model).__name__} cannot hand out the hidden states that an "
            "EAGLE-3 head reads (vLLM's "
            "SupportsEagle3); use a model that can, or "
            f"additional_config.{CONFIG_KEY}.retriever quest, which needs none."
        )
    aux_layers = vllm_config.additional_config[AUX_LAYERS_KEY]
    refuse_other_aux_layers(vllm_config, model, aux_layers)
    hand_out_aux(model, aux_layers, stages)
    if follows:
        return _make_local(vllm_config, config, None, model, shape, device, kind=kind)
    checkpoint = load_head(config.retrieval_head, vllm_config)
    tp = vllm_config.parallel_config.tensor_parallel_size
    if tp > 1:
        checkpoint = shard_checkpoint(checkpoint, rank=get_tensor_model_parallel_rank(), size=tp)
    if config.sidecar == "ray":
        retriever: Retriever = _make_remote(vllm_config, config, checkpoint, model, shape, device)
    else:
        retriever = _make_local(vllm_config, config, checkpoint, model, shape, device, drafter)
    weights = sum(tensor.numel() for tensor in checkpoint.tensors.values())
    logger.info(
        "SpeContext retrieval head: %s, %.1f MB, keys in %s, aux layers %s; settings %s",
        config.retrieval_head,
        weights * vllm_config.model_config.dtype.itemsize / 1e6,
        str(retriever.key_dtype).removeprefix("torch."),
        describe_aux_layers(checkpoint.spec, aux_layers),
        config.model_dump_json(exclude_none=True),
    )
    return retriever


def _make_local(
    vllm_config: Any,
    config: SpeContextConfig,
    checkpoint: HeadCheckpoint | None,
    model: Any,
    shape: LayerShape,
    device: torch.device,
    drafter: torch.nn.Module | None = None,
    kind: type[LocalRetriever] = LocalRetriever,
) -> Retriever:
    model_config, parallel = vllm_config.model_config, vllm_config.parallel_config
    max_model_len, head = model_config.max_model_len, None
    if checkpoint is not None:
        head = RetrievalHead(
            checkpoint,
            max_position=max_model_len,
            dtype=model_config.dtype,
            device=device,
            # Asleep the head keeps its weights, and the drafter may lose its own.
            others=()
            if drafter is None or model_config.enable_sleep_mode
            else list(drafter.parameters()),
        )
        if head.shared_bytes:
            logger.info(
                "SpeContext: %.1f of the head's %.1f MB are the drafter's own weights.",
                head.shared_bytes / 1e6,
                head.num_bytes / 1e6,
            )
    # Captured by us, vLLM's exchange between workers would want a context of its own.
    exchanges = parallel.tensor_parallel_size > 1
    return kind(
        config,
        head,
        embedding_of(model, model_config.get_vocab_size()),
        num_kv_heads=shape.num_kv_heads,
        max_model_len=max_model_len,
        table_pages=config.allocated_table_pages(
            max_model_len, device.type, num_drafts(vllm_config)
        ),
        device=device,
        max_rows=max_table_rows(vllm_config),
        embeds_outside=exchanges,
        num_drafts=num_drafts(vllm_config),
    )


def _make_remote(
    vllm_config: Any,
    config: SpeContextConfig,
    checkpoint: HeadCheckpoint,
    model: Any,
    shape: LayerShape,
    device: torch.device,
) -> Retriever:
    model_config, scheduler = vllm_config.model_config, vllm_config.scheduler_config
    return RemoteRetriever(
        config,
        checkpoint,
        embedding_of(model, model_config.get_vocab_size()),
        vocab_size=model_config.get_vocab_size(),
        num_kv_heads=shape.num_kv_heads,
        max_model_len=model_config.max_model_len,
        max_rows=scheduler.max_num_seqs,
        max_tokens=scheduler.max_num_batched_tokens,
        dtype=model_config.dtype,
        device=device,
    )


def make_graphs(
    vllm_config: Any, config: SpeContextConfig, device: torch.device
) -> StepGraphs | None:
    """Where vLLM replays decode steps as whole graphs, so do we."""
    mode = vllm_config.compilation_config.cudagraph_mode
    whole = device.type == "cuda" and mode is not None and mode.decode_mode() == CUDAGraphMode.FULL
    # An actor's kernels cannot be captured here. What selects per layer is part of vLLM's graphs,
    # and cannot change then.
    ours = config.sidecar != "ray" and not config.rule.per_layer
    return StepGraphs(device) if whole and ours else None


def make_selector(
    vllm_config: Any, config: SpeContextConfig, shape: LayerShape, totals: Tensor
) -> LayerSelector:
    """What selects in each layer; ``totals`` are the rows' budgets, see ``Retriever``."""
    return LayerSelector(
        config,
        num_heads=shape.num_heads,
        num_kv_heads=shape.num_kv_heads,
        head_dim=shape.head_dim,
        max_pages=pages_for(vllm_config.model_config.max_model_len),
        totals=totals,
        device=totals.device,
    )


@torch.inference_mode()
def make_tiers(
    vllm_config: Any,
    config: SpeContextConfig,
    plan: TierPlan,
    layers: OurLayers,
    device: torch.device,
    frames_memory: Callable[[], AbstractContextManager[Any]],
) -> TieredKV:
    """The two tiers of our layers' KV, their frames in ``frames_memory``.

    Raises:
        ConfigError: the host pool cannot be had.
    """
    model = vllm_config.model_config
    try:
        return TieredKV(
            plan,
            num_layers=len(layers.kv_names),
            num_kv_heads=layers.shape.num_kv_heads,
            head_dim=layers.shape.head_dim,
            dtype=kv_dtype(vllm_config),
            max_requests=plan.lanes,
            max_rows=max_table_rows(vllm_config),
            table_pages=config.table_pages(model.max_model_len, num_drafts(vllm_config)),
            max_pages=pages_for(model.max_model_len),
            keep_unreferenced=bool(vllm_config.cache_config.enable_prefix_caching),
            timed=config.stats,
            order=layers.kv_order,
            loading=config.loading,
            frames_memory=frames_memory,
            device=device,
        )
    except HostPoolError as error:
        raise ConfigError(f"additional_config.{CONFIG_KEY}.{error}") from None


def make_draft_lists(
    vllm_config: Any,
    config: SpeContextConfig,
    table: PageTable,
    kv_group: int,
    drafters_groups: Sequence[Any],
) -> DraftLists | None:
    """Let an EAGLE-3 drafter read the target's pages, where its KV is laid out as the target's: in
    the same blocks and with as many KV heads. None: it reads all.

    Args:
        table: the target's.
        kv_group: the index of our layers' KV-cache group.
        drafters_groups: the AttentionGroups with which it drafts token after token.
    """
    drafts, speculative = num_drafts(vllm_config), vllm_config.speculative_config
    builders = [
        group.get_metadata_builder()
        for group in drafters_groups
        if group.backend.get_name() == BACKEND_NAME
        and group.kv_cache_group_id == kv_group
        and group.kv_cache_spec.num_kv_heads == table.num_kv_heads
    ]
    # The first draft is made with the target's own step.
    if not builders or drafts == 1 or speculative.method != "eagle3" or table.groups > 1:
        return None
    lists = DraftLists(
        table.rows,
        table.num_kv_heads,
        table.max_pages,
        num_drafts=drafts,
        sink_pages=pages_for(config.sink_tokens),
        device=table.pages.device,
    )
    for builder in builders:
        builder.draft_lists = lists
        builder.provider.warm_up(lists.table)
    return lists
