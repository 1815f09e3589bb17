"""vLLM's schedulers with what sparse decode steps ask of the prefix cache: hits wait for their
pages, and only exact pages are kept.
"""

from __future__ import annotations

from typing import Any

from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.scheduler import Scheduler

from specontext_vllm.config import PAGE_SIZE, SpeContextConfig


class WaitsForPages:
    """Skips a waiting request for a step in which another request still computes pages that it
    hits.

    Symptom: of requests with one prompt that arrive together, those behind the first answer
        otherwise than alone.
    Reason: vLLM enters pages into the prefix cache when it schedules them
        (vllm/v1/core/kv_cache_manager.py, allocate_slots), so that a hit may
    be computed in the very step that reads it. For dense attention that is soon enough, layer by
    layer. The head's key of the token behind the hit needs what the head learns of the hit after
    all layers, and a host pool's pages are fetched ahead of the layers that write them.
    Remove when: vLLM can be told that hits need computed pages. ``_ec_transfer_pending`` is where
        it skips requests whose inputs are on their way.
    """

    def _get_local_prefix_cache_hit(self, request: Any, *limit: Any) -> Any:
        # vLLM 0.33 adds the longest hit that may be taken.
        found = super()._get_local_prefix_cache_hit(request, *limit)
        self._hit = {block.block_id for block in found[0].blocks[0]}
        return found

    def _ec_transfer_pending(self, request: Any, num_computed_tokens: int) -> bool:
        # A request that resumes with computed tokens has not been looked up.
        looked_up = request.num_computed_tokens == 0
        return super()._ec_transfer_pending(request, num_computed_tokens) or (
            looked_up and self._is_being_computed(self._hit)
        )

    def _is_being_computed(self, hit: set[int]) -> bool:
        # A running request's computed tokens are counted up after the step has been scheduled.
        return bool(hit) and any(
            block.block_id in hit
            for running in self.running
            for block in self.kv_cache_manager.get_blocks(running.request_id).blocks[0][
                running.num_computed_tokens // PAGE_SIZE :
            ]
        )


class CachesExactPages:
    """Keeps pages out of the prefix cache whose KV a dense prefill of the same tokens would not
    make.

    Symptom: the next turn of a conversation answers otherwise than it would with a cold cache.
    Reason: vLLM caches generated tokens' pages like any other, by their tokens
        (vllm/v1/core/kv_cache_manager.py, cache_blocks); beyond the budget they hold KV
    that was made under sparse attention. ``cache_generated`` lets them in.
    Remove when: vLLM lets a scheduler say how many of a request's tokens may be cached.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        config = SpeContextConfig.from_additional_config(self.vllm_config.additional_config)
        self._exact_tokens = config.exact_tokens(self.max_model_len)
        if config.cache_generated:
            return
        coordinator = self.kv_cache_manager.coordinator
        cache = coordinator.cache_blocks

        def cache_exact(request: Any, num_computed_tokens: int) -> None:
            cache(request, min(num_computed_tokens, self._exact_end(request)))

        coordinator.cache_blocks = cache_exact

    def _exact_end(self, request: Any) -> int:
        """Leading tokens of a request whose KV is that of dense attention: its prompt's, and what
        decode steps read whole.
        """
        # A session's answers become a part of its prompt, but were not computed as one.
        return getattr(request, "_specontext_exact_end", None) or max(
            request.num_prompt_tokens, self._exact_tokens
        )

    def _update_request_as_session(self, session: Any, update: Any) -> None:
        if session.num_computed_tokens > (exact := self._exact_end(session)):
            session._specontext_exact_end = exact
        super()._update_request_as_session(session, update)


class SpeContextScheduler(CachesExactPages, WaitsForPages, Scheduler):
    """vLLM's scheduler."""


class SpeContextAsyncScheduler(CachesExactPages, WaitsForPages, AsyncScheduler):
    """vLLM's scheduler that runs ahead of the GPU."""

    def _update_request_as_session(self, session: Any, update: Any) -> None:
        """A session goes on from the start of its newest page.

        The step that was under way when its last chunk's answer ended has run with a token that was
        then discarded, and of the tokens in that page the head
        knows the discarded one alone: the next token's key would be made from it. At a page's start
            it is made from the page before.
        """
        super()._update_request_as_session(session, update)
        if session.num_computed_tokens % PAGE_SIZE == 0:
            return
        session.num_computed_tokens -= session.num_computed_tokens % PAGE_SIZE
        if session.num_computed_tokens == 0:
            # vLLM takes a request without computed tokens for one without pages.
            self.kv_cache_manager.free(session)
