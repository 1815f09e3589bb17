"""KV that a decode engine reads out of a prefill engine's memory (vLLM's NixlConnector): what the
head keeps of its pages goes along.

vLLM: its connector that pulls blocks.
"""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from vllm.distributed.kv_transfer import get_kv_transfer_group
from vllm.distributed.kv_transfer.kv_connector.v1.nixl import connector

from specontext_vllm.config import PAGE_SIZE
from specontext_vllm.engine.connector import head_layers
from specontext_vllm.engine.names import HEAD_PRINT, KV_PRINT
from specontext_vllm.retrieval.cache import HeadCache


class NixlConnector(connector.NixlPullConnector):
    """vLLM's connector, with the head's caches as two more layers. The name is vLLM's, since it
    looks a connector's class up by the name in its configuration.

    Symptom: a prompt that comes from another engine has its KV, and keys of the head that were made
        of other tokens.
    Reason: vLLM registers the layers that it knows, and reads a prompt to its end; it then computes
        the last token again, in the middle of a page. Of that page the head keeps the last token's
        aux alone.
    Remove when: the head's caches are layers of vLLM's, and a scheduler can say where a hit ends.
    """

    def __init__(self, vllm_config: Any, role: Any, kv_cache_config: Any) -> None:
        """Overrides:
        vllm.distributed.kv_transfer.kv_connector.v1.nixl.connector.NixlPullConnector.__init__
        """
        super().__init__(vllm_config, role, kv_cache_config)
        extra = vllm_config.kv_transfer_config.kv_connector_extra_config
        (group,) = kv_cache_config.kv_cache_groups
        self._tokens = group.kv_cache_spec.block_size
        self._head_layers = head_layers(extra.get(HEAD_PRINT))
        self._kind = f"{extra[KV_PRINT]} {extra.get(HEAD_PRINT)} {self._tokens}"
        self._head: dict[str, Tensor] = {}
        self._learn_pages: Callable[[Tensor], None] = lambda slots: None

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
        found = max(0, min(found, self._end(request) - num_computed_tokens))
        return found, later and found > 0

    def update_state_after_alloc(self, request: Any, blocks: Any, num_external_tokens: int) -> None:
        """Tells of the blocks that are read, which vLLM counts from the last one.

        Overrides:
            vllm.distributed.kv_transfer.kv_connector.v1.nixl.connector.NixlBaseConnector.update_state_after_alloc
        Uses: vllm.v1.request.Request.kv_transfer_params
        """
        there = request.kv_transfer_params
        if there and there.get("do_remote_prefill") and there.get("remote_block_ids"):
            count = self._end(request) // self._tokens
            there["remote_block_ids"] = [group[:count] for group in there["remote_block_ids"]]
        super().update_state_after_alloc(request, blocks, num_external_tokens)

    def _end(self, request: Any) -> int:
        """Tokens of a prompt in whole blocks, without its last token, which is always computed."""
        return int((request.num_prompt_tokens - 1) // self._tokens * self._tokens)

    # -- in a worker

    def take_caches(self, cache: HeadCache | None, learn_pages: Callable[[Tensor], None]) -> None:
        """Before vLLM registers its own caches: what is moved beside KV, and what follows from KV.

        Args:
            cache: the head's, if there is one.
            learn_pages: is told the slots ``[N]`` int64 whose KV was loaded.
        """
        layers = () if cache is None else cache.as_layers()
        self._head = dict(zip(self._head_layers, layers, strict=True))
        self._learn_pages = learn_pages

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
        worker.backend_name = f"{worker.backend_name} {self._kind}"
        for name, layer in self._head.items():
            size = layer[0].nbytes * (self._tokens // PAGE_SIZE)
            worker._layer_specs[name] = SimpleNamespace(page_size_bytes=size)
            worker.kv_cache_config.transfer_group_index_by_layer[name] = 0
        super().register_kv_caches(kv_caches | self._head)

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
                places = torch.tensor(blocks[0])[:, None] * self._tokens
                self._learn_pages((places + torch.arange(self._tokens)).flatten())
        return results


def take_head(cache: HeadCache | None, learn_pages: Callable[[Tensor], None]) -> None:
    """Let this worker's connector move the head's ``cache`` with the KV from now on; see
    ``NixlConnector.take_caches``.

    Uses: vllm.distributed.kv_transfer.get_kv_transfer_group
    """
    found = get_kv_transfer_group()
    assert isinstance(found, NixlConnector)
    found.take_caches(cache, learn_pages)
