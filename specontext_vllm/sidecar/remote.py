"""The worker's end of the sidecar: what ``LocalRetriever`` offers, answered by an actor, and densely
while there is none.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from specontext_vllm.config import CONFIG_KEY, PAGE_SIZE, ConfigError, SpeContextConfig, pages_for
from specontext_vllm.retrieval.cache import HeadCache, head_key_dtype
from specontext_vllm.retrieval.checkpoint import HeadCheckpoint
from specontext_vllm.retrieval.counters import PAGES_READ, Counters
from specontext_vllm.retrieval.local import LocalRetriever
from specontext_vllm.retrieval.reference import Budget
from specontext_vllm.retrieval.selection import select_rows
from specontext_vllm.sidecar.link import (
    CLOSE_SECONDS,
    IN_FLIGHT,
    START_SECONDS,
    Link,
    SidecarDown,
    join_ray,
)
from specontext_vllm.sidecar.lost_pages import LostPages
from specontext_vllm.sidecar.messages import (
    Allocate,
    Configure,
    Embeddings,
    Learn,
    Learned,
    Refill,
    Select,
    Selection,
    SidecarSpec,
)
from specontext_vllm.step_data import Selection as RowSelection
from specontext_vllm.step_data import StepBatch

logger = logging.getLogger("vllm.specontext")

RETRY_SECONDS = (1, 2, 5, 10, 30)
"""Waits between attempts to start a new actor; the last one repeats."""

MESSAGE_SLACK = 1 << 20
"""Bytes of a channel's buffer beyond the tensors of the largest message."""


