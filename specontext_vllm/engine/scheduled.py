"""What the scheduler decided for a step, in the tiers' terms."""

from __future__ import annotations

from typing import Any

from specontext_vllm.config import PAGE_SIZE, pages_for
from specontext_vllm.engine.kv_group import KVGroup
from specontext_vllm.step_data import ScheduledStep, StartedRequest


class ScheduleReader:
    """Reads vLLM's ``SchedulerOutput``; remembers which tokens of a request are its prompt.

    Args:
        group: of our layers, whose blocks are read.
        num_drafts: drafts of a row, at the most.
    """

    def __init__(self, group: KVGroup, num_drafts: int = 0) -> None:
        self._group, self._num_drafts = group, num_drafts
        self._prefill_ends: dict[str, int] = {}
        """Of the requests in flight: tokens that are computed as a prompt."""

    def read(self, output: Any) -> ScheduledStep:
        """Pages handed out, requests gone, rows that decode, pages that are written."""
        cached = output.scheduled_cached_reqs
        step = ScheduledStep(released=[*output.finished_req_ids, *(output.preempted_req_ids or ())])
        for name in output.finished_req_ids:
            self._prefill_ends.pop(name, None)
        computed_tokens = {}
        for request in output.scheduled_new_reqs:
            name, computed = request.req_id, request.num_computed_tokens
            # The V2 runner is told of a resumed request's own tokens as well, which it computes
            # like a prompt.
            prefill = request.prefill_token_ids or request.prompt_token_ids
            self._prefill_ends[name] = len(prefill)
            computed_tokens[name] = computed
            step.started.append(
                StartedRequest(name, self._group.pages(request.block_ids), pages_for(computed))
            )
            # A session goes on within a page.
            step.written.append((name, computed // PAGE_SIZE))
        for name, block_ids, computed in zip(
            cached.req_ids, cached.new_block_ids, cached.num_computed_tokens, strict=True
        ):
            computed_tokens[name] = computed
            pages = self._group.pages(block_ids)
            if name in cached.resumed_req_ids:
                step.released.append(name)
                step.started.append(StartedRequest(name, pages, pages_for(computed)))
                continue
            # Scheduled ahead, the drafts of the step before are counted, and may be rejected yet.
            step.written.append((name, max(0, computed - self._num_drafts) // PAGE_SIZE))
            if pages:
                step.grown.append((name, pages))
        for name, tokens in output.num_scheduled_tokens.items():
            is_prefill = (
                tokens > 1 + self._num_drafts or computed_tokens[name] < self._prefill_ends[name]
            )
            (step.prefilling if is_prefill else step.decoding).append(name)
        return step
