"""Engines that the backend cannot serve: one sentence each, from vLLM's configuration alone.

vLLM: how a step's graphs are captured.
"""

from __future__ import annotations

import importlib.util
import os
from typing import Any

from specontext_vllm import cpu_kernels
from specontext_vllm.config import CONFIG_KEY, PAGE_SIZE, ConfigError, SpeContextConfig
from specontext_vllm.engine.connector import found_connector, our_connector, refuse_connector
from specontext_vllm.engine.drafts import refuse_drafts
from specontext_vllm.engine.kv_dtype import refuse_kv_dtype
from specontext_vllm.engine.layers import NO_FULL_LAYER
from specontext_vllm.engine.names import (
    CPU_WORKER,
    GPU_WORKER,
    OFFLOADING_CONNECTOR,
    SCHEDULERS,
)
from specontext_vllm.model_config import has_windowed_layers, num_full_layers
from specontext_vllm.residency.host_memory import free_host_memory, machine_memory
from specontext_vllm.sizes import in_gib

KV_UPDATE = "vllm::unified_kv_cache_update"
"""The op in which a layer's keys and values are stored."""


def refuse_platform(platform: Any) -> None:
    """Raise a ConfigError where the kernels have never run, or nobody knows which ones shall."""
    if not (platform.is_cuda() or platform.is_cpu()):
        raise ConfigError(
            f"--attention-backend: found specontext on vLLM's platform "
            f"{platform.device_name.upper()}, but "
            "its kernels are for NVIDIA GPUs and CPUs; use another backend."
        )
    switch = os.environ.get(cpu_kernels.SWITCH, "1")
    if platform.is_cpu() and switch not in ("0", "1"):
        raise ConfigError(
            f"{cpu_kernels.SWITCH}: found {switch!r}; give 0 (plain torch) or 1, or unset it."
        )


def refuse_runner(vllm_config: Any, is_cpu: bool) -> None:
    """Raise a ConfigError where vLLM chose the model runner that this platform's worker does not
    drive: V2 on a CPU, V1 on a GPU.
    """
    if vllm_config.use_v2_model_runner and is_cpu:
        raise ConfigError(
            "VLLM_USE_V2_MODEL_RUNNER: vLLM chose its V2 model runner, which --attention-backend "
            "specontext does not drive on a CPU; set it to 0, "
            "or drop the option that forces V2 (vLLM's log names it)."
        )
    if not vllm_config.use_v2_model_runner and not is_cpu:
        raise ConfigError(
            "VLLM_USE_V2_MODEL_RUNNER: vLLM chose its V1 model runner, which --attention-backend "
            "specontext does not drive on a GPU; unset it, or "
            "drop the option that forces V1 (vLLM's log names it)."
        )


def refuse_unproven(vllm_config: Any, platform: Any) -> None:
    """Raise a ConfigError for what has run on a CPU alone and is other code on a GPU."""
    if not platform.is_cuda():
        return
    if (stages := vllm_config.parallel_config.pipeline_parallel_size) > 1:
        raise ConfigError(
            f"--pipeline-parallel-size: found {stages}, but on a GPU it has not been shown yet "
            "that all stages read what --attention-backend specontext selects; use "
            "--tensor-parallel-size."
        )
    if (name := our_connector(vllm_config)) is None:
        return
    if not vllm_config.model_config.enforce_eager:
        raise ConfigError(
            f"--kv-transfer-config: found kv_connector {name!r} with CUDA graphs, but on a GPU it "
            "has been shown only without them that it moves what the head of "
            "--attention-backend specontext keeps; add --enforce-eager, or use "
            f"{OFFLOADING_CONNECTOR}."
        )
    if (buffer := vllm_config.kv_transfer_config.kv_buffer_device) != "cuda":
        raise ConfigError(
            f"--kv-transfer-config: found kv_buffer_device {buffer!r}, but on a GPU it has not "
            "been shown yet that what the head of --attention-backend specontext keeps goes "
            'through host memory; use "cuda".'
        )


