"""Host memory for KV that left the GPU (vLLM's OffloadingConnector): what the head keeps of a block
goes along.

vLLM: its memory on the host, what it moves there, and the connector of a worker.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from vllm.distributed.kv_transfer import get_kv_transfer_group
from vllm.v1.kv_offload.base import CanonicalKVCacheRef, CanonicalKVCaches, CanonicalKVCacheTensor
from vllm.v1.kv_offload.cpu.spec import CPUOffloadingSpec, CPUOffloadingWorker

from specontext_vllm.engine.names import HEAD_BLOCK_BYTES
from specontext_vllm.retrieval.cache import HeadCache


class SpeContextOffloadingSpec(CPUOffloadingSpec):
    """vLLM's memory on the host, with room in each block for what the head keeps of it.

    Stores are submitted when the next step begins, so that the head has learnt what is stored; a
    request whose blocks are loaded waits for all that a block holds.

    Symptom: a prefix that comes back from the host has its KV, and keys of the head that were made
        of other tokens.
    Reason: vLLM moves the layers that its KVCacheConfig names
        (vllm/distributed/kv_transfer/kv_connector/v1/offloading/worker.py, register_kv_caches).
    Remove when: the head's caches are layers of vLLM's, or a plugin can name memory that belongs to
        blocks.
    """

    def __init__(self, config: Any) -> None:
        """Counts the head's bytes as a part of each block, in the scheduler and in the workers.

        Overrides: vllm.v1.kv_offload.cpu.spec.CPUOffloadingSpec.__init__
        """
        more = int(config.extra_config[HEAD_BLOCK_BYTES])
        size = config.worker_kv_bytes_per_block + more
        super().__init__(replace(config, worker_kv_bytes_per_block=size))
        self.beside_kv: list[Tensor] = []
        """``[num_blocks, bytes]`` int8 each, set before vLLM's caches are registered."""

    def create_worker(self, kv_caches: CanonicalKVCaches) -> CPUOffloadingWorker:
        """Adds the head's caches to what is moved of a block.

        Overrides: vllm.v1.kv_offload.cpu.spec.CPUOffloadingSpec.create_worker
        """
        return super().create_worker(with_blocks_of(self.beside_kv, kv_caches))


def with_blocks_of(tensors: Sequence[Tensor], kv_caches: CanonicalKVCaches) -> CanonicalKVCaches:
    """``kv_caches`` of one group of layers, and ``tensors [num_blocks, bytes]`` int8 with them."""
    (group,) = kv_caches.group_data_refs
    together, refs = list(kv_caches.tensors), list(group)
    for tensor in tensors:
        size = tensor.shape[1]
        refs.append(CanonicalKVCacheRef(len(together), size))
        together.append(CanonicalKVCacheTensor(tensor, size))
    return CanonicalKVCaches(together, [refs])


def take_along(cache: HeadCache, num_blocks: int) -> None:
    """Let this worker's connector move the head's ``cache`` with the KV of ``num_blocks`` blocks.

    Uses: vllm.distributed.kv_transfer.get_kv_transfer_group,
        vllm.distributed.kv_transfer.kv_connector.v1.offloading.worker.OffloadingConnectorWorker.spec
    Symptom: the spec does not know the head's caches.
    Reason: vLLM makes it before there are any, and hands it its own.
    Remove when: a worker can register memory with a connector.
    """
    spec = get_kv_transfer_group().connector_worker.spec
    spec.beside_kv = [blocks_of(tensor, num_blocks) for tensor in (cache.keys, cache.fused)]


def blocks_of(tensor: Tensor, num_blocks: int) -> Tensor:
    """The bytes of the first pages of ``tensor [pages, ...]``, contiguous, as ``[num_blocks,
    bytes]`` int8; what is left over belongs to no block.
    """
    pages = tensor.shape[0] // num_blocks
    size = pages * tensor[0].nbytes
    begin = tensor.storage_offset() * tensor.itemsize
    raw = torch.empty(0, dtype=torch.int8, device=tensor.device)
    return raw.set_(tensor.untyped_storage(), begin, (num_blocks, size), (size, 1))
