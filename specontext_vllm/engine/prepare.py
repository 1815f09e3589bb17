"""Settle vLLM's configuration before an engine starts.

vLLM: its platform, and its log.
"""

from __future__ import annotations

from typing import Any

from specontext_vllm.attention.registry import refuse_provider
from specontext_vllm.config import CONFIG_KEY, PAGE_SIZE, ConfigError, SpeContextConfig
from specontext_vllm.engine.connector import settle_connector, settle_head_layers
from specontext_vllm.engine.find_head import find_head, load_head, num_hidden_layers
from specontext_vllm.engine.lossless import refuse_lossless
from specontext_vllm.engine.memory import block_pages, retriever_page_bytes
from specontext_vllm.engine.names import (
    AUX_LAYERS_KEY,
    ENGINES_KEY,
    LAYER_GROUPS_KEY,
    METRICS_FOLDER,
)
from specontext_vllm.engine.refusals import (
    refuse_captured_writes,
    refuse_groups,
    refuse_impossible_pool,
    refuse_platform,
    refuse_sidecar,
    refuse_stages,
    refuse_unproven,
    refuse_unsupported,
)
from specontext_vllm.model_config import layer_kinds, num_full_layers
from specontext_vllm.observability.files import front_end_folder
from specontext_vllm.retrieval.checkpoint import HeadSpec, aux_layers_of
from specontext_vllm.retrieval.shard import shard_spec
from specontext_vllm.versions import unsupported_vllm


def prepare_vllm_config(vllm_config: Any) -> HeadSpec | None:
    """Validate the settings, refuse unsupported engines and pin down the head, in place.

    The folder of the head that was found replaces the setting ``retrieval_head``, so that workers
    on this and other machines read the same one. The aux layers are added, since
    ``additional_config`` is part of vLLM's compile-cache key and they change what the compiled
    model returns. So is the number of data-parallel engines on this machine, which share its
    memory: an engine's own configuration no longer has it. Idempotent.

    Uses: vllm.config.vllm.VllmConfig.additional_config, vllm.config.cache.CacheConfig.block_size,
        vllm.config.cache.CacheConfig.user_specified_block_size
    Symptom: an engine has blocks that hold no whole pages, its workers read different heads, or a
        compiled model of other aux layers is taken from vLLM's cache.
    Reason: vLLM's configuration is all that reaches every process of an engine, and a backend may
        not add to it.
    Remove when: a plugin can settle an engine's configuration before it starts.

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
    refuse_unproven(vllm_config, current_platform)
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
        refuse_sidecar(vllm_config)
    if config.is_lossless:
        refuse_lossless(vllm_config, is_cpu=current_platform.is_cpu())
    refuse_impossible_pool(config, vllm_config.parallel_config, free=is_first)
    refuse_captured_writes(config, vllm_config.compilation_config)
    if is_first and (sentence := config.reads_everything(model.max_model_len)) is not None:
        from vllm.logger import init_logger

        init_logger("vllm.specontext").warning(sentence)
    if not vllm_config.cache_config.user_specified_block_size:
        # Platforms have defaults of their own. vLLM's attention on a CPU takes 32 tokens and more,
        # which layers with chunks do not find out by themselves, as those with windows do.
        chunked = "chunked_attention" in layer_kinds(model.hf_text_config)
        is_cpu = current_platform.device_type == "cpu"
        vllm_config.cache_config.block_size = PAGE_SIZE * (2 if chunked and is_cpu else 1)
        vllm_config.cache_config.user_specified_block_size = True
    additional = dict(vllm_config.additional_config or {})
    additional.setdefault(ENGINES_KEY, max(1, vllm_config.parallel_config.data_parallel_size_local))
    spec, checkpoint = None, None
    aux_layers: tuple[int, ...] = ()
    if config.rule.needs_head or config.retrieval_head is not None:
        head = find_head(config, vllm_config.model_config)
        checkpoint = load_head(head, vllm_config)
        spec = shard_spec(checkpoint.spec, vllm_config.parallel_config.tensor_parallel_size)
        aux_layers = aux_layers_of(checkpoint.spec, num_hidden_layers(vllm_config))
        additional[CONFIG_KEY] = {**additional.get(CONFIG_KEY, {}), "retrieval_head": head}
        additional[CONFIG_KEY].pop("retrieval_head_revision", None)  # the folder is that revision's
        additional[AUX_LAYERS_KEY] = list(aux_layers)
        if checkpoint.spec.layer_groups > 1:
            layers = num_full_layers(model.hf_text_config)
            refuse_groups(config, checkpoint.spec.layer_groups, layers)
            refuse_stages(checkpoint.spec.layer_groups, vllm_config.parallel_config)
            additional[LAYER_GROUPS_KEY] = checkpoint.spec.layer_groups
    vllm_config.additional_config = additional
    page_bytes = retriever_page_bytes(vllm_config, 0, spec)
    settle_head_layers(
        vllm_config, current_platform.device_type, checkpoint, aux_layers, page_bytes
    )
    settle_connector(vllm_config, page_bytes * block_pages(vllm_config))
    return spec


def name_metrics_folder(vllm_config: Any) -> str | None:
    """In the front end: tell the workers which folder /metrics is read from.

    Engine cores check the same configuration again and find it named. Returned is the folder where
    it was named here, else None.

    Uses: vllm.config.vllm.VllmConfig.observability_config
    Symptom: workers do not know where /metrics is read from.
    Reason: they get the configuration alone, wherever they run. Its observability settings are not
        part of vLLM's compile-cache key; an environment variable would reach every child of this
        process, other servers included.
    Remove when: workers can report metrics through vLLM.
    """
    if getattr(vllm_config.observability_config, METRICS_FOLDER, None) is not None:
        return None
    folder = front_end_folder()
    setattr(vllm_config.observability_config, METRICS_FOLDER, folder)
    return folder
