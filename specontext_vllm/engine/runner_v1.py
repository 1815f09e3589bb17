"""Adapter to vLLM's V1 model runner, which CPU engines use.

vLLM: the runner to derive from, and the step's metadata while the model runs.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from vllm.forward_context import get_forward_context
from vllm.v1.worker.cpu_model_runner import CPUModelRunner

from specontext_vllm.engine.metadata import SpeContextMetadata
from specontext_vllm.engine.runtime import Runtime, attach_runtime
from specontext_vllm.step_data import StepBatch


class SpeContextCPUModelRunner(CPUModelRunner):
    """Selects before the model runs, in ``_model_forward``, and learns when it is known which
    tokens stay. Warm-up batches carry no metadata and pass through.
    """

    runtime: Runtime
    _to_learn: tuple[StepBatch, list[Tensor] | None] | None = None

    def load_model(self, *args: Any, **kwargs: Any) -> None:
        """Makes the runtime, now that there is a model.

        Overrides: vllm.v1.worker.cpu_model_runner.CPUModelRunner.load_model
        """
        super().load_model(*args, **kwargs)
        attach_runtime(self)

    def initialize_kv_cache(self, kv_cache_config: Any, *args: Any, **kwargs: Any) -> None:
        """With a host pool the layers are bound to our arena; then the runtime is bound.

        Overrides: vllm.v1.worker.cpu_model_runner.CPUModelRunner.initialize_kv_cache
        """
        with self.runtime.own_kv_cache(kv_cache_config, is_profiling=False):
            super().initialize_kv_cache(kv_cache_config, *args, **kwargs)
        self.runtime.bind(self.attn_groups, kv_cache_config.num_blocks)

    def _zero_block_ids(self, block_ids: list[int]) -> None:
        """Zeroes the pages of new blocks, which is asked for beside state-space layers.

        Overrides: vllm.v1.worker.cpu_model_runner.CPUModelRunner._zero_block_ids
        Symptom: beside Mamba layers, requests lose KV when another one gets blocks.
        Reason: vLLM takes a block's id for a place in the cache, which is in kernel blocks: ours
            are smaller. Its zeroing for GPUs minds that (vllm/v1/worker/utils.py, KVBlockZeroer).
        Remove when: the CPU's does, too.
        """
        super()._zero_block_ids(self.runtime.kv_group.pages_of(block_ids))

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
        Uses: vllm.v1.worker.gpu_model_runner.GPUModelRunner.input_batch
        """
        by_layer = get_forward_context().attn_metadata
        if not by_layer:
            return super()._model_forward(input_ids, positions, *args, **kwargs)
        metadata: SpeContextMetadata = by_layer[self.runtime.layer_names[0]]
        common = metadata.common
        tokens = int(common.query_start_loc_cpu[common.num_reqs])
        query_lens = common.query_start_loc_cpu[: common.num_reqs + 1].diff().tolist()
        batch = StepBatch(
            token_ids=input_ids[:tokens],
            positions=positions[:tokens],
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
        )
        self.runtime.step.before_model(batch)
        output = super()._model_forward(input_ids, positions, *args, **kwargs)
        self._to_learn = batch, output[1] if self.use_aux_hidden_state_outputs else None
        return output

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
