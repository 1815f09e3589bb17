"""The worker's end of the sidecar: a retriever whose head and caches belong to an actor, and which
reads requests whole while there is no actor.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from specontext_vllm.config import CONFIG_KEY, PAGE_SIZE, ConfigError, SpeContextConfig, pages_for
from specontext_vllm.retrieval.cache import head_key_dtype
from specontext_vllm.retrieval.checkpoint import HeadCheckpoint
from specontext_vllm.retrieval.counters import PAGES_READ, Counters
from specontext_vllm.retrieval.local import LocalRetriever
from specontext_vllm.sidecar.cluster import join_ray
from specontext_vllm.sidecar.exchange import Exchange
from specontext_vllm.sidecar.host_step import HostStep
from specontext_vllm.sidecar.link import IN_FLIGHT, SidecarDown
from specontext_vllm.sidecar.messages import Selected, SidecarSpec
from specontext_vllm.step_data import (
    PageScores,
    RowPart,
    Selection,
    StepBatch,
    StepShape,
    Stickiness,
)

MESSAGE_SLACK = 1 << 20
"""Bytes of a channel's buffer beyond the tensors of the largest message."""


class RemoteRetriever:
    """A ``Retriever`` over a sidecar.

    ``project`` sends the step, ``select`` waits for what the actor has selected. ``learn`` sends
    the auxiliary hidden states and does not wait: on a CPU at once, so that the actor works while
    the worker samples; on a GPU with the next step, since they do not exist before the GPU has come
    so far, and waiting for it here would hold up the sampling.

    When the actor dies, rows are read whole until a new one, started in the background, has been
    refilled. Rows that hold pages written in between stay dense; see ``LostPages``.

    Args:
        config: validated settings.
        checkpoint: the retrieval head.
        embed: token ids ``[N]`` -> the target's embeddings ``[N, E]``; called once per token id for
            every actor.
        vocab_size: token ids that exist.
        num_kv_heads, max_model_len, device: as for ``LocalRetriever``.
        max_rows, max_tokens: largest numbers of rows and tokens of a step.
        dtype: the model's.

    Attributes:
        exchange: with the actor.
        dense_rows: rows read whole for want of an actor, since the start.
    """

    head = None
    reads_aux = True
    capturable = False
    bytes_per_block = 0
    """Of the worker's KV memory: the head's caches are the actor's."""

    embeds_outside = False

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
        self.config, self.num_kv_heads, self.device = config, num_kv_heads, device
        max_pages, head = pages_for(max_model_len), checkpoint.spec
        # By the worker's own GPU: the actor's is not known before it is there, and that of the next
        # one may be another.
        self.key_dtype = head_key_dtype(
            config.head_key_dtype, dtype, device if config.sidecar_gpus else torch.device("cpu")
        )
        spec = SidecarSpec(
            config,
            checkpoint,
            dtype,
            "model" if self.key_dtype == dtype else "fp8",
            num_kv_heads=num_kv_heads,
            max_model_len=max_model_len,
            max_rows=max_rows,
            vocab_size=vocab_size if head.embed_vocab_size is None else 0,
            embed_size=head.embed_size,
        )
        learn = max_tokens * head.num_aux * head.target_hidden_size * dtype.itemsize
        select = max_tokens * 28 + max_rows * max_pages * 8
        selected = max_rows * num_kv_heads * 4 * config.selection_pages(max_model_len)
        keys = head.num_kv_heads * head.head_dim
        learned = max_tokens * (keys + head.hidden_size) * dtype.itemsize
        self.exchange = Exchange(
            spec, MESSAGE_SLACK + max(learn, select, selected, learned), embed=embed, device=device
        )
        # Reads rows whole while there is no actor, and has the counters of all steps.
        self.dense = LocalRetriever(
            config.reading_everything(),
            None,
            embed,
            num_kv_heads=num_kv_heads,
            max_model_len=max_model_len,
            table_pages=max_pages,
            device=device,
            max_rows=max_rows,
        )
        self.dense_rows = 0
        self._sums_at_reset = self._sums()
        self._begun: HostStep | None = None

    @property
    def counters(self) -> Counters:
        """What the decode steps come to, whoever selected for them."""
        return self.dense.counters

    @property
    def row_totals(self) -> Tensor:
        """Those of rows that are read whole: no rule selects in each layer beside an actor."""
        return self.dense.row_totals

    # -- a step

    def shape_step(self, batch: StepBatch) -> StepShape:
        """See ``Retriever.shape_step``. The rows are counted later, by whoever selects for them."""
        self._begun = self.exchange.write_step(batch)
        all_rows = RowPart(range(batch.table_rows), max_pages=1)
        return StepShape(batch.num_decodes, chooses=False, parts=(all_rows,))

    def embed_outside(self, batch: StepBatch, rows: int) -> None:
        """The actor makes the embeddings."""

    def project(self, batch: StepBatch, shape: StepShape, embeds: Tensor | None = None) -> None:
        """Send the step to the actor, which projects, scores and selects."""
        assert self._begun is not None
        self.exchange.send(self._begun)

    def score(
        self, batch: StepBatch, shape: StepShape, part: RowPart, queries: Tensor | None
    ) -> PageScores:
        """The scores stay with the actor; nobody reads these."""
        return self.dense.scores

    def select(
        self,
        batch: StepBatch,
        shape: StepShape,
        part: RowPart,
        scores: PageScores,
        selection: Selection,
        stickiness: Stickiness | None = None,
    ) -> None:
        """Wait for the actor's selection and write it into ``selection``."""
        step, self._begun = self._begun, None
        assert step is not None
        selected = self.exchange.receive()
        if selected is None:
            self.dense_rows += batch.num_decodes
            self.dense.select_eagerly(batch, selection)
            return
        if batch.num_decodes:
            self._fill(batch, step, selected, selection)

    def learn(self, batch: StepBatch, rows: int, aux: Sequence[Tensor]) -> None:
        """Hand the step's auxiliary hidden states on; see ``Retriever.learn``."""
        if self.exchange.selected is None:
            return
        states = [state[: batch.num_tokens] for state in aux]
        on_cpu = self.device.type == "cpu"
        if not on_cpu:
            # Pinned, so that the copy does not hold up the host; it has arrived when the next
            # step's inputs have.
            states = [
                torch.empty(s.shape, dtype=s.dtype, pin_memory=True).copy_(s, non_blocking=True)
                for s in states
            ]
        self.exchange.learn(states, send_now=on_cpu)

    def _fill(
        self, batch: StepBatch, step: HostStep, selected: Selected, selection: Selection
    ) -> None:
        decodes, heads = batch.num_decodes, self.num_kv_heads
        rows, width = selected.pages.shape
        selection.pages[:rows, :width] = selected.pages.to(self.device)
        selection.lengths[:rows] = selected.lengths.to(self.device)
        selection.lengths[rows : batch.table_rows * heads] = 0
        self.counters.add(selected.counters.numpy())
        lost = self.exchange.lost.touched_rows(step.block_table, step.seq_lens[:decodes])
        if lost:
            for row in lost:
                self.dense.read_whole(batch, row, selection)
            partly = (selected.lengths.view(decodes, heads)[lost] + PAGE_SIZE - 1) // PAGE_SIZE
            whole = sum(pages_for(batch.seq_lens_bound[row]) for row in lost)
            self.counters.host[PAGES_READ] += heads * whole - int(partly.sum())
            self.dense_rows += len(lost)

    # -- an engine

    def allocate_cache(self, num_blocks: int) -> None:
        """Start the actor if there is none and allocate ``num_blocks`` pages, here and there.

        Raises:
            ConfigError: it does not start.
        """
        exchange, cpus = self.exchange, self.config.sidecar_cpus
        try:
            if exchange.keeper.link is None:
                tensors = exchange.keeper.spec.checkpoint.tensors.values()
                weights = sum(tensor.nbytes for tensor in tensors)
                gpu = (self.device.index or 0) if self.device.type == "cuda" else None
                # Twice the buffers: a new actor's are there before those of the last are gone.
                join_ray(cpus, 2 * 2 * IN_FLIGHT * exchange.buffer_bytes + weights, gpu)
            exchange.allocate(num_blocks)
        except SidecarDown as error:
            raise ConfigError(
                f"additional_config.{CONFIG_KEY}.sidecar: found 'ray', but its actor (sidecar_cpus "
                f"{cpus}, sidecar_gpus {self.config.sidecar_gpus:g}) did not start: {error}; free "
                "them in Ray's cluster, ask for fewer or use sidecar inline."
            ) from error

    def shrink(self, max_model_len: int, table_pages: int) -> None:
        """See ``Retriever.shrink``; the actor's own table may stay wider than its rows."""
        self.dense.shrink(max_model_len, table_pages)

    def configure(self, config: SpeContextConfig) -> None:
        """Change the settings between steps; see ``Retriever.configure``."""
        self.config = config
        self.dense.configure(config.reading_everything())
        self.exchange.configure(config)

    def profile(self, num_tokens: int) -> None:
        """Nothing to show vLLM's memory profile: the head's activations are the actor's."""

    def warm_up(self, selection: Selection, stickiness: Stickiness | None = None) -> None:
        """Compile what a dense row needs; the actor has warmed up by itself."""
        self.dense.warm_up(selection)

    def stats(self, reset: bool = False) -> dict[str, Any]:
        """``LocalRetriever.stats``, and ``sidecar_figures`` with its sums counted since the last
        reset.
        """
        self.exchange.adopt()
        since = {name: value - self._sums_at_reset[name] for name, value in self._sums().items()}
        if reset:
            self._sums_at_reset = self._sums()
        return {
            **self.dense.stats(reset),
            "retriever": self.config.retriever,
            **self.sidecar_figures(),
            **since,
        }

    def sidecar_figures(self) -> dict[str, float]:
        """See ``Retriever.sidecar_figures``: the sums, whether the sidecar is up now, and pages
        that it does not know.
        """
        return {
            **self._sums(),
            "sidecar_up": int(self.exchange.keeper.link is not None),
            "sidecar_lost_pages": self.exchange.lost.count,
        }

    def _sums(self) -> dict[str, float]:
        return {
            "sidecar_restarts": self.exchange.restarts,
            "sidecar_dense_rows": self.dense_rows,
            "sidecar_wait_seconds": self.exchange.wait_seconds,
        }

    def close(self) -> None:
        """End the actor; see ``ActorKeeper.close``."""
        self.exchange.keeper.close()