def refuse_unsupported(vllm_config: Any) -> None:
    """Raise a ConfigError for an engine that the backend cannot serve yet."""
    model, cache, parallel = (
        vllm_config.model_config,
        vllm_config.cache_config,
        vllm_config.parallel_config,
    )
    text = model.hf_text_config
    refusals = [
        (
            model.runner_type != "generate",
            f"--runner: found {model.runner_type!r}",
            "it serves text generation only",
        ),
        (
            model.use_mla,
            f"model: {model.model} uses multi-head latent attention (MLA)",
            "its latent pages are not served yet",
        ),
        (
            model.is_attention_free,
            f"model: {model.model} keeps no KV (Mamba or linear attention in every layer)",
            "there is nothing to select from",
        ),
        (
            model.is_encoder_decoder,
            f"model: {model.model} is an encoder-decoder",
            "it serves decoder-only models",
        ),
        (
            model.is_mm_prefix_lm,
            f"model: {model.model} lets the tokens of an image attend to later ones",
            "prompts are causal here; serve its text alone (--language-model-only), or another "
            "model",
        ),
        (
            model.enable_prompt_embeds,
            "--enable-prompt-embeds: on",
            "the retrieval head reads token ids; leave it off",
        ),
        (
            bool(getattr(text, "dual_chunk_attention_config", None)),
            f"model: {model.model} has dual chunk attention",
            "every layer must be full attention",
        ),
        (
            vllm_config.scheduler_config.scheduler_cls not in (None, *SCHEDULERS.values()),
            f"--scheduler-cls: found {vllm_config.scheduler_config.scheduler_cls}",
            "it brings a scheduler of its own; leave it out",
        ),
        (
            parallel.worker_cls not in ("auto", CPU_WORKER, GPU_WORKER),
            f"--worker-cls: found {parallel.worker_cls}",
            "it brings a worker of its own, which selects no pages; leave it out, or use "
            "--worker-extension-cls",
        ),
        (
            parallel.decode_context_parallel_size > 1,
            f"--decode-context-parallel-size: found {parallel.decode_context_parallel_size}",
            "use 1",
        ),
        (
            parallel.prefill_context_parallel_size > 1,
            f"--prefill-context-parallel-size: found {parallel.prefill_context_parallel_size}",
            "use 1",
        ),
        (
            parallel.enable_dbo,
            "--enable-dbo: on",
            "dual-batch overlap splits the batch the head scores; leave it off",
        ),
        (
            cache.kv_sharing_fast_prefill,
            "--kv-sharing-fast-prefill: on",
            "it leaves prompt tokens out of layers that share KV; leave it off",
        ),
        (
            cache.user_specified_block_size and cache.block_size % PAGE_SIZE != 0,
            f"--block-size: found {cache.block_size}",
            f"a block holds whole pages of {PAGE_SIZE} tokens; leave it out, or use a multiple of "
            f"{PAGE_SIZE}",
        ),
    ]
    for refused, found, remedy in refusals:
        if refused:
            raise ConfigError(
                f"{found}, which --attention-backend specontext does not support: {remedy}."
            )
    refuse_connector(vllm_config)
    refuse_kv_dtype(vllm_config)
    if num_full_layers(text) == 0:
        raise ConfigError(NO_FULL_LAYER.format(model=model.model))
    config = SpeContextConfig.from_additional_config(vllm_config.additional_config)
    if parallel.pipeline_parallel_size > 1:
        refuse_pipeline(vllm_config, config)
    if config.host_kv_gib:
        refuse_mixed_tiers(vllm_config, config)
    if vllm_config.speculative_config is not None and not config.is_lossless:
        refuse_drafts(vllm_config, config)


