"""Adapter to vLLM's V2 model runner (CUDA).

vLLM: the runner to derive from.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from vllm.sequence import IntermediateTensors
from vllm.v1.worker.gpu.async_utils import AsyncOutput
from vllm.v1.worker.gpu.model_runner import GPUModelRunner

from specontext_vllm.engine.attach import attach_runtime
from specontext_vllm.engine.compat import leave_chunks_to_vllm
from specontext_vllm.engine.connector import moves_beside_stream
from specontext_vllm.engine.lossless import SelfDrafts, drafts_itself
from specontext_vllm.engine.metadata import max_table_rows
from specontext_vllm.engine.pipeline import take_aux
from specontext_vllm.engine.runtime import Runtime
from specontext_vllm.engine.self_speculator import SelfSpeculator
from specontext_vllm.step_data import StepBatch


class SpeContextModelRunnerV2(GPUModelRunner):
    """Selects pages in ``prepare_attn`` (real batches only, before metadata and graph replay) and
    learns in ``postprocess_sampled``, when it is known which drafts stay and before the drafter
    runs: its steps rewrite the slots and tables that a step's batch refers to.

    Both enqueue on the main stream; vLLM's captured graph only reads the page table, and what our
    own graphs read lies on the device, so nothing that is replayed can be stale.
    """

    runtime: Runtime
    _batch: StepBatch | None = None
    _aux: list[torch.Tensor] | None = None
    _kept: torch.Tensor | None = None
    self_drafts: SelfDrafts | None = None

    def __init__(self, vllm_config: Any, device: torch.device) -> None:
        """In lossless mode the target is the drafter.

        Overrides: vllm.v1.worker.gpu.model_runner.GPUModelRunner.__init__
        Uses: vllm.v1.worker.gpu.model_runner.GPUModelRunner.speculator
        Symptom: the target's weights are loaded twice.
        Reason: the runner makes the drafter by its method's name.
        Remove when: a plugin can bring a drafter.
        """
        super().__init__(vllm_config, device)
        # The worker's; see Runtime.
        self.memory_pool: Callable[[str], AbstractContextManager[Any]] = nullcontext
        if drafts_itself(vllm_config):
            self.speculator = SelfSpeculator(vllm_config, device, self)

    def load_model(self, *args: Any, **kwargs: Any) -> None:
        """Makes the runtime, now that there is a model.

        Overrides: vllm.v1.worker.gpu.model_runner.GPUModelRunner.load_model
        """
        leave_chunks_to_vllm()
        super().load_model(*args, **kwargs)
        attach_runtime(self, self.memory_pool)
        if self.speculative_config is not None:
            # It persists, since graphs of our own point at it.
            rows = max_table_rows(self.vllm_config)
            with self.memory_pool("runtime"):
                self._kept = torch.zeros(rows, dtype=torch.int32, device=self.device)

    def profile_run(self, *args: Any, **kwargs: Any) -> None:
        """Counts our own graphs, and the head's work on a whole batch, in the peak of memory that
        vLLM measures: graphs are captured when it has long given the rest to KV.

        Overrides: vllm.v1.worker.gpu.model_runner.GPUModelRunner.profile_run
        """
        num_bytes = self.runtime.reserved_bytes(self.max_num_tokens)
        reserved = torch.empty(num_bytes, dtype=torch.uint8, device=self.device)
        super().profile_run(*args, **kwargs)
        self.runtime.retriever.profile(self.max_num_tokens)
        del reserved

    def initialize_kv_cache(
        self, kv_cache_config: Any, is_profiling: bool = False, **kwargs: Any
    ) -> None:
        """With a host pool the layers are bound to our arena; then the runtime is bound.

        Overrides: vllm.v1.worker.gpu.model_runner.GPUModelRunner.initialize_kv_cache
        Uses: vllm.v1.worker.gpu.spec_decode.speculator.DraftModelSpeculator.attn_groups
        """
        with self.runtime.own_kv_cache(kv_cache_config, is_profiling):
            super().initialize_kv_cache(kv_cache_config, is_profiling, **kwargs)
        groups = [g for of_kind in getattr(self.speculator, "attn_groups", []) for g in of_kind]
        self.runtime.bind(self.attn_groups, kv_cache_config.num_blocks, groups)
        if drafts_itself(self.vllm_config):
            self.self_drafts = self.runtime.self_drafts(self.model)

    def execute_model(self, scheduler_output: Any, *args: Any, **kwargs: Any) -> Any:
        """The two tiers follow the scheduler before anything of the step is launched.

        Overrides: vllm.v1.worker.gpu.model_runner.GPUModelRunner.execute_model
        """
        is_real = not kwargs.get("dummy_run", False)
        if is_real:
            self.runtime.step.begin(scheduler_output)
        output = super().execute_model(scheduler_output, *args, **kwargs)
        if isinstance(output, IntermediateTensors):
            # Of a pipeline's stage but the last, which samples.
            output = IntermediateTensors(dict(output.tensors))
            aux = take_aux(output)
            if is_real and self._batch is not None:
                self.runtime.step.after_model(self._batch, aux)
        return output

    def _init_kv_zero_meta(self) -> None:
        """Two tiers have nothing to clear: a frame never held a state.

        Overrides: vllm.v1.worker.gpu.model_runner.GPUModelRunner._init_kv_zero_meta
        """
        if self.runtime.tiers is None:
            super()._init_kv_zero_meta()

    def update_requests(self, scheduler_output: Any) -> None:
        """Refuses copies of KV blocks, which the head's caches would not follow. Only layers that
        are refused at the start need them.

        Overrides: vllm.v1.worker.gpu.model_runner.GPUModelRunner.update_requests
        """
        if scheduler_output.kv_cache_block_copies:
            raise RuntimeError(
                "specontext: vLLM asked for copies of KV blocks, which the head's caches do not "
                "follow; please report it."
            )
        super().update_requests(scheduler_output)

    def gather_batch_req_state(self, scheduler_output: Any, dummy_run: bool) -> Any:
        """Put rows of prompt tokens after the decode rows, those of one token too, and let no
        batch with such a row replay a decode graph.

        vLLM takes a prompt row of one token for a decode row; here decode rows read a selection,
        and prompts are dense.

        Overrides: vllm.v1.worker.gpu.model_runner.GPUModelRunner.gather_batch_req_state
        """
        state, uniform = super().gather_batch_req_state(scheduler_output, dummy_run)
        if state is None or not state.has_prefill:
            return state, uniform
        order = np.argsort(state.is_prefilling_np, kind="stable")
        rows: dict[str, Any] = {
            name: value[order]
            for name, value in state._asdict().items()
            if isinstance(value, np.ndarray)
        }
        rows |= {
            "req_ids": [state.req_ids[row] for row in order],
            "prefill_runs_as_decode_np": None,
            "decode_graph_eligible": False,
        }
        return state._replace(**rows), None

    def prepare_attn(self, input_batch: Any) -> Any:
        """Select, when the step's inputs are on the GPU and before its metadata is made.

        Overrides: vllm.v1.worker.gpu.model_runner.GPUModelRunner.prepare_attn
        Uses: vllm.v1.worker.utils.AttentionGroup.map_to_kernel_block_table
        """
        block_tables, slot_mappings = super().prepare_attn(input_batch)
        groups = self.runtime.kv_groups
        # In blocks; attention reads kernel blocks, our pages.
        tables = [
            attention.map_to_kernel_block_table(block_tables[group.index])
            for group, attention in zip(groups, self.runtime.attention_groups, strict=True)
        ]
        rows, tokens = input_batch.num_reqs, input_batch.num_tokens
        decodes = int((~input_batch.is_prefilling_np[:rows]).sum())
        max_captured = self.vllm_config.compilation_config.max_cudagraph_capture_size or 0
        query_lens = input_batch.num_scheduled_tokens[:rows].tolist()
        most = max(query_lens[:decodes], default=1)
        padded_rows = input_batch.num_reqs_after_padding
        padded_tokens = input_batch.num_tokens_after_padding
        # Rows with other numbers of drafts than their neighbours are in no graph.
        is_uniform = tokens == rows * most and padded_tokens >= padded_rows * most
        self._batch = StepBatch(
            token_ids=input_batch.input_ids,
            positions=input_batch.positions,
            slots=slot_mappings[groups[0].index],
            query_starts=input_batch.query_start_loc,
            seq_lens=input_batch.seq_lens,
            block_table=tables[0],
            other_block_tables=tuple(tables[1:]),
            seq_lens_bound=input_batch.seq_lens_cpu_upper_bound[:rows].tolist(),
            num_decodes=decodes,
            # Only a batch of decodes alone is padded to a captured size.
            table_rows=padded_rows if decodes == rows else decodes,
            names=input_batch.req_ids[:rows],
            query_lens=query_lens,
            max_queries=most,
            num_tokens=tokens,
            dense=self.self_drafts is not None,
            # vLLM's own graphs read these buffers, so they persist. Steps of more rows than it
            # captures are not padded, and nearly each of them would need a graph of its own.
            replayable=decodes == rows and padded_rows * most <= max_captured and is_uniform,
        )
        self.runtime.step.before_model(self._batch)
        return block_tables, slot_mappings

    @torch.inference_mode()
    def sample_tokens(self, grammar_output: Any) -> Any:
        """Keep the step's hidden states, which vLLM forgets when it begins to sample. Where other
        engines read and write blocks beside the stream, a step has ended when it is learnt.

        Overrides: vllm.v1.worker.gpu.model_runner.GPUModelRunner.sample_tokens
        Uses: vllm.v1.worker.gpu.model_runner.GPUModelRunner.execute_model_state,
            vllm.v1.worker.gpu.model_runner.GPUModelRunner.main_stream,
            vllm.v1.worker.gpu.model_runner.GPUModelRunner.output_copy_stream,
            vllm.v1.worker.gpu.async_utils.AsyncOutput.copy_event
        Symptom: another engine may read what the head keeps of a prompt's last pages before it is
            there, or write pages that a step still writes to.
        Reason: a step's tokens are out once an event has come, which vLLM records before it calls
            ``postprocess_sampled``; then blocks are handed over, or to another request.
        Remove when: it records the event when all of a step is enqueued.
        """
        state = self.execute_model_state
        self._aux = None if state is None else state.aux_hidden_states
        try:
            output = super().sample_tokens(grammar_output)
        finally:
            self._batch = self._aux = None
        if isinstance(output, AsyncOutput) and moves_beside_stream(self.vllm_config):
            self.output_copy_stream.wait_stream(self.main_stream)
            output.copy_event.record(self.output_copy_stream)
        return output

    def postprocess_sampled(self, idx_mapping: torch.Tensor, *args: Any, **kwargs: Any) -> None:
        """Learn from the step's hidden states, now that the requests have moved on.

        Overrides: vllm.v1.worker.gpu.model_runner.GPUModelRunner.postprocess_sampled
        Uses: vllm.v1.worker.gpu.states.RequestState.num_computed_tokens
        """
        super().postprocess_sampled(idx_mapping, *args, **kwargs)
        batch = self._batch
        if batch is None:
            return
        if self._kept is not None and batch.num_tokens > batch.num_rows:
            # By how many tokens each request has grown; the device alone knows.
            rows = batch.num_rows
            first = batch.positions[batch.query_starts[:rows].long()]
            computed = self.req_states.num_computed_tokens.gpu[idx_mapping]
            kept = self._kept[: max(rows, batch.table_rows)]
            kept[:rows].copy_(computed - first)
            batch = replace(batch, kept=kept)
        self.runtime.step.after_model(batch, self._aux)
        if self.runtime.storage is not None:
            self.runtime.storage.save_head()
