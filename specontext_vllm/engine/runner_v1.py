"""Adapter to vLLM's V1 model runner, which CPU engines use.

vLLM: the runner to derive from, and the step's metadata while the model runs.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from vllm.forward_context import get_forward_context
from vllm.sequence import IntermediateTensors
from vllm.v1.worker.cpu_model_runner import CPUModelRunner

from specontext_vllm.engine.attach import attach_runtime
from specontext_vllm.engine.compat import leave_chunks_to_vllm
from specontext_vllm.engine.lossless import OtherLayers, SelfDrafts, drafts_itself
from specontext_vllm.engine.metadata import SpeContextMetadata
from specontext_vllm.engine.pipeline import take_aux
from specontext_vllm.engine.runtime import Runtime
from specontext_vllm.engine.self_drafter import SelfDrafter
from specontext_vllm.step_data import StepBatch


class SpeContextCPUModelRunner(CPUModelRunner):
    """Selects before the model runs, in ``_model_forward``, and learns when it is known which
    tokens stay. Warm-up batches carry no metadata and pass through.
    """

    runtime: Runtime
    _to_learn: tuple[StepBatch, list[Tensor] | None] | None = None
    _learned: StepBatch | None = None
    _self_drafts: SelfDrafts | None = None

    def __init__(self, vllm_config: Any, device: torch.device) -> None:
        """In lossless mode the target is the drafter.

        Overrides: vllm.v1.worker.cpu_model_runner.CPUModelRunner.__init__
        Uses: vllm.v1.worker.gpu_model_runner.GPUModelRunner.drafter,
            vllm.v1.worker.gpu_model_runner.GPUModelRunner.effective_drafter_max_model_len
        Symptom: the target's weights are loaded twice; near the longest context rows get made-up
            drafts.
        Reason: the runner makes the drafter by its method's name; and it takes a drafter to need
            room for all drafts.
        Remove when: a plugin can bring a drafter.
        """
        super().__init__(vllm_config, device)
        if drafts_itself(vllm_config):
            self.drafter = SelfDrafter(vllm_config, device, self)
            self.effective_drafter_max_model_len = self.max_model_len + self.num_spec_tokens

    def load_model(self, *args: Any, **kwargs: Any) -> None:
        """Makes the runtime, now that there is a model.

        Overrides: vllm.v1.worker.cpu_model_runner.CPUModelRunner.load_model
        """
        leave_chunks_to_vllm()
        super().load_model(*args, **kwargs)
        attach_runtime(self)
        self._make_room_for_states()

    def _make_room_for_states(self) -> None:
        """Uses: vllm.v1.worker.gpu_model_runner.GPUModelRunner.intermediate_tensors
        Symptom: with --enforce-eager and a given size of the KV cache, the first step of a
            pipeline's second stage ends the engine: AssertionError.
        Reason: vLLM makes the buffers that stages receive hidden states in when a worker warms up,
            which the CPU's then leaves out (vllm/v1/worker/cpu_worker.py, _should_warm_up_model).
        Remove when: it makes them with the KV cache.
        """
        if self.runtime.stages is not None and not self.runtime.stages.is_first:
            self.intermediate_tensors = self.model.make_empty_intermediate_tensors(
                batch_size=self.max_num_tokens, dtype=self.dtype, device=self.device
            )

    def initialize_kv_cache(self, kv_cache_config: Any, *args: Any, **kwargs: Any) -> None:
        """With a host pool the layers are bound to our arena; then the runtime is bound.

        Overrides: vllm.v1.worker.cpu_model_runner.CPUModelRunner.initialize_kv_cache
        Uses: vllm.v1.spec_decode.llm_base_proposer.SpecDecodeBaseProposer.draft_attn_groups
        """
        with self.runtime.own_kv_cache(kv_cache_config, is_profiling=False):
            super().initialize_kv_cache(kv_cache_config, *args, **kwargs)
        groups = getattr(getattr(self, "drafter", None), "draft_attn_groups", [])
        self.runtime.bind(self.attn_groups, kv_cache_config.num_blocks, groups)
        if drafts_itself(self.vllm_config):
            self._self_drafts = self.runtime.self_drafts(self.model)

    def _init_kv_zero_meta(self) -> None:
        """Two tiers have nothing to clear: a frame never held a state.

        Overrides: vllm.v1.worker.gpu_model_runner.GPUModelRunner._init_kv_zero_meta
        """
        if self.runtime.tiers is None:
            super()._init_kv_zero_meta()

    def _zero_block_ids(self, block_ids: list[int]) -> None:
        """Zeroes the pages of new blocks, which is asked for beside state-space layers.

        Overrides: vllm.v1.worker.cpu_model_runner.CPUModelRunner._zero_block_ids
        Symptom: beside Mamba layers, requests lose KV when another one gets blocks.
        Reason: vLLM takes a block's id for a place in the cache, which is in kernel blocks: ours
            are smaller. Its zeroing for GPUs minds that (vllm/v1/worker/utils.py, KVBlockZeroer).
        Remove when: the CPU's does, too.
        """
        super()._zero_block_ids(self.runtime.kv_groups[0].pages_of(block_ids))

    def execute_model(self, scheduler_output: Any, *args: Any, **kwargs: Any) -> Any:
        """The two tiers follow the scheduler before anything of the step is launched.

        Overrides: vllm.v1.worker.gpu_model_runner.GPUModelRunner.execute_model
        """
        self.runtime.step.begin(scheduler_output)
        return super().execute_model(scheduler_output, *args, **kwargs)

    def _model_forward(
        self, input_ids: Any = None, positions: Any = None, *args: Any, **kwargs: Any
    ) -> Any:
        """Select before the model runs.

        Overrides: vllm.v1.worker.gpu_model_runner.GPUModelRunner._model_forward
        Uses: vllm.v1.worker.gpu_model_runner.GPUModelRunner.input_batch,
            vllm.v1.worker.gpu_model_runner.GPUModelRunner.input_ids,
            vllm.v1.worker.gpu_model_runner.GPUModelRunner.positions
        """
        by_layer = get_forward_context().attn_metadata
        if not by_layer:
            output = super()._model_forward(input_ids, positions, *args, **kwargs)
            if isinstance(output, IntermediateTensors):
                take_aux(output)
            return output
        metadata: SpeContextMetadata
        metadata, *others = (by_layer[group.layer_names[0]] for group in self.runtime.kv_groups)
        common = metadata.common
        tokens = int(common.query_start_loc_cpu[common.num_reqs])
        query_lens = common.query_start_loc_cpu[: common.num_reqs + 1].diff().tolist()
        batch = StepBatch(
            # A model that takes images is given embeddings, and may count positions in three
            # dimensions.
            token_ids=self.input_ids.gpu[:tokens],
            positions=self.positions[:tokens],
            slots=common.slot_mapping[:tokens],
            query_starts=common.query_start_loc,
            seq_lens=common.seq_lens,
            block_table=common.block_table_tensor,
            seq_lens_bound=common.seq_lens[: common.num_reqs].tolist(),
            num_decodes=metadata.num_decodes,
            table_rows=metadata.num_decodes,
            names=self.input_batch.req_ids[: common.num_reqs],
            query_lens=query_lens,
            max_queries=max(query_lens[: metadata.num_decodes], default=1),
            num_tokens=tokens,
            dense=self._self_drafts is not None,
            other_block_tables=tuple(other.common.block_table_tensor for other in others),
        )
        self.runtime.step.before_model(batch)
        output = super()._model_forward(input_ids, positions, *args, **kwargs)
        if isinstance(output, IntermediateTensors):
            # Of a pipeline's stage but the last, which samples.
            self.runtime.step.after_model(batch, take_aux(output))
            return output
        aux = output[1] if self.use_aux_hidden_state_outputs else None
        if self.runtime.storage is None:
            self._to_learn = batch, aux
        else:
            # There are no drafts, and what is stored of a step is stored before it samples.
            self.runtime.step.after_model(batch, aux)
            self.runtime.storage.save_head()
        return output

    def _sample(self, logits: Any, spec_decode_metadata: Any) -> Any:
        """Samples as without drafts where no row has any.

        Overrides: vllm.v1.worker.gpu_model_runner.GPUModelRunner._sample
        Symptom: with drafts and top_k, a step in which nothing was drafted, as the first, ends the
            engine: max(): Expected reduction dim to be specified for input.numel() == 0.
        Reason: the rejection sampler cuts the logits of no drafts, too
            (vllm/v1/sample/rejection_sampler.py, apply_sampling_constraints).
        Remove when: it leaves out what is empty.
        """
        if spec_decode_metadata is not None and not any(spec_decode_metadata.num_draft_tokens):
            spec_decode_metadata = None
        return super()._sample(logits, spec_decode_metadata)

    def _update_states_after_model_execute(
        self, output_token_ids: Tensor, scheduler_output: Any
    ) -> None:
        """Learn, now that the step has sampled, and before a drafter changes the step's tensors.

        Overrides: vllm.v1.worker.gpu_model_runner.GPUModelRunner._update_states_after_model_execute
        """
        super()._update_states_after_model_execute(output_token_ids, scheduler_output)
        if self._to_learn is None:
            return
        (batch, aux), self._to_learn = self._to_learn, None
        if drafted := scheduler_output.scheduled_spec_decode_tokens:
            has_drafts = torch.tensor([bool(drafted.get(name)) for name in batch.names])
            # A row's sampled tokens are its accepted drafts and one more, -1 behind them; of its
            # own tokens, the first and the accepted drafts stay.
            sampled = (output_token_ids != -1).sum(1)
            kept = torch.where(has_drafts, sampled, torch.tensor(batch.query_lens)).int()
            batch = replace(batch, kept=kept)
        self.runtime.step.after_model(batch, aux)
        self._learned = batch

    def propose_draft_token_ids(
        self, scheduler_output: Any, sampled_token_ids: Any, *args: Any, **kwargs: Any
    ) -> Any:
        """In lossless mode, drafts of the target itself for the rows that have a next token.

        Overrides: vllm.v1.worker.gpu_model_runner.GPUModelRunner.propose_draft_token_ids
        Uses: vllm.v1.worker.gpu_model_runner.GPUModelRunner.discard_request_mask
        """
        if self._self_drafts is None:
            return super().propose_draft_token_ids(
                scheduler_output, sampled_token_ids, *args, **kwargs
            )
        batch, count = self._learned, scheduler_output.num_spec_tokens_to_schedule
        assert batch is not None
        rows = (~self.discard_request_mask.gpu[: batch.num_rows]).nonzero()[:, 0]
        drafts = torch.zeros(batch.num_rows, count, dtype=torch.int32)
        if count and len(rows):
            starts = batch.query_starts.long()
            kept = starts.diff() if batch.kept is None else batch.kept.long()
            known = batch.positions[starts[:-1]] + kept
            sampled = sampled_token_ids[rows]
            newest = (sampled != -1).sum(1, keepdim=True) - 1
            drafts[rows] = self._self_drafts.draft(
                count,
                sampled.gather(1, newest)[:, 0].int(),
                known[rows],
                [table[rows] for table in (batch.block_table, *batch.other_block_tables)],
                [batch.names[row] for row in rows.tolist()],
                self._other_layers(batch.num_rows, rows),
            )
        return drafts

    def _other_layers(self, requests: int, rows: Tensor) -> list[OtherLayers]:
        """The target's layers that are not ours, and their blocks of ``rows [R]`` of so many
        requests.

        Uses: vllm.v1.worker.gpu_input_batch.InputBatch.block_table
        """
        ours, found = set(self.runtime.layers.names), []
        for groups, blocks in zip(
            self.attn_groups, self.input_batch.block_table.block_tables, strict=True
        ):
            for group in groups:
                if ours.isdisjoint(group.layer_names):
                    table = blocks.get_device_tensor(requests)[rows]
                    builder = group.get_metadata_builder()
                    found.append(OtherLayers(group.layer_names, builder, table, blocks.block_size))
        return found
