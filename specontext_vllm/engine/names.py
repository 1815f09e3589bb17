"""Names by which vLLM finds our classes, and the keys that we add to its configuration."""

from __future__ import annotations

BACKEND_NAME = "SPECONTEXT"
OUR_KIND = "full_attention"
"""Kind of the layers that run on our backend, as vLLM's KVCacheSpecKind names it."""
BACKEND_PATH = "specontext_vllm.engine.backend.SpeContextBackend"
CPU_WORKER = "specontext_vllm.engine.worker_cpu.SpeContextCPUWorker"
GPU_WORKER = "specontext_vllm.engine.worker_gpu.SpeContextGPUWorker"
SCHEDULERS = {
    False: "specontext_vllm.engine.scheduler.SpeContextScheduler",
    True: "specontext_vllm.engine.scheduler.SpeContextAsyncScheduler",
}
"""By whether scheduling is asynchronous."""

AUX_LAYERS_KEY = "specontext_aux_layers"
"""In ``additional_config``: target layers whose inputs the head reads."""
LAYER_GROUPS_KEY = "specontext_layer_groups"
"""In ``additional_config``: groups of layers for which the head has queries, if there are several.
"""
OFFLOADING_CONNECTOR = "OffloadingConnector"
"""vLLM's connector to host memory, which our spec lets move what the head keeps."""
OFFLOADING_MODULE, OFFLOADING_SPEC = "specontext_vllm.engine.offloading", "SpeContextOffloadingSpec"
HEAD_BLOCK_BYTES = "specontext_head_block_bytes"
"""In a connector's extra config: bytes that the head keeps of a block."""
STORAGE_CONNECTOR, NIXL_CONNECTOR = "ExampleConnector", "NixlConnector"
"""vLLM's connectors to a shared folder and to another engine's memory."""
CONNECTOR_MODULES = {
    STORAGE_CONNECTOR: "specontext_vllm.engine.shared_storage",
    NIXL_CONNECTOR: "specontext_vllm.engine.nixl",
}
"""Where ours of these names are, which move what the head keeps."""
KV_PRINT, HEAD_PRINT = "specontext_kv", "specontext_head"
"""In a connector's extra config: names of all KV that is alike, and of the head, if there is one.
"""
ENGINES_KEY = "specontext_engines_per_machine"
"""In ``additional_config``: data-parallel engines that share this machine's memory."""
METRICS_FOLDER = "specontext_metrics_folder"
"""In ``observability_config``: the folder that /metrics is read from."""
