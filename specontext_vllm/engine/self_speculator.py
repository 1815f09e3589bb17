"""The V2 runner's drafter in lossless mode: the target itself.

vLLM: the speculator to derive from, and its graphs' modes.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor
from vllm.config import CUDAGraphMode
from vllm.v1.worker.gpu.spec_decode.speculator import DraftModelSpeculator

from specontext_vllm.config import PAGE_SIZE
from specontext_vllm.step_data import StepBatch


class SelfSpeculator(DraftModelSpeculator):
    """A drafter without weights, layers and graphs of its own. A pass over drafts is a decode step
    of one token a row, in the target's buffers: the graph that plain steps replay reads whatever
    the page table holds. Nothing waits for the GPU.

    Args:
        runner: the model runner, whose step has sampled when ``propose`` is called.
    """

    def __init__(self, vllm_config: Any, device: torch.device, runner: Any) -> None:
        """Makes vLLM's buffers of drafts.

        Overrides: vllm.v1.worker.gpu.spec_decode.speculator.DraftModelSpeculator.__init__
        """
        super().__init__(vllm_config, device)
        self.runner = runner

    def load_draft_model(self, target_model: Any, target_attn_layer_names: set[str]) -> Any:
        """Loads nothing.

        Overrides: vllm.v1.worker.gpu.spec_decode.speculator.DraftModelSpeculator.load_draft_model
        """
        return target_model

    def set_attn(self, *args: Any, **kwargs: Any) -> None:
        """There are no other layers than the target's.

        Overrides: vllm.v1.worker.gpu.spec_decode.speculator.DraftModelSpeculator.set_attn
        """

    def init_cudagraph_manager(self, cudagraph_mode: Any) -> None:
        """There are no other graphs than the target's.

        Overrides: vllm.v1.worker.gpu.spec_decode.speculator.BaseSpeculator.init_cudagraph_manager
        """

    def capture(self) -> None:
        """There are no other graphs than the target's.

        Overrides: vllm.v1.worker.gpu.spec_decode.speculator.BaseSpeculator.capture
        """

    @torch.inference_mode()
    def propose(
        self,
        input_batch: Any,
        attn_metadata: Any,
        slot_mappings: Any,
        last_hidden_states: Tensor,
        aux_hidden_states: Any,
        num_sampled: Tensor,
        num_rejected: Tensor,
        last_sampled: Tensor,
        *args: Any,
        dummy_run: bool = False,
        num_speculative_tokens: int | None = None,
        **kwargs: Any,
    ) -> Tensor:
        """``[R, most]`` int64 drafts, of which the first ``num_speculative_tokens`` are made.

        Overrides: vllm.v1.worker.gpu.spec_decode.speculator.BaseSpeculator.propose
        """
        drafts = self.draft_tokens[: input_batch.num_reqs]
        count = num_speculative_tokens
        if count is None:
            count = self.num_speculative_steps
        if count and not dummy_run:
            self._draft(input_batch, last_sampled, drafts[:, :count])
        return drafts

    def _draft(self, input_batch: Any, last_sampled: Tensor, drafts: Tensor) -> None:
        """Fill ``drafts [R, count]``: rows that are still in their prompt get some that nobody
        reads.

        Uses: vllm.v1.worker.gpu.states.RequestState.num_computed_tokens,
            vllm.v1.worker.gpu.model_runner.GPUModelRunner.cudagraph_manager,
            vllm.v1.worker.gpu.model_runner.GPUModelRunner.input_buffers,
            vllm.v1.worker.gpu.model_runner.GPUModelRunner.block_tables
        """
        runner, rows = self.runner, input_batch.num_reqs
        buffers, group = runner.input_buffers, runner.runtime.kv_groups[0]
        graph = runner.cudagraph_manager.dispatch(rows, rows, 1, 0, 1)
        replays = graph.cg_mode == CUDAGraphMode.FULL
        padded = graph.num_reqs if replays else rows
        replay = partial(runner.cudagraph_manager.run_fullgraph, graph) if replays else None
        _lay_out(buffers, rows, padded)
        # The padding differs from that of the step.
        tables = runner.block_tables.gather_block_tables(
            input_batch.idx_mapping, num_reqs_padded=padded
        )
        table = runner.runtime.attention_groups[0].map_to_kernel_block_table(tables[group.index])
        known = runner.req_states.num_computed_tokens.gpu[input_batch.idx_mapping].long()
        tokens = last_sampled[input_batch.idx_mapping].view(rows)
        last_pages = table[:rows].gather(1, ((known - 1).clamp(min=0) // PAGE_SIZE)[:, None])
        with runner.self_drafts.page_memory(last_pages[:, 0].long()):
            for ahead in range(drafts.shape[1]):
                # Beyond the longest context nothing is ever verified.
                positions = (known + ahead).clamp(max=self.max_model_len - 1)
                buffers.input_ids[:rows] = tokens
                buffers.positions[:rows] = positions
                buffers.seq_lens[:rows] = positions + 1
                slots = runner.block_tables.compute_slot_mappings(
                    input_batch.idx_mapping,
                    buffers.query_start_loc[: padded + 1],
                    buffers.positions[:padded],
                    num_tokens_padded=padded,
                )
                batch = StepBatch(
                    token_ids=buffers.input_ids[:padded],
                    positions=buffers.positions[:padded],
                    slots=slots[group.index],
                    query_starts=buffers.query_start_loc[: padded + 1],
                    seq_lens=buffers.seq_lens[:padded],
                    block_table=table,
                    seq_lens_bound=[
                        min(bound + ahead + 1, self.max_model_len)
                        for bound in input_batch.seq_lens_cpu_upper_bound[:rows].tolist()
                    ],
                    num_decodes=rows,
                    table_rows=padded,
                    num_tokens=rows,
                    names=input_batch.req_ids[:rows],
                    query_lens=[1] * rows,
                    replayable=replays,
                )
                tokens = runner.self_drafts.next_tokens(batch, replay)
                drafts[:, ahead] = tokens


def _lay_out(buffers: Any, rows: int, padded: int) -> None:
    """One token for each of ``rows`` rows, none for those of padding."""
    starts = torch.arange(padded + 1, dtype=torch.int32, device=buffers.query_start_loc.device)
    buffers.query_start_loc[: padded + 1] = starts.clamp(max=rows)
    buffers.seq_lens[rows:padded] = 0
    buffers.is_padding[:rows] = False
    buffers.is_padding[rows:padded] = True
