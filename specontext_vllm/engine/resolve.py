"""Before an engine starts: refuse what cannot be served, find the retrieval head, check that it fits the model."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

from specontext_vllm.config import CONFIG_KEY, PAGE_SIZE, ConfigError, SpeContextConfig
from specontext_vllm.engine.compat import CPU_WORKER, GPU_WORKER, SCHEDULERS
from specontext_vllm.engine.registration import unsupported_vllm
from specontext_vllm.observability.files import front_end_folder
from specontext_vllm.residency.host_pool import machine_memory
from specontext_vllm.retrieval.checkpoint import (
    HeadCheckpoint,
    HeadError,
    dummy_checkpoint,
    read_checkpoint,
    resolve_aux_layers,
    resolve_checkpoint,
)
from specontext_vllm.retrieval.head import check_head
from specontext_vllm.retrieval.known_heads import known_head

HEAD_FOLDER = "retrieval_head"
DUMMY = "dummy"
AUX_LAYERS_KEY = "specontext_aux_layers"
ENGINES_KEY = "specontext_engines_per_machine"
METRICS_FOLDER = "specontext_metrics_folder"


def prepare_vllm_config(vllm_config: Any) -> None:
    """Validate the settings, refuse unsupported engines and pin down the head, in place.

    The resolved head's folder replaces ``additional_config["specontext"]["retrieval_head"]``, so that workers on this and
    other machines read the same one. The aux layers are written beside it because ``additional_config`` is part of
    vLLM's compile-cache key and they change what the compiled model returns. So is the number of data-parallel engines on this machine, which
    share its memory: an engine's own configuration no longer has it. Idempotent.

    Raises:
        ConfigError: one sentence naming the setting, what was found and what to do.
    """
    if vllm_config.model_config is None:
        return
    if (sentence := unsupported_vllm()) is not None:
        raise ConfigError(sentence)
    config = SpeContextConfig.from_additional_config(vllm_config.additional_config)
    refuse_unsupported(vllm_config)
    if config.sidecar == "ray":
        refuse_sidecar(vllm_config.parallel_config)
    refuse_impossible_pool(config, vllm_config.parallel_config)
    vllm_config.cache_config.block_size = PAGE_SIZE
    vllm_config.cache_config.user_specified_block_size = True
    resolved = dict(vllm_config.additional_config or {})
    resolved.setdefault(ENGINES_KEY, max(1, vllm_config.parallel_config.data_parallel_size_local))
    if config.retriever == "dlm" or config.retrieval_head is not None:
        head = find_head(config, vllm_config.model_config)
        aux_layers = resolve_aux_layers(load_head(head, vllm_config).spec, num_hidden_layers(vllm_config))
        resolved[CONFIG_KEY] = {**resolved.get(CONFIG_KEY, {}), "retrieval_head": head}
        resolved[AUX_LAYERS_KEY] = list(aux_layers)
    vllm_config.additional_config = resolved


def name_metrics_folder(vllm_config: Any) -> None:
    """In the front end: tell the workers which folder /metrics is read from, unless the configuration, which engine cores check anew, says it.

    It travels in the observability settings, because workers get them with the config, wherever they run, and vLLM's compile-cache key leaves
    them out; an environment variable would reach every child of this process, other servers included.
    """
    if getattr(vllm_config.observability_config, METRICS_FOLDER, None) is None:
        setattr(vllm_config.observability_config, METRICS_FOLDER, front_end_folder())


def refuse_impossible_pool(config: SpeContextConfig, parallel: Any) -> None:
    """Raise a ConfigError, before anything is loaded, for a host pool that this machine cannot hold whatever else runs; workers ask for free memory later."""
    gib, memory = config.host_kv_gib, machine_memory()
    # Ray's workers may all be on other machines.
    if gib != "auto" and not parallel.use_ray and gib * 2**30 > memory:
        raise ConfigError(f"additional_config.{CONFIG_KEY}.host_kv_gib: found {gib}, but this machine has {memory / 2**30:.1f} GiB of memory; lower it.")


def refuse_unsupported(vllm_config: Any) -> None:
    """Raise a ConfigError for an engine that the backend cannot serve yet."""
    model, cache, parallel = vllm_config.model_config, vllm_config.cache_config, vllm_config.parallel_config
    text = model.hf_text_config
    refusals = [
        (model.runner_type != "generate", f"--runner: found {model.runner_type!r}", "it serves text generation only"),
        (model.use_mla, f"model: {model.model} uses multi-head latent attention (MLA)", "its latent pages are not served yet"),
        (model.is_hybrid or model.is_attention_free, f"model: {model.model} has layers that keep no KV pages (Mamba or linear)",
         "every layer must be full attention"),
        (model.is_encoder_decoder, f"model: {model.model} is an encoder-decoder", "it serves decoder-only models"),
        (model.is_multimodal_model, f"model: {model.model} takes images or audio",
         "the retrieval head reads token ids; serve a text model"),
        (model.enable_prompt_embeds, "--enable-prompt-embeds: on", "the retrieval head reads token ids; leave it off"),
        (bool(model.get_sliding_window()) or "sliding_attention" in (getattr(text, "layer_types", None) or ()),
         f"model: {model.model} has sliding-window layers", "every layer must be full attention"),
        (vllm_config.speculative_config is not None, "--speculative-config: found one",
         "speculative decoding is not served yet; leave it out"),
        (vllm_config.scheduler_config.scheduler_cls not in (None, *SCHEDULERS.values()),
         f"--scheduler-cls: found {vllm_config.scheduler_config.scheduler_cls}", "it brings a scheduler of its own; leave it out"),
        (parallel.worker_cls not in ("auto", CPU_WORKER, GPU_WORKER), f"--worker-cls: found {parallel.worker_cls}",
         "it brings a worker of its own, which selects no pages; leave it out, or use --worker-extension-cls"),
        (parallel.pipeline_parallel_size > 1, f"--pipeline-parallel-size: found {parallel.pipeline_parallel_size}",
         "use --tensor-parallel-size instead"),
        (parallel.decode_context_parallel_size > 1, f"--decode-context-parallel-size: found {parallel.decode_context_parallel_size}",
         "use 1"),
        (parallel.prefill_context_parallel_size > 1,
         f"--prefill-context-parallel-size: found {parallel.prefill_context_parallel_size}", "use 1"),
        (parallel.enable_dbo, "--enable-dbo: on", "dual-batch overlap splits the batch the head scores; leave it off"),
        (vllm_config.kv_transfer_config is not None, "--kv-transfer-config: found one",
         "KV connectors do not know the head's K cache; leave it out"),
        (cache.kv_offloading_size is not None, f"--kv-offloading-size: found {cache.kv_offloading_size}",
         f"it is a KV connector, and those do not know the head's K cache; leave it out, or use additional_config.{CONFIG_KEY}.host_kv_gib"),
        (vllm_config.lora_config is not None, "--enable-lora: on",
         "the head embeds tokens before vLLM sets the step's adapters; leave it out"),
        (model.enable_sleep_mode, "--enable-sleep-mode: on", "the head's K cache would be lost; leave it off"),
        (cache.cache_dtype not in ("auto", str(model.dtype).removeprefix("torch.")), f"--kv-cache-dtype: found {cache.cache_dtype!r}",
         "keys and values are kept in the model's own dtype; use auto"),
        (cache.user_specified_block_size and cache.block_size != PAGE_SIZE, f"--block-size: found {cache.block_size}",
         f"a page is one block of {PAGE_SIZE} tokens; leave it out or use {PAGE_SIZE}"),
    ]
    for refused, found, remedy in refusals:
        if refused:
            raise ConfigError(f"{found}, which --attention-backend specontext does not support: {remedy}.")


def refuse_sidecar(parallel: Any) -> None:
    """Raise a ConfigError where the head cannot run in a Ray actor."""
    setting = f"additional_config.{CONFIG_KEY}.sidecar: found 'ray'"
    if importlib.util.find_spec("ray") is None:
        raise ConfigError(f"{setting}, but Ray is not installed; pip install 'specontext-vllm[sidecar]' or use sidecar inline.")
    if parallel.tensor_parallel_size > 1:
        raise ConfigError(
            f"{setting} with --tensor-parallel-size {parallel.tensor_parallel_size}; a restarted actor asks its worker for the embedding, "
            f"which several workers only hold together: use sidecar inline."
        )
    if parallel.use_ray:
        raise ConfigError(
            f"{setting} with --distributed-executor-backend ray; the head's actor would inherit the devices and the placement of vLLM's own "
            f"actors: use sidecar inline, or the executor uni or mp."
        )


def find_head(config: SpeContextConfig, model_config: Any) -> str:
    """Folder of the head's checkpoint, or ``"dummy"``.

    Looked for in this order: the ``retrieval_head`` setting, a ``retrieval_head/`` folder inside the model's folder, the
    table of known public EAGLE-3 heads (configs/known_heads.yaml).
    """
    if config.retrieval_head == DUMMY:
        return DUMMY
    setting = f"additional_config.{CONFIG_KEY}.retrieval_head"
    source = config.retrieval_head
    if source is None:
        beside = Path(model_config.model, HEAD_FOLDER)
        if beside.is_dir():
            return str(beside.resolve())
        source = known_head(model_config.model) or known_head(getattr(model_config.hf_config, "_name_or_path", ""))
        if source is None:
            raise ConfigError(
                f"{setting}: none given, no {HEAD_FOLDER}/ folder in {model_config.model!r} and no known EAGLE-3 head for it; "
                f"set it to a folder or hub id of an EAGLE-3 checkpoint."
            )
    try:
        return str(resolve_checkpoint(source))
    except HeadError as error:
        raise ConfigError(f"{setting}: {error}") from None


def load_head(head: str, vllm_config: Any) -> HeadCheckpoint:
    """Read a head found by ``find_head`` and check it against the model, so that no worker refuses it.

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
            checkpoint, target=shape, max_position=model.max_model_len, dtype=model.dtype,
            workers=vllm_config.parallel_config.tensor_parallel_size,
        )  # fmt: skip
    except HeadError as error:
        raise ConfigError(f"additional_config.{CONFIG_KEY}.retrieval_head: {error}") from None
    return checkpoint


def num_hidden_layers(vllm_config: Any) -> int:
    """Decoder layers of the target."""
    return int(vllm_config.model_config.hf_text_config.num_hidden_layers)


def describe(config: SpeContextConfig) -> str:
    """The settings as one line for the log."""
    return json.dumps(config.model_dump(exclude_none=True))
