"""Before an engine starts: refuse what cannot be served, find the retrieval head, check that it
fits the model.
"""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any, get_args

from specontext_vllm.attention.provider import refuse_provider
from specontext_vllm.config import CONFIG_KEY, PAGE_SIZE, ConfigError, Retriever, SpeContextConfig
from specontext_vllm.engine.compat import CPU_WORKER, GPU_WORKER, SCHEDULERS
from specontext_vllm.engine.registration import unsupported_vllm
from specontext_vllm.observability.files import front_end_folder
from specontext_vllm.residency.host_pool import free_host_memory, machine_memory
from specontext_vllm.residency.memory_model import KVShape, MemoryModel, MemoryModelError
from specontext_vllm.retrieval.cache import HeadCache, key_dtype
from specontext_vllm.retrieval.checkpoint import (
    HeadCheckpoint,
    HeadError,
    HeadSpec,
    dummy_checkpoint,
    read_checkpoint,
    resolve_aux_layers,
    resolve_checkpoint,
)
from specontext_vllm.retrieval.head import check_head
from specontext_vllm.retrieval.known_heads import known_head
from specontext_vllm.retrieval.layer_selection import LayerSelector
from specontext_vllm.retrieval.shard import shard_checkpoint
from specontext_vllm.sizes import in_gib

HEAD_FOLDER = "retrieval_head"
DUMMY = "dummy"
AUX_LAYERS_KEY = "specontext_aux_layers"
ENGINES_KEY = "specontext_engines_per_machine"
METRICS_FOLDER = "specontext_metrics_folder"
KV_UPDATE = "vllm::unified_kv_cache_update"
"""The op in which a layer's keys and values are stored."""
HEADLESS = [name for name in get_args(Retriever) if name != "dlm"]
"""Retrievers that need no head."""


def prepare_vllm_config(vllm_config: Any) -> HeadSpec | None:
    """Validate the settings, refuse unsupported engines and pin down the head, in place.

    The resolved head's folder replaces ``additional_config["specontext"]["retrieval_head"]``, so
    that workers on this and other machines read the same one. The aux layers are written beside it
    because ``additional_config`` is part of vLLM's compile-cache key and they change what the
    compiled model returns. So is the number of data-parallel engines on this machine, which
    share its memory: an engine's own configuration no longer has it. Idempotent.

    Returns:
        What the head of one worker is like; None without a head.
    Raises:
        ConfigError: one sentence naming the setting, what was found and what to do.
    """
    from vllm.platforms import current_platform

    if vllm_config.model_config is None:
        return None
    if (sentence := unsupported_vllm()) is not None:
        raise ConfigError(sentence)
    refuse_platform(current_platform)
    config, model = (
        SpeContextConfig.from_additional_config(vllm_config.additional_config),
        vllm_config.model_config,
    )
    # Engine cores check the configuration anew, when this process, or another engine, may hold what
    # was free at first.
    is_first = ENGINES_KEY not in (vllm_config.additional_config or {})
    refuse_unsupported(vllm_config)
    if config.attention_provider != "auto":
        refuse_provider(
            config.attention_provider,
            model.get_head_size(),
            model.dtype,
            current_platform.device_type,
        )
    if config.sidecar == "ray":
        refuse_sidecar(vllm_config.parallel_config)
    refuse_impossible_pool(config, vllm_config.parallel_config, free=is_first)
    refuse_captured_writes(config, vllm_config.compilation_config)
    if is_first and (sentence := config.reads_everything(model.max_model_len)) is not None:
        from vllm.logger import init_logger

        init_logger("vllm.specontext").warning(sentence)
    vllm_config.cache_config.block_size = PAGE_SIZE
    vllm_config.cache_config.user_specified_block_size = True
    resolved = dict(vllm_config.additional_config or {})
    resolved.setdefault(ENGINES_KEY, max(1, vllm_config.parallel_config.data_parallel_size_local))
    spec = None
    if config.retriever == "dlm" or config.retrieval_head is not None:
        head = find_head(config, vllm_config.model_config)
        checkpoint = load_head(head, vllm_config)
        spec = shard_checkpoint(
            checkpoint, rank=0, size=vllm_config.parallel_config.tensor_parallel_size
        ).spec
        aux_layers = resolve_aux_layers(checkpoint.spec, num_hidden_layers(vllm_config))
        resolved[CONFIG_KEY] = {**resolved.get(CONFIG_KEY, {}), "retrieval_head": head}
        resolved[CONFIG_KEY].pop("retrieval_head_revision", None)  # the folder is that revision's
        resolved[AUX_LAYERS_KEY] = list(aux_layers)
    vllm_config.additional_config = resolved
    return spec


