"""The steps of a worker that has a part of the layers (pipeline parallelism).

The first stage has the embedding and hears of a sampled token before the others do, so the head and
its caches are there alone. What it selects goes to the later stages, which read the same blocks:

    first stage    before_model    learn the steps that this one builds on; select, and send that
    later stages   before_model    receive the selection
                   after_model     send the hidden states of their layers that the head reads

Both have process groups of their own, so that they never wait for the hidden states that vLLM sends
from stage to stage.

Several batches are under way, each on another stage. What a batch leaves for the head is learned by
the first stage in the order of the batches, when the first batch builds on it that has the same
requests: their tokens have been sampled then, so nothing waits for a stage that is at work.

vLLM: the stages, and which layers each has.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed
from torch import Tensor
from vllm.distributed.parallel_state import get_pp_group
from vllm.distributed.utils import get_pp_indices
from vllm.model_executor.models.interfaces import EagleModelMixin
from vllm.sequence import IntermediateTensors

from specontext_vllm.config import ConfigError, SpeContextConfig
from specontext_vllm.engine.find_head import num_hidden_layers
from specontext_vllm.engine.names import AUX_LAYERS_KEY
from specontext_vllm.engine.step import DecodeStep
from specontext_vllm.retrieval.local import LocalRetriever
from specontext_vllm.step_data import Selection, StepBatch, Stickiness


class Stages:
    """Where this worker is in the pipeline, and what passes between it and the others. All workers
    must make one together.

    Args:
        aux_layers: the target's layers whose inputs the head reads; none without a head.
        num_layers: the target's.
        hidden_size, dtype, device: of its hidden states.
        max_batches: batches that are under way at once, at the most.

    Attributes:
        is_first, is_last: whether this worker has the embedding, or samples.
        own_layers: the aux layers whose inputs this worker's layers make.
    """

    def __init__(
        self,
        aux_layers: Sequence[int],
        num_layers: int,
        *,
        hidden_size: int,
        dtype: torch.dtype,
        device: torch.device,
        max_batches: int,
    ) -> None:
        group = get_pp_group()
        self.is_first, self.is_last = group.is_first_rank, group.is_last_rank
        self.max_batches = max_batches
        self._hidden_size, self._dtype, self._device = hidden_size, dtype, device
        self._ranks, self._counts = list(group.ranks), []
        for stage in range(group.world_size):
            start, end = get_pp_indices(num_layers, stage, group.world_size)
            # A layer's input is the output of the one before; the first one's is the embedding.
            own = [n for n in aux_layers if start < n <= end or (n == 0 and stage == 0)]
            self._counts.append(len(own))
            if stage == group.rank_in_group:
                self.own_layers = tuple(own)
        self._selections = group.make_sibling_device_group("specontext_selections")
        self._states = group.make_sibling_device_group("specontext_states")
        self._sent: deque[tuple[Any, Tensor]] = deque()
        self._connect()

    def _connect(self) -> None:
        """Exchange a first message with every stage. NCCL links two workers at their first one, and
        each waits there for the other: in a step, a later stage waits already, for hidden states
        that the first one sends after its selection.
        """
        message = torch.zeros(1, device=self._device)
        answer = torch.empty_like(message)
        if self.is_first:
            for rank in self._ranks[1:]:
                self._send(message, rank, self._selections)
                self._receive(answer, rank, self._states)()
        else:
            self._receive(answer, self._ranks[0], self._selections)()
            self._send(message, self._ranks[0], self._states)

    def num_bytes(self, max_tokens: int) -> int:
        """Memory for the hidden states of batches of ``max_tokens`` that are under way."""
        states = sum(self._counts) if self.is_first else len(self.own_layers)
        batches = self.max_batches + 1
        return batches * states * max_tokens * self._hidden_size * self._dtype.itemsize

    def send_selection(self, selection: Selection, rows: int) -> None:
        """Send what the first ``rows`` rows read to the later stages."""
        count = rows * selection.num_kv_heads
        packed = torch.cat([selection.pages[:count], selection.lengths[:count, None]], dim=1)
        for rank in self._ranks[1:]:
            self._send(packed, rank, self._selections)

    def receive_selection(self, selection: Selection, rows: int, table_rows: int) -> None:
        """Write what the first stage sent of ``rows`` rows; the further ones are padding."""
        heads, width = selection.num_kv_heads, selection.pages.shape[1]
        count = rows * heads
        packed = selection.pages.new_empty(count, width + 1)
        self._receive(packed, self._ranks[0], self._selections)()
        selection.pages[:count] = packed[:, :width]
        selection.lengths[:count] = packed[:, width]
        selection.lengths[count : table_rows * heads] = 0

    def send_states(self, num_tokens: int, states: Sequence[Tensor]) -> None:
        """Send this stage's hidden states ``[>= N, H]`` of a step's N tokens to the first."""
        packed = torch.stack([state[:num_tokens] for state in states])
        self._send(packed, self._ranks[0], self._states)

    def receive_states(self, num_tokens: int) -> Callable[[], list[Tensor]]:
        """Begin to receive a step's hidden states from the later stages.

        Returns:
            Waits for them, and returns them in the order of their layers: ``[N, H]`` each.
        """
        arriving = []
        for rank, count in list(zip(self._ranks, self._counts, strict=True))[1:]:
            if count:
                shape = count, num_tokens, self._hidden_size
                packed = torch.empty(shape, dtype=self._dtype, device=self._device)
                arriving.append((packed, self._receive(packed, rank, self._states)))

        def wait() -> list[Tensor]:
            for _, arrive in arriving:
                arrive()
            return [state for packed, _ in arriving for state in packed]

        return wait

    def _send(self, tensor: Tensor, rank: int, group: Any) -> None:
        # It must stay until it has arrived, as what belongs to older batches has.
        while len(self._sent) > self.max_batches * len(self._ranks):
            self._sent.popleft()[0].wait()
        self._sent.append((torch.distributed.isend(tensor, dst=rank, group=group), tensor))

    @staticmethod
    def _receive(tensor: Tensor, rank: int, group: Any) -> Callable[[], Any]:
        work = torch.distributed.irecv(tensor, src=rank, group=group)
        assert work is not None
        return work.wait


def make_stages(vllm_config: Any, config: SpeContextConfig, device: torch.device) -> Stages | None:
    """The stages of an engine that has several. All workers must call it together."""
    if vllm_config.parallel_config.pipeline_parallel_size == 1:
        return None
    model = vllm_config.model_config
    return Stages(
        () if config.retrieval_head is None else vllm_config.additional_config[AUX_LAYERS_KEY],
        num_hidden_layers(vllm_config),
        hidden_size=model.get_hidden_size(),
        dtype=model.dtype,
        device=device,
        max_batches=vllm_config.max_concurrent_batches,
    )


def hand_out_aux(model: Any, aux_layers: Sequence[int], stages: Stages | None) -> None:
    """Let ``model`` return the inputs of ``aux_layers``, those of this stage.

    Raises:
        ConfigError: where it has only a part of the layers, it returns none.

    Uses: vllm.model_executor.models.interfaces.EagleModelMixin.supports_aux_hidden_states_over_pp
    """
    if stages is not None and not any(
        getattr(module, "supports_aux_hidden_states_over_pp", False) for module in model.modules()
    ):
        raise ConfigError(
            f"--pipeline-parallel-size: found more than 1, but vLLM's {type(model).__name__} hands "
            "out the hidden states that the retrieval head reads in its last stage alone; use "
            "--tensor-parallel-size, or a retriever that needs no head."
        )
    model.set_aux_hidden_state_layers(tuple(aux_layers if stages is None else stages.own_layers))


def take_aux(passed_on: IntermediateTensors) -> list[Tensor]:
    """Take the auxiliary hidden states of this stage's layers out of what it passes on to the next:
    the first stage gets them instead.

    Uses: vllm.model_executor.models.interfaces.EagleModelMixin.AUX_HIDDEN_STATE_KEY
    """
    tensors = passed_on.tensors
    names = [name for name in tensors if name.startswith(EagleModelMixin.AUX_HIDDEN_STATE_KEY)]
    return [tensors.pop(name) for name in names]


class FollowingRetriever(LocalRetriever):
    """Of a later stage: what its rows read is selected elsewhere, but for a rule that selects in
    each layer.
    """

    @property
    def has_head(self) -> bool:
        """The first stage has it."""
        return True

    def warm_up(self, selection: Selection, stickiness: Stickiness | None = None) -> None:
        """Nothing is launched here."""


@dataclass(frozen=True)
class ToLearn:
    """A step that the head has not learned yet.

    Attributes:
        number: counted from 1.
        batch: a copy of what vLLM rewrites.
        aux: of the first stage's layers.
        arrive: waits for those of the later ones.
    """

    number: int
    batch: StepBatch
    aux: list[Tensor]
    arrive: Callable[[], list[Tensor]]


class FirstStep(DecodeStep):
    """The steps of the first stage, which selects for all of them."""

    def __init__(self, stages: Stages, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._stages, self._number = stages, 0
        self._to_learn: deque[ToLearn] = deque()
        self._last: dict[str, int] = {}
        """Of the requests in flight: their newest step."""

    @torch.inference_mode()
    def begin(self, scheduler_output: Any) -> None:
        """Also learn the steps of requests that are gone, before others write to their pages."""
        gone = {*scheduler_output.finished_req_ids, *(scheduler_output.preempted_req_ids or ())}
        needed = [self._last.pop(name) for name in gone if name in self._last]
        self._learn_up_to(max(needed, default=0))
        super().begin(scheduler_output)

    def _choose_or_replay(self, batch: StepBatch) -> None:
        # What a decode row reads was left by steps that came before its last one.
        decoding = batch.names[: batch.num_decodes]
        self._learn_up_to(max((self._last.get(name, 0) for name in decoding), default=0))
        super()._choose_or_replay(batch)
        if batch.num_decodes and not self.retriever.config.rule.per_layer:
            self._stages.send_selection(self.selection, batch.num_decodes)

    def after_model(self, batch: StepBatch, aux: Sequence[Tensor] | None) -> None:
        """Keep the step until the hidden states of the later stages are needed."""
        if not self.retriever.reads_aux:
            return
        self._number += 1
        self._last.update(dict.fromkeys(batch.names, self._number))
        # vLLM's next graph, a whole step's or a piece's, writes its own to the same place.
        states = [state[: batch.num_tokens].clone() for state in aux or ()]
        arrive = self._stages.receive_states(batch.num_tokens)
        kept = copy_of(batch)
        head = self.retriever.head
        if head is not None and head.keys_follow:
            # ``project`` has seen other rows by then; all are learned as prompt rows are.
            kept = replace(kept, num_decodes=0, table_rows=0)
        self._to_learn.append(ToLearn(self._number, kept, states, arrive))
        # No older one is under way.
        self._learn_up_to(self._number - self._stages.max_batches)

    def _learn_up_to(self, number: int) -> None:
        while self._to_learn and self._to_learn[0].number <= number:
            step = self._to_learn.popleft()
            batch, aux = step.batch, [*step.aux, *step.arrive()]
            with self._timed(self.exporter.learn, batch):
                self.retriever.learn(batch, batch.num_decodes, aux)


class LaterStep(DecodeStep):
    """The steps of a stage that reads what the first one selects."""

    def __init__(self, stages: Stages, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._stages = stages

    def warm_up(self) -> None:
        """Compile what the layers launch."""
        for table, provider in self.attention:
            provider.warm_up(table)

    def _choose_or_replay(self, batch: StepBatch) -> None:
        if self.retriever.config.rule.per_layer:
            super()._choose_or_replay(batch)
            return
        self.retriever.shape_step(batch)
        if batch.num_decodes:
            self._stages.receive_selection(self.selection, batch.num_decodes, batch.table_rows)

    def after_model(self, batch: StepBatch, aux: Sequence[Tensor] | None) -> None:
        """Send what the head reads of this stage's layers."""
        if aux:
            self._stages.send_states(batch.num_tokens, aux)


def copy_of(batch: StepBatch) -> StepBatch:
    """What learning reads of ``batch``, in tensors that no later step writes to."""
    rows, tokens = batch.num_rows, batch.num_tokens
    return replace(
        batch,
        token_ids=batch.token_ids[:tokens].clone(),
        positions=batch.positions[:tokens].clone(),
        slots=batch.slots[:tokens].clone(),
        query_starts=batch.query_starts[: rows + 1].clone(),
        block_table=batch.block_table[:rows].clone(),
        table_rows=batch.num_decodes,
        replayable=False,
    )


def make_step(stages: Stages | None, *args: Any, **kwargs: Any) -> DecodeStep:
    """The steps of a worker of this stage; see ``DecodeStep`` for the arguments."""
    if stages is None:
        return DecodeStep(*args, **kwargs)
    return (FirstStep if stages.is_first else LaterStep)(stages, *args, **kwargs)