def refuse_pipeline(vllm_config: Any, config: SpeContextConfig) -> None:
    """Raise a ConfigError for what has not been shown with layers in several stages."""
    model, parallel = vllm_config.model_config, vllm_config.parallel_config
    ours = f"additional_config.{CONFIG_KEY}."
    connector = found_connector(vllm_config)
    for found, is_there in (
        (f"{ours}mode 'lossless'", config.is_lossless),
        (f"{ours}host_kv_gib {config.host_kv_gib}", bool(config.host_kv_gib)),
        (f"{ours}sidecar {config.sidecar!r}", config.sidecar != "inline"),
        ("--speculative-config", vllm_config.speculative_config is not None),
        (f"{connector}".partition(":")[0], connector is not None),
        (
            f"{model.model}, which has layers of other kinds than full attention",
            model.is_hybrid or has_windowed_layers(model.hf_text_config),
        ),
        (f"{model.model}, which takes images or audio", model.is_multimodal_model),
        (
            "--distributed-executor-backend external_launcher",
            parallel.distributed_executor_backend == "external_launcher",
        ),
    ):
        if is_there:
            raise ConfigError(
                f"--pipeline-parallel-size: found {parallel.pipeline_parallel_size} with {found}, "
                "which has not been shown to work together; use --tensor-parallel-size, or leave "
                "that out."
            )


def refuse_mixed_tiers(vllm_config: Any, config: SpeContextConfig) -> None:
    """Raise a ConfigError for a host pool with windows beside states."""
    model = vllm_config.model_config
    if model.is_hybrid and has_windowed_layers(model.hf_text_config):
        raise ConfigError(
            f"additional_config.{CONFIG_KEY}.host_kv_gib: found {config.host_kv_gib}, but "
            f"{model.model} has layers with windows beside such that keep a state, whose blocks "
            "vLLM clears by their place on the GPU, which two tiers have others for; set it to 0."
        )


def refuse_sidecar(vllm_config: Any) -> None:
    """Raise a ConfigError where the head cannot run in a Ray actor."""
    parallel = vllm_config.parallel_config
    setting = f"additional_config.{CONFIG_KEY}.sidecar: found 'ray'"
    if importlib.util.find_spec("ray") is None:
        raise ConfigError(
            f"{setting}, but Ray is not installed; pip install 'specontext-vllm[sidecar]' or use "
            "sidecar inline."
        )
    if vllm_config.model_config.enable_sleep_mode:
        raise ConfigError(
            f"{setting} with --enable-sleep-mode; the actor would keep its memory, and its copy of "
            "the embedding when the model's weights change: use sidecar inline."
        )
    if vllm_config.weight_transfer_config is not None:
        raise ConfigError(
            f"{setting} with --weight-transfer-config; the actor would keep its copy of the "
            "embedding when the model's weights change: use sidecar inline."
        )
    if parallel.tensor_parallel_size > 1:
        raise ConfigError(
            f"{setting} with --tensor-parallel-size {parallel.tensor_parallel_size}; a restarted "
            "actor asks its worker for the embedding, "
            f"which several workers only hold together: use sidecar inline."
        )
    if parallel.use_ray:
        raise ConfigError(
            f"{setting} with --distributed-executor-backend ray; the head's actor would inherit "
            "the devices and the placement of vLLM's own "
            f"actors: use sidecar inline, or the executor uni or mp."
        )


def refuse_kv_groups(config: SpeContextConfig, count: int) -> None:
    """Raise a ConfigError where layers of full attention are in ``count`` KV-cache groups, and the
    selection is made, or its pages moved, where those of one are known.
    """
    for setting, is_set in (
        (
            f"additional_config.{CONFIG_KEY}.sidecar: found {config.sidecar!r}",
            config.sidecar != "inline",
        ),
        (
            f"additional_config.{CONFIG_KEY}.host_kv_gib: found {config.host_kv_gib}",
            bool(config.host_kv_gib),
        ),
    ):
        if count > 1 and is_set:
            raise ConfigError(
                f"{setting}, but vLLM keeps the layers of full attention (the model's and, with "
                f"drafts, the drafter's) in {count} groups, and what that reads is the pages of "
                "one; leave it out."
            )


