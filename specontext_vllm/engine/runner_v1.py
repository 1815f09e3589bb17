"""Adapter to vLLM's V1 model runner, which CPU engines use."""

from __future__ import annotations

from typing import Any

from vllm.forward_context import get_forward_context
from vllm.v1.worker.cpu_model_runner import CPUModelRunner

from specontext_vllm.engine.backend import SpeContextMetadata
from specontext_vllm.engine.runtime import Runtime
from specontext_vllm.step_data import StepBatch


class SpeContextCPUModelRunner(CPUModelRunner):
    """Selects and learns around ``_model_forward``; warm-up batches carry no metadata and pass
    through.
    """

    runtime: Runtime

    def load_model(self, *args: Any, **kwargs: Any) -> None:
        super().load_model(*args, **kwargs)
        self.runtime = Runtime(self.vllm_config, self.model, self.device)
        self.use_aux_hidden_state_outputs = self.runtime.reads_aux

    def initialize_kv_cache(self, kv_cache_config: Any, *args: Any, **kwargs: Any) -> None:
        with self.runtime.own_kv_cache(kv_cache_config.num_blocks, is_profiling=False):
            super().initialize_kv_cache(kv_cache_config, *args, **kwargs)
        builders = [group.get_metadata_builder() for groups in self.attn_groups for group in groups]
        self.runtime.bind(builders, kv_cache_config.num_blocks)

    def execute_model(self, scheduler_output: Any, *args: Any, **kwargs: Any) -> Any:
        self.runtime.step.begin(scheduler_output)
        return super().execute_model(scheduler_output, *args, **kwargs)

    def _model_forward(
        self, input_ids: Any = None, positions: Any = None, *args: Any, **kwargs: Any
    ) -> Any:
        by_layer = get_forward_context().attn_metadata
        if not by_layer:
            return super()._model_forward(input_ids, positions, *args, **kwargs)
        metadata: SpeContextMetadata = next(iter(by_layer.values()))
        common = metadata.common
        tokens = int(common.query_start_loc_cpu[common.num_reqs])
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
            query_lens=common.query_start_loc_cpu[: common.num_reqs + 1].diff().tolist(),
            num_tokens=tokens,
        )
        self.runtime.step.before_model(batch)
        output = super()._model_forward(input_ids, positions, *args, **kwargs)
        self.runtime.step.after_model(
            batch, output[1] if self.use_aux_hidden_state_outputs else None
        )
        return output
