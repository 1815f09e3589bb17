"""What moves the KV of a block moves what the head keeps of it: as two more layers, in connectors
of ours, or beside it.

vLLM: the connector of a worker.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from specontext_vllm.engine.connector import our_connector
from specontext_vllm.engine.names import HEAD_PRINT
from specontext_vllm.retrieval.cache import HeadCache


class MovesHead:
    """What connectors with the head's caches as layers have beside vLLM's methods."""

    def __init__(self, vllm_config: Any, role: Any, kv_cache_config: Any) -> None:
        super().__init__(vllm_config, role, kv_cache_config)  # type: ignore[call-arg]
        head = vllm_config.kv_transfer_config.kv_connector_extra_config.get(HEAD_PRINT)
        (group,) = kv_cache_config.kv_cache_groups
        self.kv_layers, self.block_tokens = list(group.layer_names), group.kv_cache_spec.block_size
        parts = () if head is None else ("keys", "fused")
        self.head_layers = [f"specontext.{head}.{part}" for part in parts]
        self.head_caches: dict[str, Tensor] = {}
        self.learn_pages: Callable[[Tensor], None] = lambda slots: None

    def take_caches(self, cache: HeadCache | None, learn_pages: Callable[[Tensor], None]) -> None:
        """In a worker, before vLLM registers its own caches: what is moved beside KV, and what
        follows from KV.

        Args:
            cache: the head's, if there is one.
            learn_pages: is told the slots ``[N]`` int64 whose KV was loaded.
        """
        layers = () if cache is None else cache.as_layers()
        self.head_caches = dict(zip(self.head_layers, layers, strict=True))
        self.learn_pages = learn_pages

    def exact_end(self, request: Any) -> int:
        """Tokens of a prompt in whole blocks, without its last token, which is always computed."""
        size = self.block_tokens
        return int((request.num_prompt_tokens - 1) // size * size)


def move_with_kv(
    vllm_config: Any,
    cache: HeadCache | None,
    learn_pages: Callable[[Tensor], None],
    num_blocks: int,
) -> Any:
    """Let this worker's connector move the head's ``cache``, if there is one, with the KV of
    ``num_blocks`` blocks; to be said before vLLM registers its own caches.

    Uses: vllm.distributed.kv_transfer.get_kv_transfer_group

    Args:
        learn_pages: see ``MovesHead.take_caches``.
    Returns:
        A connector that is to be told when a step's tokens are learnt (``save_head``), or None.
    """
    # vLLM's connectors, which few engines have.
    if our_connector(vllm_config) is None:
        if cache is not None:
            from specontext_vllm.engine.offloading import take_along

            take_along(cache, num_blocks)
        return None
    from vllm.distributed.kv_transfer import get_kv_transfer_group

    connector = get_kv_transfer_group()
    assert isinstance(connector, MovesHead)
    connector.take_caches(cache, learn_pages)
    return connector if hasattr(connector, "save_head") else None