def refuse_groups(config: SpeContextConfig, groups: int, num_layers: int) -> None:
    """Raise a ConfigError where a head cannot select for several groups of ``num_layers`` layers of
    full attention.
    """
    if groups > num_layers:
        raise ConfigError(
            f"additional_config.{CONFIG_KEY}.retrieval_head: it has queries for {groups} groups of "
            f"layers, but only {num_layers} layers of this model attend to the whole context; use "
            "a head that was trained with --groups 1."
        )
    for setting, found in (
        ("host_kv_gib", config.host_kv_gib or None),
        ("sidecar", None if config.sidecar == "inline" else config.sidecar),
    ):
        if found is not None:
            raise ConfigError(
                f"additional_config.{CONFIG_KEY}.{setting}: found {found}, which works with one "
                f"selection for all layers, but the head has queries for {groups} groups of them; "
                "leave it out, or use a head that was trained with --groups 1."
            )


def refuse_stages(groups: int, parallel: Any) -> None:
    """Raise a ConfigError for a head with queries for ``groups`` groups of layers where each worker
    has a part of the layers.
    """
    if (stages := parallel.pipeline_parallel_size) > 1:
        raise ConfigError(
            f"--pipeline-parallel-size: found {stages}, but the head has queries for {groups} "
            "groups of layers, and a stage would read one selection; use --tensor-parallel-size, "
            "or a head that was trained with --groups 1."
        )


def refuse_impossible_pool(config: SpeContextConfig, parallel: Any, *, free: bool) -> None:
    """Raise a ConfigError, before anything is loaded, for a host pool that this machine cannot
    hold; workers ask again.

    Args:
        free: whether it must be free, and not only there.
    """
    gib = config.host_kv_gib
    # Ray's workers may all be on other machines.
    if gib == "auto" or parallel.use_ray:
        return
    for is_asked, memory, what in (
        (True, machine_memory, "memory"),
        (free, free_host_memory, "memory free"),
    ):
        if is_asked and gib * 2**30 > (there := memory()):
            asked, has = in_gib(gib * 2**30, there)
            raise ConfigError(
                f"additional_config.{CONFIG_KEY}.host_kv_gib: found {asked}, but this machine has "
                f"{has} GiB of {what}; lower it."
            )


def refuse_captured_writes(config: SpeContextConfig, compilation: Any) -> None:
    """Raise a ConfigError where vLLM's piecewise graphs would hold the two tiers' writes.

    Where a prompt's keys and values go is decided on the host in each step, so the op that stores
    them must lie between the captured pieces.
    """
    from vllm.compilation.breakable_cudagraph import is_breakable_cudagraph_enabled
    from vllm.config import CompilationMode

    mode = compilation.cudagraph_mode
    if not config.host_kv_gib or mode is None or not mode.has_piecewise_cudagraphs():
        return
    ops, found = compilation.splitting_ops, None
    if is_breakable_cudagraph_enabled():
        found = "VLLM_USE_BREAKABLE_CUDAGRAPH: found 1"
    elif compilation.mode == CompilationMode.VLLM_COMPILE:
        if compilation.use_inductor_graph_partition and ops is None:
            found = "--compilation-config.use_inductor_graph_partition: on"
        elif ops and KV_UPDATE not in ops:  # with none at all vLLM captures no pieces
            found = f"--compilation-config.splitting_ops: found a list without {KV_UPDATE}"
    if found is not None:
        raise ConfigError(
            f"{found}, with which the writes of additional_config.{CONFIG_KEY}.host_kv_gib "
            f"({config.host_kv_gib}) would be captured in vLLM's "
            "piecewise graphs; leave it out, use --compilation-config.cudagraph_mode "
            "FULL_DECODE_ONLY, or set host_kv_gib to 0."
        )
