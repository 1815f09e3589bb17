"""Adapter to vLLM's V2 model runner (CUDA).

vLLM: the runner to derive from.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from vllm.v1.worker.gpu.model_runner import GPUModelRunner

from specontext_vllm.engine.runtime import Runtime, attach_runtime
from specontext_vllm.step_data import StepBatch


class SpeContextModelRunnerV2(GPUModelRunner):
    """Selects pages in ``prepare_attn`` (real batches only, before metadata and graph replay) and
    learns in ``sample_tokens``.

    Both enqueue on the main stream; vLLM's captured graph only reads the page table, and what our
    own graphs read lies on the device, so nothing that is replayed can be stale.
    """

    runtime: Runtime
    _batch: StepBatch | None = None

    def load_model(self, *args: Any, **kwargs: Any) -> None:
        """Makes the runtime, now that there is a model.

        Overrides: vllm.v1.worker.gpu.model_runner.GPUModelRunner.load_model
        """
        super().load_model(*args, **kwargs)
        attach_runtime(self)

    def profile_run(self, *args: Any, **kwargs: Any) -> None:
        """Counts our own graphs, and the head's work on a whole batch, in the peak of memory that
        vLLM measures: graphs are captured when it has long given the rest to KV.

        Overrides: vllm.v1.worker.gpu.model_runner.GPUModelRunner.profile_run
        """
        reserved = torch.empty(self.runtime.graph_bytes, dtype=torch.uint8, device=self.device)
        super().profile_run(*args, **kwargs)
        self.runtime.retriever.profile(self.max_num_tokens)
        del reserved

    def initialize_kv_cache(
        self, kv_cache_config: Any, is_profiling: bool = False, **kwargs: Any
    ) -> None:
        """With a host pool the layers are bound to our arena; then the runtime is bound.

        Overrides: vllm.v1.worker.gpu.model_runner.GPUModelRunner.initialize_kv_cache
        """
        with self.runtime.own_kv_cache(kv_cache_config, is_profiling):
            super().initialize_kv_cache(kv_cache_config, is_profiling, **kwargs)
        self.runtime.bind(self.attn_groups, kv_cache_config.num_blocks)

    def execute_model(self, scheduler_output: Any, *args: Any, **kwargs: Any) -> Any:
        """The two tiers follow the scheduler before anything of the step is launched.

        Overrides: vllm.v1.worker.gpu.model_runner.GPUModelRunner.execute_model
        """
        if not kwargs.get("dummy_run", False):
            self.runtime.step.begin(scheduler_output)
        return super().execute_model(scheduler_output, *args, **kwargs)

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
        group, attention = self.runtime.kv_group, self.runtime.attention_group
        rows, tokens = input_batch.num_reqs, input_batch.num_tokens
        decodes = int((~input_batch.is_prefilling_np[:rows]).sum())
        max_captured = self.vllm_config.compilation_config.max_cudagraph_capture_size or 0
        self._batch = StepBatch(
            token_ids=input_batch.input_ids,
            positions=input_batch.positions,
            slots=slot_mappings[group.index],
            query_starts=input_batch.query_start_loc,
            seq_lens=input_batch.seq_lens,
            # Here in blocks; attention reads kernel blocks, our pages.
            block_table=attention.map_to_kernel_block_table(block_tables[group.index]),
            seq_lens_bound=input_batch.seq_lens_cpu_upper_bound[:rows].tolist(),
            num_decodes=decodes,
            # Only a batch of decodes alone is padded to a captured size.
            table_rows=input_batch.num_reqs_after_padding if decodes == rows else decodes,
            names=input_batch.req_ids[:rows],
            query_lens=input_batch.num_scheduled_tokens[:rows].tolist(),
            num_tokens=tokens,
            # vLLM's own graphs read these buffers, so they persist. Steps of more rows than it
            # captures are not padded, and nearly each of them would need a graph of its own.
            replayable=decodes == rows and input_batch.num_reqs_after_padding <= max_captured,
        )
        self.runtime.step.before_model(self._batch)
        return block_tables, slot_mappings

    @torch.inference_mode()
    def sample_tokens(self, grammar_output: Any) -> Any:
        """Learn from the step's hidden states, which vLLM keeps until it has sampled.

        Overrides: vllm.v1.worker.gpu.model_runner.GPUModelRunner.sample_tokens
        Uses: vllm.v1.worker.gpu.model_runner.GPUModelRunner.execute_model_state
        """
        state, batch = self.execute_model_state, self._batch
        output = super().sample_tokens(grammar_output)
        self._batch = None
        if state is not None and batch is not None:
            self.runtime.step.after_model(batch, state.aux_hidden_states)
        return output
