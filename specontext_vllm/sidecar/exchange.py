"""What worker and actor tell each other in the steps, also when the actor dies meanwhile."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from specontext_vllm.config import SpeContextConfig
from specontext_vllm.sidecar.host_step import HostStep, StepWriter
from specontext_vllm.sidecar.keeper import ActorKeeper
from specontext_vllm.sidecar.link import START_SECONDS, Link, SidecarDown
from specontext_vllm.sidecar.lost_pages import LostPages
from specontext_vllm.sidecar.messages import (
    Allocate,
    Configure,
    Learn,
    Learned,
    Selected,
    SidecarSpec,
)
from specontext_vllm.sidecar.mirror import Mirror
from specontext_vllm.step_data import StepBatch

logger = logging.getLogger("vllm.specontext")


@dataclass(frozen=True)
class Sent:
    """A message on its way to the actor.

    Attributes:
        step: the one it belongs to.
        reply: what ``Link.receive`` takes.
        at: when it was sent, on ``time.perf_counter``.
    """

    step: HostStep
    reply: Any
    at: float


class Exchange:
    """The messages of the steps, in pairs: a step's tokens against its selection, then its aux
    states against what was learned from them.

    Whenever the actor turns out to be gone, the pages whose content it missed are noted as lost and
    a new actor is started in the background, to be refilled from the mirror.

    Args:
        spec: what an actor builds.
        buffer_bytes: the largest message expected.
        embed: token ids ``[N]`` -> the target's embeddings ``[N, E]``.
        device: the worker's.

    Attributes:
        keeper: of the actor.
        mirror: what the actor has acknowledged.
        lost: pages that the actor does not know.
        selected: the step that the actor has selected for last, until it learns its aux states.
        restarts: actors that took the place of another.
        wait_seconds: time that steps have waited for selections.
    """

    def __init__(
        self,
        spec: SidecarSpec,
        buffer_bytes: int,
        *,
        embed: Callable[[Tensor], Tensor],
        device: torch.device,
    ) -> None:
        self.buffer_bytes, self.restarts, self.wait_seconds = buffer_bytes, 0, 0.0
        self.keeper = ActorKeeper(
            spec, buffer_bytes, embed=embed, device=device, refill=self._refill
        )
        self._forget_pages(0)
        self._writer = StepWriter(spec.max_rows, spec.max_pages)
        self.selected: HostStep | None = None
        self._selecting: Sent | None = None
        self._unsent_aux: tuple[HostStep, list[Tensor]] | None = None
        self._learning: Sent | None = None

    def allocate(self, num_blocks: int) -> None:
        """Allocate ``num_blocks`` pages, all unknown, here and in the actor, which is started if
        there is none.

        Raises:
            SidecarDown: it does not start, or has no memory for them.
        """
        self._forget_pages(num_blocks)
        link = self.keeper.link or self.keeper.start()
        link.ask(Allocate(num_blocks), START_SECONDS)

    def write_step(self, batch: StepBatch) -> HostStep:
        """Write down the step as it is to be sent; a restarted actor is taken into use first."""
        self.adopt()
        self.selected = None
        return self._writer.write(batch)

    def send(self, step: HostStep) -> None:
        """Ask for the step's selection."""
        link = self.keeper.link
        if link is None:
            self.lost.lose(step.pages.numpy())
            return
        at = time.perf_counter()
        try:
            if self._unsent_aux is not None:
                learned, aux = self._unsent_aux
                self._learning = Sent(learned, link.send(Learn(aux)), at)
                self._unsent_aux = None
            self._selecting = Sent(step, link.send(step.message), at)
        except SidecarDown as error:
            self._fail(error, step)
            return
        self._writer.sent(step)

    def receive(self) -> Selected | None:
        """The selection that ``send`` asked for; None: there is no actor, or none any more."""
        sent, self._selecting = self._selecting, None
        link = self.keeper.link
        if sent is None or link is None:
            return None
        prompt_tokens = self._tokens_to_learn()
        deadline = sent.at + link.patience.seconds(prompt_tokens)
        try:
            self._read_learned(link, deadline)
            learned_at = time.perf_counter()
            selected: Selected = link.receive(sent.reply, max(0.0, deadline - learned_at))
        except SidecarDown as error:
            self._fail(error, sent.step)
            return None
        end = time.perf_counter()
        link.patience.note(prompt_tokens, learned_at - sent.at, end - learned_at)
        self.wait_seconds += end - sent.at
        self.lost.note_step(sent.step.block_table, sent.step.starts, sent.step.seq_lens)
        self.selected = sent.step
        return selected

    def learn(self, aux: list[Tensor], *, send_now: bool) -> None:
        """Have the actor learn the aux states of the step that it has selected for.

        Args:
            send_now: their content is there; else they are sent with the next step.
        """
        step, self.selected = self.selected, None
        link = self.keeper.link
        if step is None or link is None:
            return
        if not send_now:
            self._unsent_aux = step, aux
            return
        try:
            self._learning = Sent(step, link.send(Learn(aux)), time.perf_counter())
        except SidecarDown as error:
            self._fail(error, step)

    def configure(self, config: SpeContextConfig) -> None:
        """Other settings from the next step on, for this actor and those to come."""
        self.keeper.spec = replace(self.keeper.spec, config=config)
        link = self.keeper.link
        if link is None:
            return
        try:
            deadline = time.perf_counter() + link.patience.seconds(self._tokens_to_learn())
            self._read_learned(link, deadline)
            link.ask(Configure(config))
        except SidecarDown as error:
            self._fail(error)

    def adopt(self) -> None:
        """Take a restarted actor into use, if there is one."""
        link = self.keeper.adopt()
        if link is None:
            return
        self.restarts += 1
        self._writer.forget()
        config = self.keeper.spec.config
        if link.spec.config != config:
            # Changed while it was being started.
            try:
                link.ask(Configure(config))
            except SidecarDown as error:
                self._fail(error)
                return
        logger.info(
            "SpeContext sidecar: restarted with %d pages; %d are lost.",
            self.mirror.num_known,
            self.lost.count,
        )

    def _forget_pages(self, num_blocks: int) -> None:
        spec = self.keeper.spec
        self.mirror = Mirror(num_blocks, spec.checkpoint.spec, spec.dtype, spec.key_dtype)
        self.lost = LostPages(num_blocks)

    def _refill(self) -> Iterator[Any]:
        """What a new actor is told, while the worker goes on."""
        yield Allocate(self.mirror.num_blocks)
        yield from self.mirror.refills(self.buffer_bytes // 2)

    def _tokens_to_learn(self) -> int:
        return 0 if self._learning is None else len(self._learning.step.prompt_slots)

    def _read_learned(self, link: Link, deadline: float) -> None:
        """Bring the mirror up to what the actor learned from the last step, by ``deadline`` on
        ``time.perf_counter``.
        """
        if self._learning is None:
            return
        step, reply = self._learning.step, self._learning.reply
        learned: Learned = link.receive(reply, max(0.0, deadline - time.perf_counter()))
        self._learning = None
        self.mirror.write_learned(learned.keys, step.slots, learned.fused, step.pages)

    def _fail(self, error: SidecarDown, step: HostStep | None = None) -> None:
        """The actor is gone in ``step``, or between steps: note what it missed and have a new one
        started.
        """
        logger.warning(
            "SpeContext sidecar: %s; requests are read whole until it has been restarted.", error
        )
        unlearned = [] if step is None else [step]
        if self._unsent_aux is not None:
            unlearned.append(self._unsent_aux[0])
        if self._learning is not None:
            unlearned.append(self._learning.step)
        for missed in unlearned:
            self.lost.lose(missed.pages.numpy())
        self.selected = self._selecting = self._unsent_aux = self._learning = None
        self.keeper.replace()
