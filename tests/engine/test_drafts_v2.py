"""Drafts under the V2 runner, with its own objects and no GPU."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from specontext_vllm.engine.kv_group import KVGroup
from specontext_vllm.retrieval.draft_lists import DraftLists
from specontext_vllm.step_data import PageTable
from tests.engine.test_kv_group import OTHERS, attention_group


@pytest.fixture
def runner(monkeypatch):
    from vllm.v1.worker.gpu.model_runner import GPUModelRunner

    from specontext_vllm.engine.runner_v2 import SpeContextModelRunnerV2

    table = torch.arange(12, dtype=torch.int32).view(3, 4)
    monkeypatch.setattr(
        GPUModelRunner, "prepare_attn", lambda *_: ((table,), torch.arange(16)[None])
    )
    made = object.__new__(SpeContextModelRunnerV2)
    made.vllm_config = SimpleNamespace(
        compilation_config=SimpleNamespace(max_cudagraph_capture_size=16)
    )
    made._kept = torch.full((4,), 99, dtype=torch.int32)
    made.seen, made.learned = [], []
    made.runtime = SimpleNamespace(
        storage=None,
        step=SimpleNamespace(
            before_model=made.seen.append,
            after_model=lambda batch, aux: made.learned.append((batch, aux)),
        ),
        kv_groups=(KVGroup(0, ("a",), 1),),
        attention_groups=[SimpleNamespace(map_to_kernel_block_table=lambda blocks: blocks)],
    )
    return made


def input_batch(query_lens, positions, prompts=0, padded_rows=None, padded_tokens=None):
    rows, tokens = len(query_lens), sum(query_lens)
    starts = np.cumsum([0, *query_lens])
    padded_rows = padded_rows or rows
    starts = np.concatenate((starts, np.full(padded_rows - rows, tokens)))
    return SimpleNamespace(
        num_reqs=rows,
        num_tokens=tokens,
        num_reqs_after_padding=padded_rows,
        num_tokens_after_padding=padded_tokens or tokens,
        is_prefilling_np=np.arange(rows) >= rows - prompts,
        input_ids=torch.arange(16),
        positions=torch.cat([torch.arange(p, p + n) for p, n in zip(positions, query_lens)]),
        query_start_loc=torch.tensor(starts, dtype=torch.int32),
        seq_lens=torch.tensor([p + n for p, n in zip(positions, query_lens)], dtype=torch.int32),
        seq_lens_cpu_upper_bound=torch.tensor([p + n for p, n in zip(positions, query_lens)]),
        req_ids=[f"r{row}" for row in range(rows)],
        num_scheduled_tokens=np.array(query_lens),
    )


@pytest.mark.parametrize(
    ("batch", "most", "table_rows", "replayable"),
    [
        pytest.param(
            input_batch([4, 4], [20, 33], padded_rows=3, padded_tokens=12), 4, 3, True, id="uniform"
        ),
        pytest.param(input_batch([4, 2], [20, 33]), 4, 2, False, id="fewer-drafts"),
        pytest.param(input_batch([4, 4, 7], [20, 33, 0], 1), 4, 2, False, id="with-a-prompt"),
        pytest.param(input_batch([1, 1], [20, 33]), 1, 2, True, id="none"),
        pytest.param(input_batch([9, 9], [20, 33]), 9, 2, False, id="not-captured"),
    ],
)
def test_rows_with_drafts_are_decode_rows(runner, batch, most, table_rows, replayable):
    runner.prepare_attn(batch)
    (seen,) = runner.seen
    assert (seen.max_queries, seen.table_rows, seen.replayable) == (most, table_rows, replayable)


def test_what_was_kept_is_by_how_much_the_requests_have_grown(runner, monkeypatch):
    from vllm.v1.worker.gpu.model_runner import GPUModelRunner

    computed = torch.tensor([0, 37, 0, 21], dtype=torch.int32)
    runner.req_states = SimpleNamespace(num_computed_tokens=SimpleNamespace(gpu=computed))
    runner.execute_model_state = SimpleNamespace(aux_hidden_states=["aux"])

    def sample(self, grammar):
        # As vLLM does: the requests move on before the drafter runs.
        self.execute_model_state = None
        self.postprocess_sampled(torch.tensor([3, 1]), "tokens", "sampled", "rejected")
        assert self.learned
        return "output"

    monkeypatch.setattr(GPUModelRunner, "postprocess_sampled", lambda *_, **__: None)
    monkeypatch.setattr(GPUModelRunner, "sample_tokens", sample)
    runner.prepare_attn(input_batch([4, 4], [20, 33], padded_rows=3, padded_tokens=12))
    assert runner.sample_tokens(None) == "output"
    ((batch, aux),) = runner.learned
    # One token of the first row stays, all of the second's; the padding's count is never read.
    assert batch.kept.tolist()[:2] == [1, 4] and aux == ["aux"]
    assert batch.kept.data_ptr() == runner._kept.data_ptr() and len(batch.kept) == 3
    # A step without drafts keeps all.
    runner.execute_model_state = SimpleNamespace(aux_hidden_states=["next"])
    runner.prepare_attn(input_batch([1, 1], [21, 37]))
    runner.sample_tokens(None)
    assert runner.learned[-1][0].kept is None and runner._batch is None


def draft_step(seq_lens, query_lens):
    """What vLLM says of a drafter's step."""
    starts = np.cumsum([0, *query_lens])
    return SimpleNamespace(
        num_reqs=len(query_lens),
        num_actual_tokens=sum(query_lens),
        max_query_len=max(query_lens),
        max_seq_len=max(seq_lens),
        query_start_loc=torch.tensor(starts, dtype=torch.int32),
        query_start_loc_cpu=torch.tensor(starts, dtype=torch.int32),
        seq_lens=torch.tensor(seq_lens, dtype=torch.int32),
        block_table_tensor=torch.arange(40, dtype=torch.int32).view(-1, 10)[: len(query_lens)],
        is_prefilling=None,
    )


