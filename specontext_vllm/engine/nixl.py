"""KV that a decode engine reads out of a prefill engine's memory (vLLM's NixlConnector): what the
head keeps of its pages goes along.

vLLM: its connector that pulls blocks.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from vllm.distributed.kv_transfer.kv_connector.v1.nixl import connector

from specontext_vllm.config import PAGE_SIZE
from specontext_vllm.engine.head_layers import MovesHead
from specontext_vllm.engine.names import HEAD_PRINT, KV_PRINT


class NixlConnector(MovesHead, connector.NixlPullConnector):
    """vLLM's connector, with the head's caches as two more layers. The name is vLLM's, since it
    looks a connector's class up by the name in its configuration.

    Symptom: a prompt that comes from another engine has its KV, and keys of the head that were made
        of other tokens.
    Reason: vLLM registers the layers that it knows, and reads a prompt to its end; it then computes
        the last token again, in the middle of a page. Of that page the head keeps the last token's
        aux alone.
    Remove when: the head's caches are layers of vLLM's, and a scheduler can say where a hit ends.
    """

    # -- in the scheduler

    def get_num_new_matched_tokens(
        self, request: Any, num_computed_tokens: int
    ) -> tuple[int | None, bool]:
        """Tokens that are read, up to the block of the prompt's last one.

        Overrides:
            vllm.distributed.kv_transfer.kv_connector.v1.nixl.connector.NixlBaseConnector.get_num_new_matched_tokens
        """
        found, later = super().get_num_new_matched_tokens(request, num_computed_tokens)
        if not (request.kv_transfer_params or {}).get("do_remote_prefill"):
            # A prefill engine's own: it takes nothing back.
            return 0, False
        assert found is not None
        found = max(0, min(found, self.exact_end(request) - num_computed_tokens))
        return found, later and found > 0

    def update_state_after_alloc(self, request: Any, blocks: Any, num_external_tokens: int) -> None:
        """Tells of the blocks that are read, which vLLM counts from the last one.

        Overrides:
            vllm.distributed.kv_transfer.kv_connector.v1.nixl.connector.NixlBaseConnector.update_state_after_alloc
        Uses: vllm.v1.request.Request.kv_transfer_params
        """
        there = request.kv_transfer_params
        if there and there.get("do_remote_prefill") and there.get("remote_block_ids"):
            count = self.exact_end(request) // self.block_tokens
            there["remote_block_ids"] = [group[:count] for group in there["remote_block_ids"]]
        super().update_state_after_alloc(request, blocks, num_external_tokens)

    # -- in a worker

    def register_kv_caches(self, kv_caches: dict[str, Tensor]) -> None:
        """Registers the head's caches with vLLM's. Engines only read from those that have a head
        like theirs, which vLLM asks for by the attention backend's name.

        Overrides:
            vllm.distributed.kv_transfer.kv_connector.v1.nixl.connector.NixlBaseConnector.register_kv_caches
        Uses:
            vllm.distributed.kv_transfer.kv_connector.v1.nixl.connector.NixlBaseConnector.connector_worker,
            vllm.v1.kv_cache_interface.KVCacheConfig.transfer_group_index_by_layer
        """
        worker: Any = self.connector_worker
        extra = self.kv_transfer_config.kv_connector_extra_config
        kind = extra[KV_PRINT], extra.get(HEAD_PRINT), self.block_tokens
        worker.backend_name = f"{worker.backend_name} {kind}"
        for name, layer in self.head_caches.items():
            size = layer[0].nbytes * (self.block_tokens // PAGE_SIZE)
            worker._layer_specs[name] = SimpleNamespace(page_size_bytes=size)
            worker.kv_cache_config.transfer_group_index_by_layer[name] = 0
        super().register_kv_caches(kv_caches | self.head_caches)

    def get_transfer_results(self, finished_req_ids: set[str]) -> Any:
        """What follows from KV is made as soon as it is there.

        Overrides:
            vllm.distributed.kv_transfer.kv_connector.v1.nixl.connector.NixlBaseConnector.get_transfer_results
        """
        worker: Any = self.connector_worker
        under_way = dict(worker._recving_metadata)
        results = super().get_transfer_results(finished_req_ids)
        for name in results.finished_recving or ():
            if name in under_way and any(blocks := under_way[name].local_block_ids):
                places = torch.tensor(blocks[0])[:, None] * self.block_tokens
                self.learn_pages((places + torch.arange(self.block_tokens)).flatten())
        return results
