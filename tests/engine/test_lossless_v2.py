"""Lossless mode under the V2 runner: its drafts without a GPU, and its answers on one."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from specontext_vllm.engine.kv_group import KVGroup
from specontext_vllm.retrieval.checkpoint import read_checkpoint, save_head
from tests.engine.conftest import engine
from tests.engine.scenarios import SCENARIOS, scenarios
from tests.engine.shared_runs import SETTINGS, SHAPE

VOCABULARY, LONGEST = 50, 40
KNOWN = torch.tensor([0, 37, 0, 15], dtype=torch.int32)
"""Tokens with KV of the requests in places 1 and 3 of vLLM's table."""


class Manager:
    """Of vLLM's graphs: one of four rows, or none."""

    def __init__(self, buffers, captured):
        self.buffers, self.captured, self.asked = buffers, captured, []

    def dispatch(self, *shape):
        from vllm.config import CUDAGraphMode

        self.asked.append(shape)
        mode = CUDAGraphMode.FULL if self.captured else CUDAGraphMode.NONE
        return SimpleNamespace(cg_mode=mode, num_reqs=4 if self.captured else shape[0])

    def run_fullgraph(self, graph):
        return self.buffers.input_ids[: graph.num_reqs].float(), ["aux"]


class Tables:
    """vLLM's block tables without its kernels: the request in place r has the pages 10 * r + i."""

    def gather_block_tables(self, idx_mapping, num_reqs_padded):
        table = torch.zeros(num_reqs_padded, 4, dtype=torch.int32)
        table[: len(idx_mapping)] = 10 * idx_mapping[:, None] + torch.arange(4)
        return (table,)

    def compute_slot_mappings(self, idx_mapping, starts, positions, num_tokens_padded):
        slots = torch.full((1, num_tokens_padded), -1)
        for row, place in enumerate(idx_mapping.tolist()):
            assert starts[row : row + 2].tolist() == [row, row + 1]
            position = int(positions[row])
            slots[0, row] = (10 * place + position // 16) * 16 + position % 16
        return slots


@pytest.mark.parametrize("captured", [True, False], ids=["graph", "eager"])
def test_a_pass_over_drafts_is_a_step_of_one_token_a_row(monkeypatch, captured):
    from vllm.v1.worker.gpu.input_batch import InputBuffers

    from specontext_vllm.engine.lossless import SelfDrafts
    from specontext_vllm.engine.self_speculator import SelfSpeculator

    buffers = InputBuffers(4, 16, torch.device("cpu"))
    buffers.seq_lens.fill_(99)
    seen, fused = [], torch.arange(50.0)[:, None]

    def before_model(batch):
        copies = {
            name: getattr(batch, name).clone()
            for name in ("token_ids", "positions", "slots", "seq_lens", "query_starts")
        }
        seen.append(SimpleNamespace(batch=batch, **copies))

    def after_model(batch, aux):
        assert aux == ["aux"]
        fused[batch.slots[batch.slots >= 0] // 16] = -1

    drafts = object.__new__(SelfDrafts)
    drafts.step = SimpleNamespace(before_model=before_model, after_model=after_model)
    drafts.head_cache = SimpleNamespace(fused=fused)
    drafts.model = SimpleNamespace(
        compute_logits=lambda hidden: F.one_hot(hidden.long() + 1, VOCABULARY)
    )
    monkeypatch.setattr(SelfDrafts, "_run", lambda self, b: (b.token_ids.float(), ["aux"]))
    made = object.__new__(SelfSpeculator)
    made.draft_tokens = torch.full((4, 6), 77)
    made.num_speculative_steps = 6
    # vLLM 0.33 reads it of its configuration.
    monkeypatch.setattr(SelfSpeculator, "max_model_len", LONGEST, raising=False)
    made.runner = SimpleNamespace(
        input_buffers=buffers,
        runtime=SimpleNamespace(
            kv_groups=(KVGroup(0, ("a",), 1),),
            attention_groups=[SimpleNamespace(map_to_kernel_block_table=lambda table: table)],
        ),
        cudagraph_manager=Manager(buffers, captured),
        block_tables=Tables(),
        req_states=SimpleNamespace(num_computed_tokens=SimpleNamespace(gpu=KNOWN)),
        self_drafts=drafts,
    )
    batch = SimpleNamespace(
        num_reqs=2,
        idx_mapping=torch.tensor([3, 1]),
        seq_lens_cpu_upper_bound=torch.tensor([18, 38]),
        req_ids=["c", "a"],
    )
    last_sampled = torch.tensor([[0], [20], [0], [5]])

    def propose(**options):
        return made.propose(batch, None, None, None, None, None, None, last_sampled, **options)

    found = propose(num_speculative_tokens=4)
    assert found.tolist() == [[6, 7, 8, 9, 77, 77], [21, 22, 23, 24, 77, 77]]
    assert made.runner.cudagraph_manager.asked == [(2, 2, 1, 0, 1)]
    assert [step.token_ids[:2].tolist() for step in seen] == [[5, 20], [6, 21], [7, 22], [8, 23]]
    # No position lies beyond the longest context.
    assert [step.positions[:2].tolist() for step in seen] == [
        [15, 37],
        [16, 38],
        [17, 39],
        [18, 39],
    ]
    assert seen[1].seq_lens[:2].tolist() == [17, 39]
    assert seen[1].slots[:2].tolist() == [31 * 16, 12 * 16 + 6]
    assert seen[3].batch.seq_lens_bound == [22, LONGEST]
    rows = 4 if captured else 2
    for step in seen:
        assert step.batch.table_rows == rows and step.batch.replayable == captured
        assert step.batch.num_decodes == step.batch.num_tokens == 2 and not step.batch.dense
        assert step.query_starts.tolist() == [0, 1, 2, 2, 2][: rows + 1]
        assert step.seq_lens[2:].tolist() == [0] * (rows - 2)
        assert step.slots[2:].tolist() == [-1] * (rows - 2)
    # What the pages of the newest known tokens remember was put back, that of begun ones was not.
    assert fused[30] == 30 and fused[12] == 12 and fused[31] == -1
    if captured:
        assert buffers.is_padding[:4].tolist() == [False, False, True, True]
    seen.clear()
    propose(num_speculative_tokens=0)
    propose(dummy_run=True)
    assert not seen


@pytest.fixture
def two_groups(own_head, tmp_path):
    """Folder of a head that selects for two groups of layers, alike."""
    head = read_checkpoint(own_head)
    save_head(tmp_path, replace(head.spec, layer_groups=2), head.tensors, dtype=None)
    return tmp_path


@pytest.mark.gpu
@pytest.mark.parametrize("way", ["graphs", "eager", "two groups of layers"])
def test_tokens_on_a_gpu_equal_stock(stock, prompts, way, request):
    settings, eager = {**SETTINGS, "mode": "lossless"}, way == "eager"
    if way == "two groups of layers":
        settings["retrieval_head"] = str(request.getfixturevalue("two_groups"))
    with engine(**SHAPE, enforce_eager=eager, additional_config={"specontext": settings}) as llm:
        length = llm.llm_engine.engine_core.engine_core.scheduler.draft_length
        turn = iter(range(10**9))
        length.choose = lambda contexts: length.lengths[next(turn) % len(length.lengths)]
        found = scenarios(llm, prompts)
        counts = {
            metric.name.removeprefix("vllm:spec_decode_num_"): metric.value
            for metric in llm.get_metrics()
            if metric.name.startswith("vllm:spec_decode_num_") and hasattr(metric, "value")
        }
    assert {name: found[name] for name in SCENARIOS} == {name: stock[name] for name in SCENARIOS}
    assert counts["accepted_tokens"] > 0.5 * counts["draft_tokens"] > 0
