"""vLLM's schedulers with one difference: a prefix hit waits until the step that computes its pages is over."""

from __future__ import annotations

from typing import Any

from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.scheduler import Scheduler

from specontext_vllm.config import PAGE_SIZE


class WaitsForPages:
    """Skips a waiting request for a step in which another request still computes pages that it hits.

    Symptom: of requests with one prompt that arrive together, those with a suffix of one token answer otherwise than alone.
    Reason: vLLM enters pages into the prefix cache when it schedules them (vllm/v1/core/kv_cache_manager.py, allocate_slots), so that a hit may
    be computed in the very step that reads it. For dense attention that is soon enough, layer by layer. A selection comes before all layers, from keys
    that the head makes after them, and a host pool's pages are fetched ahead of the layers that write them.
    Remove when: vLLM can be told that hits need computed pages. ``_ec_transfer_pending`` is where it skips requests whose inputs are on their way.
    """

    def _get_local_prefix_cache_hit(self, request: Any, *limit: Any) -> Any:
        # vLLM 0.33 adds the longest hit that may be taken.
        found = super()._get_local_prefix_cache_hit(request, *limit)
        self._hit = {block.block_id for block in found[0].blocks[0]}
        return found

    def _ec_transfer_pending(self, request: Any, num_computed_tokens: int) -> bool:
        # A request that resumes with computed tokens has not been looked up.
        looked_up = request.num_computed_tokens == 0
        return super()._ec_transfer_pending(request, num_computed_tokens) or (looked_up and self._is_being_computed(self._hit))

    def _is_being_computed(self, hit: set[int]) -> bool:
        # A running request's computed tokens are counted up after the step has been scheduled.
        return bool(hit) and any(
            block.block_id in hit
            for running in self.running
            for block in self.kv_cache_manager.get_blocks(running.request_id).blocks[0][running.num_computed_tokens // PAGE_SIZE :]
        )


class SpeContextScheduler(WaitsForPages, Scheduler):
    """vLLM's scheduler."""


class SpeContextAsyncScheduler(WaitsForPages, AsyncScheduler):
    """vLLM's scheduler that runs ahead of the GPU."""
