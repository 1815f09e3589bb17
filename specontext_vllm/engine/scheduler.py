"""vLLM's schedulers with what sparse decode steps ask of the prefix cache: hits wait for their
pages, and only exact pages are kept.

vLLM's scheduler knows blocks, of ``--block-size`` tokens and of every KV-cache group. A block is
one page or several (kv_group.py).

vLLM: the schedulers to derive from.
"""

from __future__ import annotations

from typing import Any

from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.scheduler import Scheduler

from specontext_vllm.config import PAGE_SIZE, SpeContextConfig
from specontext_vllm.engine.draft_length import DraftLength
from specontext_vllm.engine.lossless import choose_drafts
from specontext_vllm.engine.names import OFFLOADING_CONNECTOR
from specontext_vllm.engine.other_blocks import keep_apart
from specontext_vllm.engine.request_settings import read_budget


class WaitsForPages(Scheduler):
    """Skips a waiting request for a step in which another request still computes blocks that it
    hits.

    Symptom: of requests with one prompt that arrive together, those after the first answer
        otherwise than alone.
    Reason: vLLM enters blocks into the prefix cache when it schedules them
        (vllm/v1/core/kv_cache_manager.py, allocate_slots), so a hit may be computed in the very
        step that reads it. For dense attention that is soon enough, layer by layer. The head's key
        of the token after the hit needs what the head learns of the hit after all layers, and a
        host pool's pages are fetched ahead of the layers that write them.
    Remove when: vLLM can be told that hits need computed blocks. ``_ec_transfer_pending`` is where
        it skips requests whose inputs are on their way.
    """

    def _get_local_prefix_cache_hit(self, request: Any, *limit: Any) -> Any:
        """Remembers the hit's blocks.

        Overrides: vllm.v1.core.sched.scheduler.Scheduler._get_local_prefix_cache_hit
        """
        # vLLM 0.33 adds the longest hit that may be taken.
        found = super()._get_local_prefix_cache_hit(request, *limit)
        # By group: several may have a block of the same number each.
        self._hit = [
            {block.block_id for block in blocks if not block.is_null} for blocks in found[0].blocks
        ]
        return found

    def _ec_transfer_pending(self, request: Any, num_computed_tokens: int) -> bool:
        """A request whose hit is being computed waits as one whose inputs are on their way.

        Overrides: vllm.v1.core.sched.scheduler.Scheduler._ec_transfer_pending
        """
        # A request that resumes with computed tokens has not been looked up.
        looked_up = request.num_computed_tokens == 0
        return super()._ec_transfer_pending(request, num_computed_tokens) or (
            looked_up and self._is_being_computed(self._hit)
        )

    def _is_being_computed(self, hit: list[set[int]]) -> bool:
        """Whether a running request still writes one of the blocks ``hit`` of a group."""
        if not any(hit):
            return False
        # A running request's computed tokens are counted up after the step has been scheduled.
        sizes = [group.kv_cache_spec.block_size for group in self.kv_cache_config.kv_cache_groups]
        return any(
            block.block_id in hits
            for running in self.running
            for size, hits, blocks in zip(
                sizes, hit, self.kv_cache_manager.get_blocks(running.request_id).blocks, strict=True
            )
            for block in blocks[running.num_computed_tokens // size :]
        )


class CachesExactPages(Scheduler):
    """Keeps blocks out of the prefix cache whose KV a dense prefill of the same tokens would not
    make.

    Symptom: the next turn of a conversation answers otherwise than it would with a cold cache.
    Reason: vLLM caches generated tokens' blocks like any other, by their tokens
        (vllm/v1/core/kv_cache_manager.py, cache_blocks); beyond the budget they hold KV that was
        made under sparse attention. ``cache_generated`` lets them in.
    Remove when: vLLM lets a scheduler say how many of a request's tokens may be cached.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        """Replaces the coordinator's ``cache_blocks``.

        Uses: vllm.v1.core.kv_cache_manager.KVCacheManager.coordinator,
            vllm.v1.core.kv_cache_coordinator.KVCacheCoordinator.cache_blocks
        Overrides: vllm.v1.core.sched.scheduler.Scheduler.__init__
        """
        super().__init__(*args, **kwargs)
        self._config = config = SpeContextConfig.from_additional_config(
            self.vllm_config.additional_config
        )
        self._caches_generated = config.cache_generated
        if self._caches_generated:
            return
        coordinator = self.kv_cache_manager.coordinator
        cache = coordinator.cache_blocks

        def cache_exact(request: Any, num_computed_tokens: int) -> None:
            # vLLM caches whole blocks of these tokens.
            cache(request, min(num_computed_tokens, self._exact_end(request)))

        coordinator.cache_blocks = cache_exact

    def _exact_end(self, request: Any) -> int:
        """Leading tokens of a request whose KV is that of dense attention: its prompt's, and what
        decode steps read whole.
        """
        # A session's answers become a part of its prompt, but were not computed as one.
        if end := getattr(request, "_specontext_exact_end", None):
            return end
        exact = getattr(request, "_specontext_read_whole", None)
        if exact is None:
            extra_args = getattr(request.sampling_params, "extra_args", None)
            budget = read_budget(extra_args, self._config, self.max_model_len)
            exact = self._config.exact_tokens(self.max_model_len, budget)
            request._specontext_read_whole = exact
        return max(request.num_prompt_tokens, exact)

    def _update_request_as_session(self, session: Any, update: Any) -> None:
        """Remembers how much of a session was exact before its answers join its prompt.

        Overrides: vllm.v1.core.sched.scheduler.Scheduler._update_request_as_session
        """
        if session.num_computed_tokens > (exact := self._exact_end(session)):
            session._specontext_exact_end = exact
        super()._update_request_as_session(session, update)
        # Its next turn may have a budget of its own.
        session._specontext_read_whole = None


class OffloadsExactPages(CachesExactPages):
    """Offloads what may be in the prefix cache, and takes whole blocks back.

    Symptom: the next turn of a conversation answers otherwise than it would with a cold cache; or a
        prompt that has come back as a whole answers otherwise than it did at first.
    Reason: vLLM offloads all blocks of a request by their tokens, and where all of a prompt has
        come back computes its last token again, in the middle of a page. Of that page the head
        keeps the last token's aux alone.
    Remove when: vLLM lets a scheduler say how many of a request's tokens may be offloaded, and
        loaded.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        """Replaces two of the connector's methods.

        Overrides: vllm.v1.core.sched.scheduler.Scheduler.__init__
        Uses: vllm.v1.core.sched.scheduler.Scheduler.connector,
            vllm.distributed.kv_transfer.kv_connector.v1.offloading_connector.OffloadingConnector._max_loadable_tokens,
            vllm.distributed.kv_transfer.kv_connector.v1.offloading.scheduler.OffloadingConnectorScheduler._calc_num_offloadable_tokens
        """
        super().__init__(*args, **kwargs)
        transfer = self.vllm_config.kv_transfer_config
        if transfer is None or transfer.kv_connector != OFFLOADING_CONNECTOR:
            return
        connector = self.connector.connector_scheduler
        (group,) = connector.config.kv_group_configs
        offloadable, loadable = (
            connector._calc_num_offloadable_tokens,
            self.connector._max_loadable_tokens,
        )

        def exact(status: Any, computed: int) -> int:
            return min(offloadable(status, computed), self._exact_end(status.req))

        def whole(request: Any, computed: int) -> int:
            # The last token is always computed.
            chunk = group.tokens_per_chunk
            most = max(0, (request.num_tokens - 1) // chunk * chunk - computed)
            bound = loadable(request, computed)
            return most if bound is None else min(most, bound)

        if not self._caches_generated:
            connector._calc_num_offloadable_tokens = exact
        self.connector._max_loadable_tokens = whole


class GoesOnFromPages(Scheduler):
    """A session goes on from the start of its newest page, where its last answer may have ended
    before the last token that a step computed.
    """

    def _update_request_as_session(self, session: Any, update: Any) -> None:
        """A session goes on from the start of its newest page.

        Overrides: vllm.v1.core.sched.scheduler.Scheduler._update_request_as_session
        Uses: vllm.v1.request.Request.num_computed_tokens
        Symptom: a session's next turn is answered otherwise than the same tokens in one prompt.
        Reason: the step that was under way when the last answer ended has run with a token that was
            then discarded, or the answer ended among drafts that were accepted; and of that page's
            tokens the head keeps the latest one's aux alone. At a page's start the next key is made
            from the page before.
        Remove when: vLLM does not run ahead of a session's end.
        """
        super()._update_request_as_session(session, update)
        if not (isinstance(self, AsyncScheduler) or self.num_spec_tokens):
            return
        # Within a block, too: vLLM lets a session go on at any token, and pages are smaller.
        if session.num_computed_tokens % PAGE_SIZE == 0:
            return
        session.num_computed_tokens -= session.num_computed_tokens % PAGE_SIZE
        if len(self.kv_cache_config.kv_cache_groups) > 1:
            # Layers with a window may have given up the block that its first tokens need now; the
            # prefix cache gives back what it has.
            session.num_computed_tokens = 0
        if session.num_computed_tokens == 0:
            # vLLM takes a request without computed tokens for one without blocks.
            self.kv_cache_manager.free(session)


class KeepsPoolsApart(Scheduler):
    """With a host pool, layers of other kinds have blocks of their own."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        """Parts the pools; see ``keep_apart``.

        Overrides: vllm.v1.core.sched.scheduler.Scheduler.__init__
        """
        super().__init__(*args, **kwargs)
        config = SpeContextConfig.from_additional_config(self.vllm_config.additional_config)
        if config.host_kv_gib and len(self.kv_cache_config.kv_cache_groups) > 1:
            keep_apart(self.vllm_config, self.kv_cache_manager)


class ChoosesDrafts(Scheduler):
    """In lossless mode each step makes as many drafts as pay.

    Symptom: steps make as many drafts as the configuration says, whatever becomes of them.
    Reason: vLLM chooses the number by the size of the batch alone.
    Remove when: a scheduler can say how many drafts a step makes.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        """Makes what chooses.

        Overrides: vllm.v1.core.sched.scheduler.Scheduler.__init__
        """
        super().__init__(*args, **kwargs)
        self.draft_length: DraftLength | None = None
        config = SpeContextConfig.from_additional_config(self.vllm_config.additional_config)
        if config.is_lossless:
            self.draft_length = choose_drafts(self.vllm_config, self.kv_cache_config)

    def _update_after_schedule(self, scheduler_output: Any) -> None:
        """Says how many drafts the step makes, for the next one to verify.

        Overrides: vllm.v1.core.sched.scheduler.Scheduler._update_after_schedule
        Uses: vllm.v1.core.sched.output.SchedulerOutput.num_spec_tokens_to_schedule
        """
        if self.draft_length is not None:
            scheduled = scheduler_output.num_scheduled_tokens
            decoding = [
                request.num_tokens
                for name, tokens in scheduled.items()
                if (request := self.requests[name]).num_computed_tokens + tokens
                >= request.num_tokens
            ]
            chosen = self.draft_length.choose(decoding)
            scheduler_output.num_spec_tokens_to_schedule = chosen
        super()._update_after_schedule(scheduler_output)

    def make_spec_decoding_stats(
        self,
        spec_decoding_stats: Any,
        num_draft_tokens: int,
        num_accepted_tokens: int,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        """Learns what became of a row's drafts.

        Overrides: vllm.v1.core.sched.scheduler.Scheduler.make_spec_decoding_stats
        """
        if self.draft_length is not None:
            self.draft_length.observe(num_draft_tokens, num_accepted_tokens)
        return super().make_spec_decoding_stats(
            spec_decoding_stats, num_draft_tokens, num_accepted_tokens, *args, **kwargs
        )


class SpeContextScheduler(
    ChoosesDrafts, GoesOnFromPages, OffloadsExactPages, WaitsForPages, KeepsPoolsApart, Scheduler
):
    """vLLM's scheduler."""


class SpeContextAsyncScheduler(
    ChoosesDrafts,
    GoesOnFromPages,
    OffloadsExactPages,
    WaitsForPages,
    KeepsPoolsApart,
    AsyncScheduler,
):
    """vLLM's scheduler that runs ahead of the GPU."""
