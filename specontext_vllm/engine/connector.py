"""Which KV connectors an engine may have, and what they are told before it starts.

vLLM: its configuration of connectors.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from typing import Any

from specontext_vllm.config import CONFIG_KEY, ConfigError, SpeContextConfig
from specontext_vllm.engine.names import (
    CONNECTOR_MODULES,
    HEAD_BLOCK_BYTES,
    HEAD_PRINT,
    KV_PRINT,
    NIXL_CONNECTOR,
    OFFLOADING_CONNECTOR,
    OFFLOADING_MODULE,
    OFFLOADING_SPEC,
)
from specontext_vllm.model_config import has_windowed_layers
from specontext_vllm.retrieval.checkpoint import HeadCheckpoint
from specontext_vllm.retrieval.digest import digest_of

_SPECS = None, "CPUOffloadingSpec", OFFLOADING_SPEC


def found_connector(vllm_config: Any) -> str | None:
    """By which setting KV is moved to other places, as sentences begin; None: it is not."""
    if (size := vllm_config.cache_config.kv_offloading_size) is not None:
        return f"--kv-offloading-size: found {size}"
    return None if vllm_config.kv_transfer_config is None else "--kv-transfer-config: found one"


def our_connector(vllm_config: Any) -> str | None:
    """The connector's name where it is ours, which moves what the head keeps."""
    transfer = vllm_config.kv_transfer_config
    name = None if transfer is None else transfer.kv_connector
    return name if name in CONNECTOR_MODULES else None


def moves_beside_stream(vllm_config: Any) -> bool:
    """Whether blocks are read and written in no order with the GPU's stream."""
    return our_connector(vllm_config) == NIXL_CONNECTOR


def refuse_connector(vllm_config: Any) -> None:
    """Raise a ConfigError for a connector that would bring KV back without what the head keeps of
    it, and where its blocks are not those of one group of layers on one worker.
    """
    if (found := found_connector(vllm_config)) is None:
        return
    transfer, cache = vllm_config.kv_transfer_config, vllm_config.cache_config
    extra: dict[str, Any] = {}
    if cache.kv_offloading_size is not None:
        if cache.kv_offloading_backend != "native":
            raise ConfigError(
                f"--kv-offloading-backend: found {cache.kv_offloading_backend!r}, which does not "
                "move the head's keys with the KV; use native."
            )
        if os.environ.get("VLLM_USE_SIMPLE_KV_OFFLOAD", "0") not in ("", "0"):
            raise ConfigError(
                "VLLM_USE_SIMPLE_KV_OFFLOAD: it is on, and that way of offloading does not move "
                "the head's keys with the KV; unset it."
            )
    elif transfer.kv_connector not in (served := (OFFLOADING_CONNECTOR, *CONNECTOR_MODULES)):
        raise ConfigError(
            f"--kv-transfer-config: found kv_connector {transfer.kv_connector!r}, which does not "
            f"move the head's keys with the KV; use {', '.join(served)}, or leave it out."
        )
    elif (module := transfer.kv_connector_module_path) not in (
        None,
        CONNECTOR_MODULES.get(transfer.kv_connector),
    ):
        raise ConfigError(
            f"--kv-transfer-config: found kv_connector_module_path {module!r}, whose connector "
            "does not move the head's keys with the KV; leave it out."
        )
    if transfer is not None:
        extra = transfer.kv_connector_extra_config
    if extra.get("bidirectional_kv_xfer"):
        raise ConfigError(
            "--kv-transfer-config: found bidirectional_kv_xfer in kv_connector_extra_config, which "
            "brings pages of generated tokens back as a prompt's; leave it out."
        )
    for name, allowed in (("spec_name", _SPECS), ("canonical_layout", (None, False))):
        if extra.get(name) not in allowed:
            raise ConfigError(
                f"--kv-transfer-config: found {name} {extra[name]!r} in kv_connector_extra_config, "
                "which does not move the head's keys with the KV; leave it out."
            )
    config = SpeContextConfig.from_additional_config(vllm_config.additional_config)
    model, parallel = vllm_config.model_config, vllm_config.parallel_config
    setting = f"additional_config.{CONFIG_KEY}"
    for refused, what in (
        (bool(config.host_kv_gib), f"{setting}.host_kv_gib {config.host_kv_gib}"),
        (config.sidecar != "inline", f"{setting}.sidecar {config.sidecar!r}"),
        (
            bool(config.rule.page_vectors) and our_connector(vllm_config) is None,
            f"{setting}.retriever {config.retriever!r}",
        ),
        (
            config.is_lossless or vllm_config.speculative_config is not None,
            f"{setting}.mode 'lossless'" if config.is_lossless else "--speculative-config",
        ),
        (
            parallel.tensor_parallel_size > 1,
            f"--tensor-parallel-size {parallel.tensor_parallel_size}",
        ),
        (
            model.is_hybrid or has_windowed_layers(model.hf_text_config),
            f"{model.model}, some of whose layers do not attend to the whole context",
        ),
    ):
        if refused:
            raise ConfigError(
                f"{found} with {what}, which --attention-backend specontext does not support "
                "together; leave one of the two out."
            )