def test_a_drafter_s_rows_of_one_token_read_the_lists_captured_or_not():
    builder = attention_group(16, OTHERS).get_metadata_builder()
    builder.provider = SimpleNamespace(plan=lambda table, rows: None)
    assert builder.is_dense and builder.build(0, draft_step([40, 9], [1, 1])).prefill is not None
    lists = builder.draft_lists = DraftLists(
        4, 2, 3, num_drafts=3, sink_pages=1, device=torch.device("cpu")
    )
    # A row that reads two of its three pages, one of padding, and vLLM's warm-up before any step.
    captured = builder.build_for_cudagraph_capture(draft_step([9999] * 3, [1, 1, 1]))
    assert captured.table is lists.table and captured.num_decodes == 3
    assert lists.table.lengths.max() <= lists.table.max_pages * 16
    table = PageTable.allocate(4, 2, 3, torch.device("cpu"))
    table.pages[:2, :2] = torch.tensor([[0, 4], [1, 5]], dtype=torch.int32)
    table.lengths[:2] = 40 - 16
    step = draft_step([40, 0], [4, 0])
    lists.take_decodes(
        table,
        SimpleNamespace(table_rows=2, seq_lens=step.seq_lens, block_table=step.block_table_tensor),
    )
    for ahead in range(1, 12):
        metadata = builder.build(0, draft_step([40 + ahead, 0], [1, 1]))
        assert metadata.table is captured.table and metadata.prefill is None
        assert metadata.table.lengths[:4].tolist() == [24 + ahead] * 2 + [0] * 2
    # Page 3 of the row's own pages is begun by the ninth token.
    assert metadata.table.pages[:2, :3].tolist() == [[0, 4, 6], [1, 5, 7]]
    # Its first tokens of a step attend densely.
    assert builder.build(0, draft_step([40, 9], [4, 1])).prefill is not None