def name_metrics_folder(vllm_config: Any) -> str | None:
    """In the front end: tell the workers which folder /metrics is read from, unless the
    configuration, which engine cores check anew, says it.

    The folder is returned where it was named here.

    It travels in the observability settings, because workers get them with the config, wherever
    they run, and vLLM's compile-cache key leaves them out; an environment variable would reach
    every child of this process, other servers included.
    """
    if getattr(vllm_config.observability_config, METRICS_FOLDER, None) is not None:
        return None
    folder = front_end_folder()
    setattr(vllm_config.observability_config, METRICS_FOLDER, folder)
    return folder


def refuse_platform(platform: Any) -> None:
    """Raise a ConfigError where the kernels have never run."""
    if platform._enum.name not in ("CUDA", "CPU"):
        raise ConfigError(
            f"--attention-backend: found specontext on vLLM's platform {platform._enum.name}, but "
            "its kernels are for NVIDIA GPUs and CPUs; "
            f"use another backend."
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


def memory_model(vllm_config: Any, head_page_bytes: int) -> MemoryModel:
    """The memory model of one worker of this engine.

    Args:
        head_page_bytes: what a page of all layers takes beside its KV: in the head's caches, and in
            what a retriever keeps.
    """
    model, compilation = vllm_config.model_config, vllm_config.compilation_config
    config = SpeContextConfig.from_additional_config(vllm_config.additional_config)
    shape = KVShape(
        num_layers=num_hidden_layers(vllm_config),
        num_kv_heads=model.get_num_kv_heads(vllm_config.parallel_config),
        head_dim=model.get_head_size(),
        itemsize=model.dtype.itemsize,
        head_page_bytes=head_page_bytes,
    )
    return MemoryModel(
        shape,
        budget_pages=config.budget_pages,
        table_pages=config.table_pages(model.max_model_len),
        max_num_seqs=vllm_config.scheduler_config.max_num_seqs,
        max_model_len=model.max_model_len,
        captured_rows=compilation.max_cudagraph_capture_size or 0,
    )


def page_bytes_beside_kv(vllm_config: Any, spec: HeadSpec | None) -> int:
    """Bytes that a page of all layers takes beside its KV; ``spec`` is of one worker's head.

    Raises:
        ConfigError: a head_key_dtype that this GPU cannot use.
    """
    from vllm.platforms import current_platform

    config, model = (
        SpeContextConfig.from_additional_config(vllm_config.additional_config),
        vllm_config.model_config,
    )
    heads = model.get_num_kv_heads(vllm_config.parallel_config)
    size = LayerSelector.bytes_per_block(
        config, num_hidden_layers(vllm_config), heads, model.get_head_size(), model.dtype
    )
    if spec is None or config.sidecar == "ray":  # the actor keeps its own
        return size
    capability = current_platform.get_device_capability() if current_platform.is_cuda() else None
    keys = key_dtype(
        config.head_key_dtype,
        model.dtype,
        capability and tuple(capability),
        current_platform.get_device_name(),
    )
    return size + HeadCache.bytes_per_block(
        spec.num_kv_heads, spec.head_dim, spec.hidden_size, model.dtype, keys
    )


def refuse_small_room(vllm_config: Any, spec: HeadSpec | None) -> None:
    """Raise a ConfigError where it can be known before anything is loaded that the memory for KV is
    too small, or a host pool gains nothing.

    Args:
        vllm_config: after the platform's own check, which gives a CPU's room. spec: of one worker's
            head.
    """
    config = SpeContextConfig.from_additional_config(vllm_config.additional_config)
    cache, gib = vllm_config.cache_config, config.host_kv_gib
    caps = [size for size in (cap_bytes(config), cache.kv_cache_memory_bytes) if size is not None]
    if not caps:
        return
    memory = memory_model(vllm_config, page_bytes_beside_kv(vllm_config, spec))
    engines = vllm_config.additional_config[ENGINES_KEY]
    host_bytes = memory.in_flight_bytes if gib == "auto" else int(gib * 2**30) // engines
    refuse_less_than_one_request(vllm_config, memory, min(caps), host_bytes)
    # What vLLM will find free is not known, what it is told to take is; and several workers may
    # share the pool, or not.
    if (
        gib in (0, "auto")
        or cache.kv_cache_memory_bytes is None
        or vllm_config.parallel_config.tensor_parallel_size > 1
    ):
        return
    try:
        memory.plan(min(caps), host_bytes, cache.num_gpu_blocks_override)
    except MemoryModelError as error:
        raise ConfigError(f"additional_config.{CONFIG_KEY}.host_kv_gib: {error}") from None


def cap_bytes(config: SpeContextConfig) -> int | None:
    """gpu_kv_gib in bytes."""
    return None if config.gpu_kv_gib is None else int(config.gpu_kv_gib * 2**30)


def refuse_less_than_one_request(
    vllm_config: Any, memory: MemoryModel, gpu_bytes: int, host_bytes: int
) -> None:
    """Raise a ConfigError where ``gpu_bytes`` for KV do not serve one request of the longest
    context.

    Without any setting of ours at work this is left to vLLM, whose sentence then names the right
    one.
    """
    model, config = (
        vllm_config.model_config,
        SpeContextConfig.from_additional_config(vllm_config.additional_config),
    )
    if vllm_config.cache_config.num_gpu_blocks_override is not None:
        return
    # With --max-model-len auto vLLM fits the length to the room.
    tokens = 1 if model.original_max_model_len == -1 else model.max_model_len
    least = memory.least_gpu_bytes(host_bytes, tokens)
    capped = gpu_bytes == cap_bytes(config)
    if gpu_bytes >= least or not (capped or config.host_kv_gib):
        return
    there, needed = in_gib(gpu_bytes, least)
    where = f"additional_config.{CONFIG_KEY}"
    setting = (
        f"{where}.gpu_kv_gib: found {there}"
        if capped
        else f"--gpu-memory-utilization: it leaves {there} GiB for KV"
    )
    beside = f" with {where}.host_kv_gib {config.host_kv_gib}" if config.host_kv_gib else ""
    raise ConfigError(
        f"{setting}, but one request of {tokens} tokens (--max-model-len) needs {needed} "
        f"GiB{beside}, the head's caches included; raise it, "
        f"or lower --max-model-len."
    )


def has_windowed_layers(text: Any) -> bool:
    """Whether vLLM gives a layer of this text model a sliding window, by its own rule
    (vllm/engine/arg_utils.py and the models' layers).

    A window without a list of layer types holds for all layers; with one, for those of that type; a
    type without a window for none.
    """
    types = getattr(text, "layer_types", None)
    return bool(getattr(text, "sliding_window", None)) and (
        types is None or "sliding_attention" in types
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
            model.is_hybrid or model.is_attention_free,
            f"model: {model.model} has layers that keep no KV pages (Mamba or linear)",
            "every layer must be full attention",
        ),
        (
            model.is_encoder_decoder,
            f"model: {model.model} is an encoder-decoder",
            "it serves decoder-only models",
        ),
        (
            model.is_multimodal_model,
            f"model: {model.model} takes images or audio",
            "the retrieval head reads token ids; serve a text model",
        ),
        (
            model.enable_prompt_embeds,
            "--enable-prompt-embeds: on",
            "the retrieval head reads token ids; leave it off",
        ),
        (
            has_windowed_layers(text),
            f"model: {model.model} has sliding-window layers",
            "every layer must be full attention",
        ),
        (
            bool(getattr(text, "dual_chunk_attention_config", None)),
            f"model: {model.model} has dual chunk attention",
            "every layer must be full attention",
        ),
        (
            vllm_config.speculative_config is not None,
            "--speculative-config: found one",
            "speculative decoding is not served yet; leave it out",
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
            parallel.pipeline_parallel_size > 1,
            f"--pipeline-parallel-size: found {parallel.pipeline_parallel_size}",
            "use --tensor-parallel-size instead",
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
            vllm_config.kv_transfer_config is not None,
            "--kv-transfer-config: found one",
            "KV connectors do not know the head's K cache; leave it out",
        ),
        (
            cache.kv_offloading_size is not None,
            f"--kv-offloading-size: found {cache.kv_offloading_size}",
            "it is a KV connector, and those do not know the head's K cache; leave it out, or use "
            f"additional_config.{CONFIG_KEY}.host_kv_gib",
        ),
        (
            vllm_config.lora_config is not None,
            "--enable-lora: on",
            "the head embeds tokens before vLLM sets the step's adapters; leave it out",
        ),
        (
            model.enable_sleep_mode,
            "--enable-sleep-mode: on",
            "the head's K cache would be lost; leave it off",
        ),
        (
            cache.cache_dtype not in ("auto", str(model.dtype).removeprefix("torch.")),
            f"--kv-cache-dtype: found {cache.cache_dtype!r}",
            "keys and values are kept in the model's own dtype; use auto",
        ),
        (
            cache.user_specified_block_size and cache.block_size != PAGE_SIZE,
            f"--block-size: found {cache.block_size}",
            f"a page is one block of {PAGE_SIZE} tokens; leave it out or use {PAGE_SIZE}",
        ),
    ]
    for refused, found, remedy in refusals:
        if refused:
            raise ConfigError(
                f"{found}, which --attention-backend specontext does not support: {remedy}."
            )


