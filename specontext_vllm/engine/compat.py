"""One idempotent function per place where vLLM (versions.py) offers no hook and a class of its is
wrapped in memory; those of the engine core and of requests are in core_hooks.py.

Each docstring gives the symptom, the reason, and when the function can go.

vLLM: its platform class, and the function that allocates the KV cache.
"""

from __future__ import annotations

import functools
import importlib.util
import sys
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

from specontext_vllm.engine.backend_choice import (
    is_drafters,
    is_lossless,
    is_named,
    is_selected,
    refuse_other_kinds,
    take_full_attention,
    warn_of_unread_settings,
)
from specontext_vllm.engine.core_hooks import hook_engine_core, judge_requests
from specontext_vllm.engine.names import BACKEND_NAME, CPU_WORKER, GPU_WORKER, SCHEDULERS
from specontext_vllm.engine.wrapping import is_ours, mark_as_ours


def choose_worker() -> None:
    """Check the configuration and pick our worker and scheduler classes when the backend is
    SPECONTEXT; else warn of settings that nothing reads.

    Uses: vllm.platforms.interface.Platform.check_and_update_config,
        vllm.config.parallel.ParallelConfig.worker_cls,
        vllm.config.scheduler.SchedulerConfig.scheduler_cls
    Symptom: ``parallel_config.worker_cls`` stays vLLM's own and nothing runs the retrieval head.
    Reason: only a platform's ``check_and_update_config`` fills it, and a backend has no say
        (vllm/config/vllm.py). It also has the last word on asynchronous scheduling, by which the
        scheduler is chosen.
    Remove when: attention backends can name a worker, or vLLM offers a per-step hook to plugins.
    """
    platform = _platform_class()
    original = platform.check_and_update_config.__func__
    if is_ours(original):
        return

    @functools.wraps(original)
    def check_and_update_config(cls: Any, vllm_config: Any) -> None:
        # Imported where they are needed: other backends' engines load no part of them.
        if is_named(vllm_config):
            from specontext_vllm.engine.last_word import say_last

            say_last()
        refuse_other_kinds(vllm_config)
        take_full_attention(vllm_config)
        if is_drafters(vllm_config):
            original(cls, vllm_config)
            return
        if is_selected(vllm_config):
            from specontext_vllm.engine.memory import refuse_small_memory
            from specontext_vllm.engine.prepare import name_metrics_folder, prepare_vllm_config
            from specontext_vllm.engine.refusals import refuse_runner

            judge_requests()
            hook_engine_core()
            head = prepare_vllm_config(vllm_config)
            say_last(name_metrics_folder(vllm_config))
            if vllm_config.parallel_config.worker_cls == "auto":
                vllm_config.parallel_config.worker_cls = (
                    CPU_WORKER if cls.device_type == "cpu" else GPU_WORKER
                )
        else:
            warn_of_unread_settings(vllm_config)
        original(cls, vllm_config)
        if is_selected(vllm_config):
            if vllm_config.model_config is not None:
                refuse_runner(vllm_config, is_cpu=cls.device_type == "cpu")
                refuse_small_memory(vllm_config, head)
            vllm_config.scheduler_config.scheduler_cls = SCHEDULERS[
                bool(vllm_config.scheduler_config.async_scheduling)
            ]

    mark_as_ours(check_and_update_config)
    platform.check_and_update_config = classmethod(check_and_update_config)


def draft_with_target_in_lossless_mode() -> None:
    """Give an engine in lossless mode its speculative configuration.

    Uses: vllm.platforms.interface.Platform.apply_config_platform_defaults
    Symptom: vLLM has sized its graphs without drafts when ``check_and_update_config`` is called.
    Reason: of what it calls of a platform this alone comes before that (vllm/config/vllm.py).
    Remove when: a backend can ask for a speculative configuration.
    """
    platform = _platform_class()
    original = platform.apply_config_platform_defaults.__func__
    if is_ours(original):
        return

    @functools.wraps(original)
    def apply_config_platform_defaults(cls: Any, vllm_config: Any) -> None:
        original(cls, vllm_config)
        if is_lossless(vllm_config):
            from specontext_vllm.engine.lossless import draft_with_target

            draft_with_target(vllm_config)

    mark_as_ours(apply_config_platform_defaults)
    platform.apply_config_platform_defaults = classmethod(apply_config_platform_defaults)


def let_cpu_platform_choose_backend() -> None:
    """Let the CPU platform return our backend when it was asked for.

    Uses: vllm.platforms.cpu.CpuPlatform.get_attn_backend_cls
    Symptom: on a CPU, ``--attention-backend specontext`` runs CPU_ATTN.
    Reason: ``CpuPlatform.get_attn_backend_cls`` ignores the selection (vllm/platforms/cpu.py).
    Remove when: the CPU platform honours a registered backend.
    """
    platform = _platform_class()
    if platform.device_type != "cpu":
        return
    original = platform.get_attn_backend_cls.__func__
    if is_ours(original):
        return

    @functools.wraps(original)
    def get_attn_backend_cls(
        cls: Any, selected_backend: Any, attn_selector_config: Any, num_heads: int | None = None
    ) -> str:
        if selected_backend is not None and selected_backend.name == BACKEND_NAME:
            return selected_backend.get_path()
        return original(cls, selected_backend, attn_selector_config, num_heads)

    mark_as_ours(get_attn_backend_cls)
    platform.get_attn_backend_cls = classmethod(get_attn_backend_cls)


