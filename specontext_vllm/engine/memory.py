"""The memory model of an engine, and what it refuses before anything is loaded.

vLLM: the GPU's compute capability.
"""

from __future__ import annotations

from typing import Any

from specontext_vllm.config import CONFIG_KEY, PAGE_SIZE, ConfigError, SpeContextConfig
from specontext_vllm.engine.drafts import num_drafts
from specontext_vllm.engine.kv_dtype import kv_dtype
from specontext_vllm.engine.layers import LayerShape
from specontext_vllm.engine.names import ENGINES_KEY
from specontext_vllm.model_config import num_kv_layers
from specontext_vllm.residency.memory_model import KVShape, MemoryModel, MemoryModelError
from specontext_vllm.retrieval.cache import HeadCache, key_dtype
from specontext_vllm.retrieval.checkpoint import HeadSpec
from specontext_vllm.retrieval.layer_selection import LayerSelector
from specontext_vllm.sizes import in_gib


def memory_model(
    vllm_config: Any,
    num_layers: int,
    layers: LayerShape,
    retriever_page_bytes: int,
    block_pages: int,
    drafter_page_bytes: int = 0,
    other_bytes: int = 0,
) -> MemoryModel:
    """The memory model of one worker of this engine.

    Args:
        num_layers: layers on our backend.
        layers: their shape.
        retriever_page_bytes: what the retriever keeps of a page of these layers.
        block_pages: pages of a block.
        drafter_page_bytes: KV of a page in a drafter's layers, once they are there.
        other_bytes: GPU memory of layers of other kinds that have blocks of their own.
    """
    model, compilation = vllm_config.model_config, vllm_config.compilation_config
    config = SpeContextConfig.from_additional_config(vllm_config.additional_config)
    shape = KVShape(
        num_layers=num_layers,
        num_kv_heads=layers.num_kv_heads,
        head_dim=layers.head_dim,
        itemsize=kv_dtype(vllm_config).itemsize,
        retriever_page_bytes=retriever_page_bytes,
        drafter_page_bytes=drafter_page_bytes,
    )
    return MemoryModel(
        shape,
        budget_pages=config.budget_pages,
        table_pages=config.table_pages(model.max_model_len, num_drafts(vllm_config)),
        max_num_seqs=vllm_config.scheduler_config.max_num_seqs,
        lanes=vllm_config.scheduler_config.max_num_active_seqs,
        max_model_len=model.max_model_len,
        captured_rows=compilation.max_cudagraph_capture_size or 0,
        block_pages=block_pages,
        other_bytes=other_bytes,
    )


def block_pages(vllm_config: Any) -> int:
    """Pages of a block of --block-size tokens."""
    return int(vllm_config.cache_config.block_size) // PAGE_SIZE


def override_pages(vllm_config: Any, memory: MemoryModel) -> int | None:
    """--num-gpu-blocks-override in pages; None where it was not given."""
    blocks = vllm_config.cache_config.num_gpu_blocks_override
    return None if blocks is None else blocks * memory.block_pages


def retriever_page_bytes(vllm_config: Any, num_layers: int, spec: HeadSpec | None) -> int:
    """Bytes that the retriever keeps of a page of ``num_layers`` layers: the head's caches and
    page vectors.

    Args:
        spec: of one worker's head.
    Raises:
        ConfigError: a head_key_dtype that this GPU cannot use.
    """
    from vllm.platforms import current_platform

    config, model = (
        SpeContextConfig.from_additional_config(vllm_config.additional_config),
        vllm_config.model_config,
    )
    layers = LayerShape.expected(vllm_config)
    size = LayerSelector.bytes_per_block(
        config, num_layers, layers.num_kv_heads, layers.head_dim, model.dtype
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


def refuse_small_memory(vllm_config: Any, spec: HeadSpec | None) -> None:
    """Raise a ConfigError where it can be known before anything is loaded that the memory for KV is
    too small, or a host pool gains nothing.

    Args:
        vllm_config: after the platform's own check, which sets a CPU's memory for KV.
        spec: of one worker's head.
    """
    config = SpeContextConfig.from_additional_config(vllm_config.additional_config)
    cache, gib = vllm_config.cache_config, config.host_kv_gib
    caps = [size for size in (cap_bytes(config), cache.kv_cache_memory_bytes) if size is not None]
    if not caps:
        return
    layers = num_kv_layers(vllm_config.model_config.hf_text_config)
    # Of one stage; which layers it has, vLLM says later.
    layers //= vllm_config.parallel_config.pipeline_parallel_size
    memory = memory_model(
        vllm_config,
        layers,
        LayerShape.expected(vllm_config),
        retriever_page_bytes(vllm_config, layers, spec),
        block_pages(vllm_config),
    )
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
        memory.plan(min(caps), host_bytes, override_pages(vllm_config, memory))
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
    # With --max-model-len auto vLLM fits the length to the memory.
    tokens = 1 if model.original_max_model_len == -1 else model.max_model_len
    min_bytes = memory.min_gpu_bytes(host_bytes, tokens)
    capped = gpu_bytes == cap_bytes(config)
    if gpu_bytes >= min_bytes or not (capped or config.host_kv_gib):
        return
    there, needed = in_gib(gpu_bytes, min_bytes)
    where = f"additional_config.{CONFIG_KEY}"
    setting = (
        f"{where}.gpu_kv_gib: found {there}"
        if capped
        else f"--gpu-memory-utilization: it leaves {there} GiB for KV"
    )
    with_host = f" with {where}.host_kv_gib {config.host_kv_gib}" if config.host_kv_gib else ""
    raise ConfigError(
        f"{setting}, but one request of {tokens} tokens (--max-model-len) needs {needed} "
        f"GiB{with_host}, the head's caches included; raise it, "
        f"or lower --max-model-len."
    )