def refuse_sidecar(parallel: Any) -> None:
    """Raise a ConfigError where the head cannot run in a Ray actor."""
    setting = f"additional_config.{CONFIG_KEY}.sidecar: found 'ray'"
    if importlib.util.find_spec("ray") is None:
        raise ConfigError(
            f"{setting}, but Ray is not installed; pip install 'specontext-vllm[sidecar]' or use "
            "sidecar inline."
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


def find_head(config: SpeContextConfig, model_config: Any) -> str:
    """Folder of the head's checkpoint, or ``"dummy"``; of one on the hub, the commit's that
    ``retrieval_head_revision`` names.

    Looked for in this order: the ``retrieval_head`` setting, a ``retrieval_head/`` folder inside
        the model's folder, the
    table of known public EAGLE-3 heads (configs/known_heads.yaml).
    """
    if config.retrieval_head == DUMMY:
        return DUMMY
    setting = f"additional_config.{CONFIG_KEY}.retrieval_head"
    source, revision = config.retrieval_head, config.retrieval_head_revision
    beside = Path(model_config.model, HEAD_FOLDER)
    if source is None and beside.is_dir():
        source = str(beside.resolve())
    elif source is None:
        known = known_head(model_config.model) or known_head(
            getattr(model_config.hf_config, "_name_or_path", "")
        )
        if known is None:
            raise ConfigError(
                f"{setting}: none given, no {HEAD_FOLDER}/ folder in {model_config.model!r} and no "
                "known EAGLE-3 head for it; set it to a folder or "
                "hub id of an EAGLE-3 checkpoint, train one with `specontext distill`, or use a "
                f"retriever that needs none: {', '.join(HEADLESS)}."
            )
        source, revision = known.head, revision or known.revision
    try:
        return str(resolve_checkpoint(source, revision))
    except HeadError as error:
        raise ConfigError(f"{setting}: {error}") from None


def load_head(head: str, vllm_config: Any) -> HeadCheckpoint:
    """Read a head found by ``find_head`` and check it against the model, so that no worker refuses
    it.

    Raises:
        ConfigError: one sentence when it cannot be read or does not fit.
    """
    model, text = vllm_config.model_config, vllm_config.model_config.hf_text_config
    shape = {
        "target_hidden_size": model.get_hidden_size(),
        "num_layers": num_hidden_layers(vllm_config),
        "num_kv_heads": model.get_total_num_kv_heads(),
        "vocab_size": model.get_vocab_size(),
    }
    if head == DUMMY:
        return dummy_checkpoint(
            hidden_size=shape["target_hidden_size"],
            num_layers=shape["num_layers"],
            num_heads=text.num_attention_heads,
            num_kv_heads=shape["num_kv_heads"],
            head_dim=model.get_head_size(),
            rope_theta=10000.0,
            max_position=model.max_model_len,
            dtype=model.dtype,
            seed=model.seed,
        )
    try:
        config = SpeContextConfig.from_additional_config(vllm_config.additional_config)
        checkpoint = read_checkpoint(Path(head), allow_pickle=config.allow_pickle)
        check_head(
            checkpoint,
            target=shape,
            max_position=model.max_model_len,
            dtype=model.dtype,
            workers=vllm_config.parallel_config.tensor_parallel_size,
        )
    except HeadError as error:
        raise ConfigError(f"additional_config.{CONFIG_KEY}.retrieval_head: {error}") from None
    return checkpoint


def num_hidden_layers(vllm_config: Any) -> int:
    """Decoder layers of the target."""
    return int(vllm_config.model_config.hf_text_config.num_hidden_layers)


def describe(config: SpeContextConfig) -> str:
    """The settings as one line for the log."""
    return json.dumps(config.model_dump(exclude_none=True))