def expand_sampling_settings_on_a_cpu() -> None:
    """Give each draft the temperature, top_k and top_p of its request.

    Uses: vllm.v1.sample.rejection_sampler.expand_batch_to_tokens
    Symptom: on a CPU, sampled requests with drafts follow other distributions than without, or the
        engine ends with "selected index k out of range".
    Reason: vLLM's C++ writes what it expands into a copy as 64-bit integers, and the result is
        memory that nobody wrote (vllm/utils/cpu_triton_utils.py, _expand_kernel_impl).
    Remove when: it copies the result back, as it does in the functions around it.
    """
    from vllm.v1.sample import rejection_sampler

    def expand_batch_to_tokens(
        x: Any, cu_num_tokens: Any, num_tokens: int, replace_from: int = 0, replace_to: int = 0
    ) -> Any:
        counts = cu_num_tokens.diff(prepend=cu_num_tokens.new_zeros(1))
        expanded = x.repeat_interleave(counts, output_size=num_tokens)
        return expanded.masked_fill(expanded == replace_from, replace_to)

    rejection_sampler.expand_batch_to_tokens = expand_batch_to_tokens


def leave_chunks_to_vllm() -> None:
    """Let layers that attend in chunks have a backend of vLLM's where those of full attention have
    ours; to be called before a model is built.

    Uses: vllm.model_executor.layers.attention.chunked_local_attention.get_attn_backend
    Symptom: Llama 4's layers with chunks run on top of our backend.
    Reason: such a layer asks for a backend as one of full attention does
        (vllm/model_executor/layers/attention/chunked_local_attention.py). As one with a window it
        gets what the user or vLLM chose for those, which reads the newest tokens as well.
    Remove when: it says which kind of layer it is.
    """
    from vllm.config import get_current_vllm_config
    from vllm.model_executor.layers.attention import chunked_local_attention

    original = chunked_local_attention.get_attn_backend
    if is_ours(original):
        return

    @functools.wraps(original)
    def get_attn_backend(*args: Any, **kwargs: Any) -> Any:
        if is_selected(get_current_vllm_config()):
            kwargs["has_sliding_window"] = True
        return original(*args, **kwargs)

    mark_as_ours(get_attn_backend)
    chunked_local_attention.get_attn_backend = get_attn_backend


def hide_our_kernels_folder() -> None:
    """Keep vLLM from taking this repository's triton_kernels/ folder for the package of that name.

    Symptom: run from the repository's root, vLLM logs "Failed to import Triton kernels ... No
        module named 'triton_kernels.matmul'".
    Reason: it probes for a top-level ``triton_kernels`` (vllm/utils/import_utils.py), and the
        current folder is on sys.path.
    Remove when: the folder or the probe is renamed.
    """
    found = importlib.util.find_spec("triton_kernels")
    ours = Path(__file__).resolve().parents[2] / "triton_kernels"
    if found is not None and any(
        Path(place).resolve() == ours for place in found.submodule_search_locations or ()
    ):
        # find_spec and import then say that there is none.
        sys.modules["triton_kernels"] = cast(Any, None)


@contextmanager
def allocate_kv_cache_as(
    cache: Any, layer_names: Collection[str], other_blocks: Mapping[int, int] | None = None
) -> Iterator[None]:
    """Within the block, vLLM's KV cache of each of these layers is ``cache``; layers beside them, a
    drafter's or those of other kinds, get memory of their own.

    Uses: vllm.v1.worker.gpu_model_runner.allocate_kv_cache,
        vllm.v1.worker.gpu.attn_utils.allocate_kv_cache
    Symptom: the model runners allocate as many blocks as the scheduler hands out, which with a host
        pool the GPU cannot hold.
    Reason: allocation is one function called by name (vllm/v1/worker/utils.py, allocate_kv_cache),
        with no hook.
    Remove when: a backend or worker can allocate the KV cache itself.

    Args:
        other_blocks: how many there are of each KV group that has a pool of its own; all else has
            as many as the scheduler hands out to these layers.
    """
    from vllm.v1.worker import gpu_model_runner
    from vllm.v1.worker.gpu import attn_utils

    original = attn_utils.allocate_kv_cache
    # Each gets back what it had: a test may have replaced one of them.
    had = {module: module.allocate_kv_cache for module in (gpu_model_runner, attn_utils)}

    def allocate(kv_cache_config: Any, *args: Any, **kwargs: Any) -> dict[str, Any]:
        counts = other_blocks or {}
        # In our layout a layer's blocks lie together; all layers of a pool share one allocation, in
        # which groups lie over one another.
        pools: dict[bool, list[Any]] = {}
        ends = [0] * len(kv_cache_config.kv_cache_groups)
        for tensor in kv_cache_config.kv_cache_tensors:
            if rest := [name for name in tensor.layers if name not in layer_names]:
                group = next(
                    index
                    for index, group in enumerate(kv_cache_config.kv_cache_groups)
                    if rest[0] in group.layer_names
                )
                count = counts.get(group, kv_cache_config.num_blocks)
                stride = tensor.layer_stride * count // kv_cache_config.num_blocks
                own = replace(tensor, layers=rest, offset=ends[group], layer_stride=stride)
                pools.setdefault(group in counts, []).append((count, own))
                ends[group] += len(rest) * stride
        caches = dict.fromkeys(layer_names, cache)
        for pool in pools.values():
            size = max(own.offset + len(own.layers) * own.layer_stride for _, own in pool)
            tensors = [replace(own, size=size) for _, own in pool]
            part = replace(kv_cache_config, num_blocks=pool[0][0], kv_cache_tensors=tensors)
            caches |= original(part, *args, **kwargs)
        return caches

    for module in had:
        module.allocate_kv_cache = allocate
    try:
        yield
    finally:
        for module, function in had.items():
            module.allocate_kv_cache = function


def _platform_class() -> Any:
    from vllm.platforms import current_platform

    return current_platform if isinstance(current_platform, type) else type(current_platform)