def settle_head_layers(
    vllm_config: Any,
    device_name: str,
    head: HeadCheckpoint | None,
    aux_layers: Sequence[int],
    page_bytes: int,
) -> None:
    """Where the connector is one of ours: have it made, and keep KV apart by what it hangs on, in
    place. Idempotent.

    Args:
        device_name: whose kernels make the KV, and lay it out.
        aux_layers: that the head reads, if there is one.
        page_bytes: what it keeps of a page.

    Uses: vllm.config.kv_transfer.KVTransferConfig.kv_connector_module_path,
        vllm.config.kv_transfer.KVTransferConfig.kv_connector_extra_config
    Symptom: vLLM's own connector is made, which knows nothing of the head.
    Reason: the configuration names it.
    Remove when: the head's caches are layers of vLLM's.
    """
    if (name := our_connector(vllm_config)) is None:
        return
    transfer, model = vllm_config.kv_transfer_config, vllm_config.model_config
    transfer.kv_connector_module_path = CONNECTOR_MODULES[name]
    config = SpeContextConfig.from_additional_config(vllm_config.additional_config)
    kept = (
        model.model,
        model.revision,
        json.dumps(model.hf_text_config.to_dict(), sort_keys=True, default=str),
        str(model.dtype),
        vllm_config.cache_config.cache_dtype,
        device_name,
        # With generated tokens in its prefix cache, an engine's prompts are not all dense.
        config.cache_generated,
    )
    transfer.kv_connector_extra_config |= {
        KV_PRINT: hashlib.blake2b(repr(kept).encode(), digest_size=8).hexdigest()
    }
    if head is not None:
        digest = digest_of(head, aux_layers, model.max_model_len)
        transfer.kv_connector_extra_config |= {HEAD_PRINT: f"{digest}-{page_bytes}"}


def settle_connector(vllm_config: Any, block_bytes: int) -> None:
    """Have vLLM's offloading move ``block_bytes`` of a block that the head keeps, in place.
    Idempotent.

    Uses: vllm.config.kv_transfer.KVTransferConfig.kv_connector_extra_config,
        vllm.config.cache.CacheConfig.kv_offloading_size
    Symptom: vLLM's own spec is made, which knows nothing of the head.
    Reason: the configuration names it; from --kv-offloading-size vLLM makes one later, and keeps
        what it finds in it (vllm/config/vllm.py, _post_init_kv_transfer_config).
    Remove when: the head's caches are layers of vLLM's.
    """
    if found_connector(vllm_config) is None or our_connector(vllm_config) or not block_bytes:
        return
    if vllm_config.kv_transfer_config is None:
        from vllm.config import KVTransferConfig

        vllm_config.kv_transfer_config = KVTransferConfig(
            kv_connector=OFFLOADING_CONNECTOR, kv_role="kv_both"
        )
    vllm_config.kv_transfer_config.kv_connector_extra_config |= {
        "spec_name": OFFLOADING_SPEC,
        "spec_module_path": OFFLOADING_MODULE,
        HEAD_BLOCK_BYTES: block_bytes,
    }
