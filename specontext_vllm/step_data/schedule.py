"""What the scheduler decided for a step."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True)
class StartedRequest:
    """A request that enters the batch: new, or resumed after a preemption.

    Attributes:
        name: vLLM's request id.
        pages: logical pages it holds.
        computed: leading pages whose content exists already: of a prefix hit, or the session's own,
            a partly filled one included.
    """

    name: str
    pages: list[int]
    computed: int


@dataclass(frozen=True)
class ScheduledStep:
    """What the scheduler decided for a step, as far as the tiers follow it.

    All pages are of ``PAGE_SIZE`` tokens (vLLM's kernel blocks): blocks of 32, 64 or 128 tokens are
    expanded into pages before they get here.

    Attributes:
        released: requests that hold no pages any more, also for a moment (preempted, resumed).
        started: requests that enter the batch.
        grown: ``(name, pages)``: further pages of a running request.
        decoding, prefilling: requests with a decode row, or with prompt tokens, in this step.
        written: ``(name, page)``: the first page of a request that this step writes to, counted
            from the request's start.
    """

    released: list[str] = field(default_factory=list)
    started: list[StartedRequest] = field(default_factory=list)
    grown: list[tuple[str, list[int]]] = field(default_factory=list)
    decoding: list[str] = field(default_factory=list)
    prefilling: list[str] = field(default_factory=list)
    written: list[tuple[str, int]] = field(default_factory=list)