@dataclass(frozen=True)
class _Step:
    """One step as the host sees it.

    Attributes:
        message: what the actor gets.
        block_table: ``[R, W]`` int32. starts: ``[R]`` positions of the rows' first tokens.
            seq_lens: ``[R]``.
        slots: ``[N]`` a copy of its own, for the mirror.
    """

    message: Select
    block_table: np.ndarray
    starts: np.ndarray
    seq_lens: np.ndarray
    slots: Tensor

    @property
    def pages(self) -> Tensor:
        """Ids of the pages that the step writes, ascending."""
        return (self.slots // PAGE_SIZE).unique()

    @property
    def prompt_tokens(self) -> int:
        """Tokens of prefill rows."""
        return len(self.slots) - self.message.num_decodes


class RemoteRetriever:
    """``LocalRetriever``'s interface over a sidecar.

    ``before_forward`` sends the step and waits for its selection; ``after_forward`` sends the
    auxiliary hidden states and does
    not wait: on a CPU at once, so that the actor works while the worker samples; on a GPU with the
        next step, since they
    do not exist before the GPU has come so far, and waiting for it here would hold up the sampling.

    When the actor dies, rows are read whole until a new one, started in the background, has been
    refilled from ``mirror``, a host copy of what it had acknowledged. Rows that hold pages written
    in between stay dense; see ``LostPages``.

    Args:
        config: validated settings.
        checkpoint: the retrieval head.
        embed: token ids ``[N]`` -> the target's embeddings ``[N, E]``; called once per token id for
            every actor.
        vocab_size: token ids that exist.
        num_kv_heads, max_model_len, device: as for ``LocalRetriever``.
        max_rows, max_tokens: most rows and tokens of a step.
        dtype: the model's.
    """

    reads_aux = True
    bytes_per_block = 0
    """Of the worker's KV memory: the head's caches are the actor's."""

    def __init__(
        self,
        config: SpeContextConfig,
        checkpoint: HeadCheckpoint,
        embed: Callable[[Tensor], Tensor],
        *,
        vocab_size: int,
        num_kv_heads: int,
        max_model_len: int,
        max_rows: int,
        max_tokens: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self.config, self.num_kv_heads, self.device, self.embed = (
            config,
            num_kv_heads,
            device,
            embed,
        )
        self.max_pages = pages_for(max_model_len)
        head = checkpoint.spec
        shared = head.embed_vocab_size is None
        # By the worker's own GPU: the actor's is not known before it is there, and that of the next
        # one may be another.
        self.key_dtype = head_key_dtype(
            config.head_key_dtype, dtype, device if config.sidecar_gpus else torch.device("cpu")
        )
        self.spec = SidecarSpec(
            config,
            checkpoint,
            dtype,
            "model" if self.key_dtype == dtype else "fp8",
            num_kv_heads=num_kv_heads,
            max_model_len=max_model_len,
            max_rows=max_rows,
            vocab_size=vocab_size if shared else 0,
            embed_size=head.embed_size,
        )
        learn = max_tokens * head.num_aux * head.target_hidden_size * dtype.itemsize
        select = max_tokens * 28 + max_rows * self.max_pages * 8
        selection = (
            max_rows
            * num_kv_heads
            * (4 * config.selection_pages(max_model_len) + head.head_dim * dtype.itemsize)
        )
        self.buffer_bytes = MESSAGE_SLACK + max(learn, select, selection)
        # Reads rows whole while there is no actor, and keeps the counters.
        dense = config.reading_everything()
        self.dense = LocalRetriever(
            dense,
            None,
            embed,
            num_kv_heads=num_kv_heads,
            max_model_len=max_model_len,
            table_pages=self.max_pages,
            device=device,
        )
        self._gpu = (device.index or 0) if device.type == "cuda" else None
        self.lost = LostPages(0)
        self.mirror: HeadCache | None = None
        self._mirrored = np.zeros(0, dtype=bool)
        self._sent_table = np.zeros((max_rows, self.max_pages), dtype=np.int32)
        self._link: Link | None = None
        self._next_link: Future[Link] | None = None
        self._starting: Link | None = None
        self._closed = threading.Event()
        self._step: _Step | None = None
        self._unsent: tuple[_Step, list[Tensor]] | None = None
        self._unread: tuple[_Step, Any] | None = None
        self._figures = {
            "sidecar_restarts": 0,
            "sidecar_dense_rows": 0,
            "sidecar_wait_seconds": 0.0,
        }
        self._figures_at_reset = dict(self._figures)

    @property
    def counters(self) -> Counters:
        """What the decode steps come to, whoever selected for them."""
        return self.dense.counters

    # -- start, death and restart
    # ---------------------------------------------------------------------------------------

    def allocate_cache(self, num_blocks: int) -> None:
        """Start the actor if there is none and make room for ``num_blocks`` pages, here and there.

        Raises:
            ConfigError: it does not start.
        """
        head, host = self.spec.checkpoint.spec, torch.device("cpu")
        self.mirror = HeadCache.allocate(
            num_blocks,
            head.num_kv_heads,
            head.head_dim,
            head.hidden_size,
            self.spec.dtype,
            self.key_dtype,
            host,
        )
        self._mirrored = np.zeros(num_blocks, dtype=bool)
        self.lost = LostPages(num_blocks)
        try:
            if self._link is None:
                weights = sum(tensor.nbytes for tensor in self.spec.checkpoint.tensors.values())
                # Twice the buffers: a new actor's are there before those of the last are gone.
                join_ray(
                    self.config.sidecar_cpus,
                    2 * 2 * IN_FLIGHT * self.buffer_bytes + weights,
                    self._gpu,
                )
                self._link = self._connect()
            self._link.ask(Allocate(num_blocks), START_SECONDS)
        except SidecarDown as error:
            raise ConfigError(
                f"additional_config.{CONFIG_KEY}.sidecar: found 'ray', but its actor (sidecar_cpus "
                f"{self.config.sidecar_cpus}, "
                f"sidecar_gpus {self.config.sidecar_gpus:g}) did not start: {error}; free them in "
                "Ray's cluster, ask for fewer or use sidecar "
                f"inline."
            ) from error

    def _connect(self) -> Link:
        link = self._starting = Link(replace(self.spec, config=self.config), self.buffer_bytes)
        try:
            # Whichever comes first, ``close`` or this link, sees the other.
            if self._closed.is_set():
                raise SidecarDown("the engine ends")
            link.start()
            rows = max(
                1, self.buffer_bytes // (2 * self.spec.embed_size * self.spec.dtype.itemsize)
            )
            with torch.inference_mode():
                for first in range(0, self.spec.vocab_size, rows):
                    ids = torch.arange(
                        first, min(first + rows, self.spec.vocab_size), device=self.device
                    )
                    link.ask(
                        Embeddings(first, self.embed(ids).to("cpu", self.spec.dtype)), START_SECONDS
                    )
        except BaseException:
            self._discard(link)
            raise
        return link

    def _reconnect(self, dead: Link) -> Link:
        """A new actor that knows what is mirrored; tried until it works or the engine ends. In the
        background thread.
        """
        self._discard(dead)
        attempt = 0
        while True:
            link = None
            try:
                link = self._connect()
                link.ask(Allocate(len(self._mirrored)), START_SECONDS)
                for message in self._refills():
                    link.ask(message, START_SECONDS)
                return link
            except Exception as error:  # whatever it is, requests go on meanwhile
                if link is not None:
                    self._discard(link)
                wait = RETRY_SECONDS[min(attempt, len(RETRY_SECONDS) - 1)]
                attempt += 1
                logger.warning(
                    "SpeContext sidecar: attempt %d to restart it failed (%s); the next in %d s.",
                    attempt,
                    error,
                    wait,
                )
                if self._closed.wait(wait):
                    raise

    def _refills(self) -> Iterator[Refill]:
        blocks = torch.from_numpy(np.flatnonzero(self._mirrored))
        a_page = self.mirror.keys[0].nbytes + self.mirror.fused[0].nbytes
        for part in blocks.split(max(1, self.buffer_bytes // (2 * a_page))):
            yield Refill(part, self.mirror.keys[part], self.mirror.fused[part])

    @staticmethod
    def _discard(link: Link) -> None:
        try:
            link.close()
        except SidecarDown as error:
            logger.warning(
                "SpeContext sidecar: what was left of it could not be cleared away: %s", error
            )

    def _fail(self, error: SidecarDown, step: _Step | None = None) -> None:
        """The actor is gone in ``step``, or between steps: note what it missed and have a new one
        started.
        """
        logger.warning(
            "SpeContext sidecar: %s; requests are read whole until it has been restarted.", error
        )
        unlearned = [waiting[0] for waiting in (self._unsent, self._unread) if waiting is not None]
        for missed in (*unlearned, *([] if step is None else [step])):
            self.lost.lose(missed.pages.numpy())
        self._step = self._unsent = self._unread = None
        dead, self._link, self._next_link = self._link, None, Future()
        # A daemon, so that a process may end although no actor can be had.
        threading.Thread(
            target=self._restart,
            args=(dead, self._next_link),
            name="specontext-sidecar",
            daemon=True,
        ).start()

    def _restart(self, dead: Link, future: Future[Link]) -> None:
        try:
            future.set_result(self._reconnect(dead))
        except BaseException as error:
            future.set_exception(error)

    def _adopt(self) -> None:
        """Take over a restarted actor, if there is one."""
        if self._next_link is None or not self._next_link.done():
            return
        link, self._next_link = self._next_link.result(), None
        self._link = link
        self._figures["sidecar_restarts"] += 1
        self._sent_table.fill(0)
        if link.spec.config != self.config:
            # Changed while it was being started.
            try:
                link.ask(Configure(self.config))
            except SidecarDown as error:
                self._fail(error)
                return
        logger.info(
            "SpeContext sidecar: restarted with %d pages; %d are lost.",
            self._mirrored.sum(),
            self.lost.count,
        )

    def close(self) -> None:
        """End the actor, also one that hangs or is being started, within twice CLOSE_SECONDS; Ray
        itself goes on until the process ends.
        """
        self._closed.set()
        if self._next_link is not None:
            # Being started, or there and not taken over yet.
            self._discard(self._starting)
            with suppress(Exception):
                self._next_link.result(CLOSE_SECONDS)
        elif self._link is not None:
            self._discard(self._link)
        self._link = self._next_link = None

    def shrink(self, max_model_len: int, table_pages: int) -> None:
        """See ``LocalRetriever.shrink``; the actor's own table may stay wider than its rows."""
        self.dense.shrink(max_model_len, table_pages)

    def configure(self, config: SpeContextConfig) -> None:
        """Change the settings between steps; see ``LocalRetriever.configure``."""
        self.config = config
        self.dense.config = config.reading_everything()
        if self._link is not None:
            try:
                waiting = 0 if self._unread is None else self._unread[0].prompt_tokens
                self._read_learned(time.perf_counter() + self._link.patience.seconds(waiting))
                self._link.ask(Configure(config))
            except SidecarDown as error:
                self._fail(error)

    # -- a step
    # ---------------------------------------------------------------------------------------------------------

    def before_forward(
        self,
        batch: StepBatch,
        pages: Tensor,
        lengths: Tensor,
        ids: None = None,
        stickiness: None = None,
        behind: None = None,
    ) -> None:
        """Fill the page table of the step's decode rows; see ``LocalRetriever.before_forward``. ``ids``,
        ``stickiness`` and ``behind`` stay None.
        """
        self._adopt()
        step, selection = self._on_host(batch), None
        if self._link is not None:
            try:
                selection = self._select(step)
            except SidecarDown as error:
                self._fail(error, step)
        else:
            self.lost.lose(step.pages.numpy())
        if selection is None:
            self._figures["sidecar_dense_rows"] += batch.num_decodes
            self.dense.before_forward(batch, pages, lengths)
            return
        self._step = step
        self.lost.follow(step.block_table, step.starts, step.seq_lens)
        if batch.num_decodes:
            self._fill(batch, step, selection, pages, lengths)

    def _on_host(self, batch: StepBatch) -> _Step:
        """The step's description on the host. On a GPU this waits for the step before."""
        rows = batch.num_rows
        width = min(pages_for(max(batch.seq_lens_bound)), self.max_pages)
        block_table = batch.block_table[:rows, :width].cpu().numpy()
        starts = batch.query_starts[: rows + 1].cpu()
        positions, seq_lens = batch.positions[: batch.num_tokens].cpu(), batch.seq_lens[:rows].cpu()
        slots = batch.slots[: batch.num_tokens].to("cpu", copy=True)
        table = self._sent_table[:rows, :width]
        row, column = np.nonzero(table != block_table)
        changed, blocks = (row * self.max_pages + column).astype(np.int32), block_table[row, column]
        message = Select(
            token_ids=batch.token_ids[: batch.num_tokens].cpu(),
            positions=positions,
            slots=slots,
            query_starts=starts,
            seq_lens=seq_lens,
            changed=torch.from_numpy(changed),
            blocks=torch.from_numpy(blocks),
            seq_lens_bound=batch.seq_lens_bound,
            num_decodes=batch.num_decodes,
        )
        return _Step(
            message, block_table, positions[starts[:-1].long()].numpy(), seq_lens.numpy(), slots
        )

    def _select(self, step: _Step) -> Selection:
        begin = time.perf_counter()
        if self._unsent is not None:
            learned, aux = self._unsent
            self._unread = (learned, self._link.send(Learn(aux)))
            self._unsent = None
        sent = self._link.send(step.message)
        rows, width = step.block_table.shape
        self._sent_table[:rows, :width] = step.block_table
        prompt_tokens = 0 if self._unread is None else self._unread[0].prompt_tokens
        patience = self._link.patience
        deadline = begin + patience.seconds(prompt_tokens)
        self._read_learned(deadline)
        learned_at = time.perf_counter()
        selection: Selection = self._link.receive(sent, max(0.0, deadline - learned_at))
        end = time.perf_counter()
        patience.note(prompt_tokens, learned_at - begin, end - learned_at)
        self._figures["sidecar_wait_seconds"] += end - begin
        return selection

    def _read_learned(self, deadline: float) -> None:
        """Bring the mirror up to what the actor learned from the last step, by ``deadline`` on
        ``time.perf_counter``.
        """
        if self._unread is None:
            return
        step, sent = self._unread
        learned: Learned = self._link.receive(sent, max(0.0, deadline - time.perf_counter()))
        self._unread = None
        self.mirror.write_keys(learned.keys, step.slots[step.message.num_decodes :])
        self.mirror.fused[step.pages] = learned.fused
        self._mirrored[step.pages.numpy()] = True

    def _fill(
        self, batch: StepBatch, step: _Step, selection: Selection, pages: Tensor, lengths: Tensor
    ) -> None:
        decodes, heads = batch.num_decodes, self.num_kv_heads
        rows, width = selection.pages.shape
        pages[:rows, :width] = selection.pages.to(self.device)
        lengths[:rows] = selection.lengths.to(self.device)
        lengths[rows : batch.table_rows * heads] = 0
        self.mirror.write_keys(selection.keys, step.slots[:decodes])
        self.counters.add(selection.counters.numpy())
        dense = self.lost.touched_rows(step.block_table, step.seq_lens[:decodes])
        if dense:
            self._read_whole(dense, batch, pages, lengths)
            selected = (selection.lengths.view(decodes, heads)[dense] + PAGE_SIZE - 1) // PAGE_SIZE
            whole = sum(pages_for(batch.seq_lens_bound[row]) for row in dense)
            self.counters.host[PAGES_READ] += heads * whole - int(selected.sum())
            self._figures["sidecar_dense_rows"] += len(dense)

    def _read_whole(
        self, rows: list[int], batch: StepBatch, pages: Tensor, lengths: Tensor
    ) -> None:
        """Let ``rows`` of the page table hold all their pages."""
        mass = torch.empty(
            batch.num_decodes, self.num_kv_heads, dtype=torch.float32, device=self.device
        )
        for row in rows:
            select_rows(
                self.dense.scores,
                batch.seq_lens,
                batch.seq_lens,
                batch.block_table,
                RowSelection(pages, lengths, mass),
                Budget.everything(self.max_pages),
                rows=range(row, row + 1),
            )

    def after_forward(self, batch: StepBatch, aux: list[Tensor]) -> None:
        """Hand the step's auxiliary hidden states on; see ``LocalRetriever.after_forward``."""
        step, self._step = self._step, None
        if step is None:
            return
        states = [state[: batch.num_tokens] for state in aux]
        if self.device.type != "cpu":
            # Pinned, so that the copy does not hold up the host; it has arrived when the next
            # step's inputs have.
            self._unsent = (
                step,
                [
                    torch.empty(s.shape, dtype=s.dtype, pin_memory=True).copy_(s, non_blocking=True)
                    for s in states
                ],
            )
            return
        try:
            self._unread = (step, self._link.send(Learn(states)))
        except SidecarDown as error:
            self._fail(error, step)

    # -- what else a LocalRetriever offers
    # -----------------------------------------------------------------------------------

    def profile(self, num_tokens: int) -> None:
        """Nothing to show vLLM's memory profile: the head's activations are the actor's."""

    def warm_up(
        self, pages: Tensor, lengths: Tensor, ids: None = None, stickiness: None = None
    ) -> None:
        """Compile what a dense row needs; the actor has warmed up by itself."""
        self.dense.warm_up(pages, lengths)

    def stats(self, reset: bool = False) -> dict[str, Any]:
        """``LocalRetriever.stats``, and ``figures`` with its sums counted since the last reset."""
        self._adopt()
        since = {
            name: value - self._figures_at_reset[name] for name, value in self._figures.items()
        }
        if reset:
            self._figures_at_reset = dict(self._figures)
        return {
            **self.dense.stats(reset),
            "retriever": self.config.retriever,
            **self.figures(),
            **since,
        }

    def figures(self) -> dict[str, float]:
        """Of the sidecar, since the start: restarts, rows read whole for want of it, seconds waited
        for selections; now: whether it is up, and pages it does not know."""
        return {
            **self._figures,
            "sidecar_up": int(self._link is not None),
            "sidecar_lost_pages": self.lost.count,
        }
