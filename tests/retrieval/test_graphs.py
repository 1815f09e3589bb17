"""Replayed steps do what eager ones do, whatever has changed in the tensors since; padding rows
leave no trace.
"""

from __future__ import annotations

import gc
import random
from functools import partial
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from specontext_vllm.config import PAGE_SIZE, pages_for
from specontext_vllm.retrieval import graphs as graphs_module
from specontext_vllm.retrieval.graphs import GRAPH_BYTES, StepGraphs
from specontext_vllm.retrieval.local import LocalRetriever
from specontext_vllm.step_data import WHOLE, StepBatch, bucket
from tests.paging import assert_close
from tests.retrieval.test_local import HIDDEN, KV_HEADS, MOST_ROWS, World
from tests.steps import bare_step

SPARE_BLOCK = 200
"""A page that nobody owns, behind those of ``World``: torch's path on a CPU writes what has the
slot -1 into the last one.
"""


class FirstCall:
    """Repeats the call that a name and its addresses came with first: whoever reads something newer
    from the host is found out.
    """

    def __init__(self):
        self.calls, self.runs, self.cleared = {}, 0, 0

    def run(self, name, inputs, function, *arguments):
        self.runs += 1
        key = (name, *(tensor.data_ptr() for tensor in inputs))
        self.calls.setdefault(key, partial(function, *arguments))()

    def clear(self):
        self.cleared += 1
        self.calls.clear()


class Replayed(World):
    """Decode steps through buffers that persist, padded to 1, 2, 4 or 8 rows, as vLLM's are."""

    def __init__(self, device, graphs, embeds_apart, **settings):
        super().__init__(device, **settings)
        self.retriever = LocalRetriever(
            self.config,
            self.head,
            lambda ids: F.embedding(ids, self.table),
            num_kv_heads=KV_HEADS,
            max_model_len=512,
            table_pages=pages_for(512),
            device=device,
            max_rows=MOST_ROWS,
            embeds_outside=embeds_apart,
        )
        self.decode_step = bare_step(self.retriever, self.selection, graphs=graphs)
        self.retriever.allocate_cache(SPARE_BLOCK + 1)
        self.retriever.cache.keys.fill_(float("nan"))
        self.retriever.cache.fused.fill_(float("nan"))
        self.token_ids = torch.zeros(MOST_ROWS, dtype=torch.int64, device=device)
        self.positions = torch.zeros(MOST_ROWS, dtype=torch.int64, device=device)
        self.slots = torch.zeros(MOST_ROWS, dtype=torch.int64, device=device)
        self.seq_lens = torch.zeros(MOST_ROWS, dtype=torch.int32, device=device)
        self.block_table = torch.zeros(MOST_ROWS, pages_for(512), dtype=torch.int32, device=device)
        self.states = [torch.zeros(MOST_ROWS, HIDDEN, device=device) for _ in range(3)]

    def decode(self, places):
        """One step in which each named sequence's token at a position is decoded."""
        rows = len(places)
        padded = next(size for size in (1, 2, 4, 8) if size >= rows)
        self.slots.fill_(-1)
        self.seq_lens.zero_()
        self.block_table.zero_()
        for row, (name, at) in enumerate(places.items()):
            blocks = torch.tensor(self.rows[name], dtype=torch.int32)
            self.token_ids[row] = self.tokens[name][at]
            self.positions[row] = at
            self.slots[row] = int(blocks[at // PAGE_SIZE]) * PAGE_SIZE + at % PAGE_SIZE
            self.seq_lens[row] = at + 1
            self.block_table[row, : len(blocks)] = blocks
            for state, aux in zip(self.states, self.aux[name]):
                state[row] = aux[at]
        batch = StepBatch(
            token_ids=self.token_ids[:padded],
            positions=self.positions[:padded],
            slots=self.slots[:padded],
            query_starts=torch.arange(padded + 1, dtype=torch.int32, device=self.device),
            seq_lens=self.seq_lens[:padded],
            block_table=self.block_table[:padded],
            seq_lens_bound=[at + 1 for at in places.values()],
            num_decodes=rows,
            table_rows=padded,
            num_tokens=rows,
            replayable=True,
            budgets=self.budgets_of(places),
        )
        self.lengths.fill_(-1)
        self.decode_step.before_model(batch)
        assert (self.lengths[: padded * KV_HEADS].view(-1, KV_HEADS)[rows:] == 0).all()
        self.decode_step.after_model(batch, [state[:padded] for state in self.states])


@pytest.fixture(params=["first call", pytest.param("captured", marks=pytest.mark.gpu)])
def graphs(request, device):
    return FirstCall() if request.param == "first call" else StepGraphs(device)


@pytest.mark.parametrize("embeds_apart", [False, True], ids=["embeds", "embeds-apart"])
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"confidence_threshold": 0.9, "fallback_budget": 96},
        {"head_key_dtype": "fp8"},
        {"kind": "own-mlps"},
        {"own": {"a": 112, "c": WHOLE, "e": 48}, "confidence_threshold": 0.5},
    ],
    ids=["plain", "fallback", "8-bit-keys", "keys-from-own-states", "own-budgets"],
)
@torch.inference_mode()
def test_a_replayed_step_is_an_eager_one(settings, embeds_apart, graphs, device):
    torch.manual_seed(0)
    settings = dict(settings)
    own = settings.pop("own", {})
    eager, replayed = World(device, **settings), Replayed(device, graphs, embeds_apart, **settings)
    reached = {}
    for name, length, prompt in (
        ("a", 420, 20),
        ("b", 420, 150),
        ("c", 300, 61),
        ("d", 200, 3),
        ("e", 420, 300),
        ("f", 130, 5),
    ):
        eager.add(name, length)
        for field in ("tokens", "aux", "rows"):
            getattr(replayed, field)[name] = getattr(eager, field)[name]
        for world in (eager, replayed):
            world.step((name, 0, prompt))
        reached[name] = prompt
    chance = random.Random(1)
    for step in range(160):
        able = [name for name, at in reached.items() if at < len(eager.tokens[name])]
        # Often the same rows, so that what is captured is used.
        # Other rows have budgets of their own later.
        eager.own = replayed.own = own if step < 100 else {"b": 80} if own else {}
        names = (
            able[: 1 + step // 40]
            if step % 4
            else chance.sample(able, chance.randint(1, len(able)))
        )
        eager.step(*((name, reached[name], reached[name] + 1) for name in names))
        replayed.decode({name: reached[name] for name in names})
        for row in range(len(names) * KV_HEADS):
            count = pages_for(int(eager.lengths[row]))
            assert int(replayed.lengths[row]) == int(eager.lengths[row])
            assert torch.equal(replayed.pages[row, :count], eager.pages[row, :count]), (step, row)
        for name in names:
            reached[name] += 1
    # One row or several: the sums of a matrix product may come in another order.
    assert_close(
        "keys",
        eager.retriever.cache.keys[:200].float().nan_to_num(0),
        replayed.retriever.cache.keys[:200].float().nan_to_num(0),
        1e-5,
    )
    assert torch.equal(
        eager.retriever.cache.keys[:200].isnan(), replayed.retriever.cache.keys[:200].isnan()
    )
    assert_close(
        "fused",
        eager.retriever.cache.fused[:200].nan_to_num(0),
        replayed.retriever.cache.fused[:200].nan_to_num(0),
        1e-5,
    )
    assert replayed.retriever.stats() == pytest.approx(eager.retriever.stats())
    if isinstance(graphs, FirstCall):
        assert graphs.runs == 320 and len(graphs.calls) < 40
    else:
        assert 4 < len(graphs) < 40


@torch.inference_mode()
def test_settings_that_change_are_followed(graphs, device):
    world = Replayed(device, graphs, False)
    world.add("a", 400)
    world.step(("a", 0, 300))
    lengths = []
    for at in range(300, 330):
        if at == 310:
            world.decode_step.configure(world.config.model_copy(update={"budget": 128}))
        if at == 320:
            world.decode_step.configure(world.config.model_copy(update={"retriever": "random"}))
        world.decode({"a": at})
        lengths.append(-(-int(world.lengths[0]) // PAGE_SIZE))
    assert lengths == [4] * 10 + [8] * 10 + [4] * 10
    # The stand-in's call reads the settings anew, a captured one does not.
    assert not isinstance(graphs, FirstCall) or graphs.cleared == 2


class Remembering(StepGraphs):
    """Keeps the calls of the last step by their kind."""

    def run(self, name, inputs, function, *arguments):
        self.__dict__.setdefault("calls", {})[name[0]] = partial(function, *arguments)
        super().run(name, inputs, function, *arguments)


@pytest.fixture
def told(monkeypatch) -> list[str]:
    """Warnings; vLLM's loggers, where it is loaded, pass none on to the root logger, where caplog
    listens.
    """
    told = []
    monkeypatch.setattr(
        graphs_module.logger, "warning", lambda text, *values: told.append(text % values)
    )
    return told


def learned_world(device, graphs: StepGraphs) -> Replayed:
    """A world after three steps, whose calls ``graphs`` remembers, with ``graphs``."""
    world = Replayed(device, graphs, False)
    world.add("a", 400)
    world.step(("a", 0, 300))
    for at in range(300, 303):
        world.decode({"a": at})
    torch.cuda.synchronize()
    return world


def run_again(graphs: Remembering, index: int) -> None:
    """A captured step under another name, twice, since the first time is eager."""
    for _ in range(2):
        StepGraphs.run(
            graphs, ("again", index), (), graphs.calls["choose" if index % 2 else "learn"]
        )


@pytest.mark.gpu
@torch.inference_mode()
def test_a_graph_takes_little_memory_and_what_it_takes_is_measured(device, record_property):
    graphs = Remembering(device)
    world = learned_world(device, graphs)
    start, (before, _) = graphs.taken, torch.cuda.mem_get_info()
    for index in range(128):
        run_again(graphs, index)
    torch.cuda.synchronize()
    after, _ = torch.cuda.mem_get_info()
    record_property("MiB a graph", (before - after) / 128 / 2**20)
    print(
        f"{(before - after) / 128 / 2**20:.3f} MiB a graph, {graphs.taken / 2**20:.1f} MiB in all"
    )
    assert len(graphs) >= 130 and before - after < 128 << 20
    # Other processes may have taken or given back memory meanwhile, but hardly so much.
    assert graphs.taken - start == pytest.approx(before - after, abs=8 << 20)
    world.decode_step.configure(world.config.model_copy(update={"budget": 128}))
    assert len(graphs) == 0 and graphs.taken <= start + before - after


@pytest.mark.gpu
@torch.inference_mode()
def test_graphs_take_no_more_than_is_set_aside(device, told):
    graphs = Remembering(device)
    world = learned_world(device, graphs)
    graphs.max_bytes = graphs.taken + (16 << 20)
    before, _ = torch.cuda.mem_get_info()
    for index in range(2000):
        run_again(graphs, index)
    torch.cuda.synchronize()
    after, _ = torch.cuda.mem_get_info()
    assert len(graphs) < 2000 and graphs.taken <= graphs.max_bytes
    assert before - after <= 16 << 20
    assert len(told) == 1 and "steps that would need others run eagerly" in told[0]
    # Steps go on, captured or not.
    world.decode({"a": 303})
    assert int(world.lengths[0]) == 64


@pytest.mark.gpu
def test_vllm_s_memory_profile_counts_what_graphs_may_take(device, monkeypatch):
    from vllm.v1.worker.gpu.model_runner import GPUModelRunner

    from specontext_vllm.engine.runner_v2 import SpeContextModelRunnerV2

    activations = 64 << 20
    monkeypatch.setattr(
        GPUModelRunner,
        "profile_run",
        lambda self: torch.empty(activations, dtype=torch.uint8, device=device),
    )
    runner = object.__new__(SpeContextModelRunnerV2)
    runner.device, runner.max_num_tokens = device, 1
    runner.runtime = SimpleNamespace(
        reserved_bytes=lambda tokens: GRAPH_BYTES,
        retriever=SimpleNamespace(profile=lambda tokens: None),
    )
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    runner.profile_run()
    assert torch.cuda.max_memory_allocated() - before == GRAPH_BYTES + activations
    assert torch.cuda.memory_allocated() == before


@pytest.mark.gpu
@torch.inference_mode()
def test_a_capture_goes_on_while_graphs_of_an_engine_that_is_gone_are_collected(device):
    """To reset a graph is not permitted while a stream is captured."""
    threshold = gc.get_threshold()
    gone = Remembering(device)
    learned_world(device, gone)
    gone.itself = gone
    del gone
    try:
        graphs = Remembering(device)
        gc.set_threshold(1)
        world = learned_world(device, graphs)
    finally:
        gc.set_threshold(*threshold)
    assert len(graphs) > 0 and int(world.lengths[0]) == 63


class Played(StepGraphs):
    """Without a GPU: each capture leaves as much less free (MiB) as ``sizes`` says, None: there is
    no memory for it.
    """

    def __init__(self, most, sizes, monkeypatch):
        for name in ("graph_pool_handle", "Stream", "synchronize", "empty_cache"):
            monkeypatch.setattr(torch.cuda, name, lambda *_: None)
        super().__init__(torch.device("cuda"), most << 20)
        self.sizes, self.free, self.kept_by_driver = list(sizes), 1000, 0

    @property
    def mib(self) -> int:
        return self.taken >> 20

    def _free_bytes(self):
        # A pool goes with its last graph.
        return (self.free if self._graphs else 1000 - self.kept_by_driver) << 20

    def _capture(self, function, *arguments):
        size = self.sizes.pop(0)
        if size is None:
            raise torch.OutOfMemoryError
        self.free -= size

        class Graph:
            replay = staticmethod(partial(function, *arguments))

        return Graph()


def run_all(graphs, names) -> list[int]:
    """Each name three times; how often its work was done."""
    done = []
    for name in names:
        runs = []
        for _ in range(3):
            graphs.run(name, (), lambda runs=runs: runs.append(1))
        done.append(len(runs))
    return done


def test_graphs_are_bounded_by_what_they_take(monkeypatch, told):
    graphs = Played(100, [30, 10, 0, 25, 10, 5], monkeypatch)
    assert run_all(graphs, range(8)) == [3] * 8
    # 75 are taken, and another of 30 would be too much.
    assert (len(graphs), graphs.mib) == (5, 75) and graphs.sizes == [5]
    (sentence,) = told
    assert (
        "5 graphs of decode steps in 75 MiB" in sentence
        and "the 100 MiB that are set aside" in sentence
    )


def test_memory_that_others_give_back_is_not_the_graphs(monkeypatch):
    graphs = Played(100, [10, -50, 10], monkeypatch)
    run_all(graphs, range(3))
    assert (len(graphs), graphs.mib) == (3, 20)


def test_what_graphs_give_back_may_be_taken_again(monkeypatch, told):
    graphs = Played(100, [40, 40, 30, 30, 30], monkeypatch)
    run_all(graphs, range(3))
    assert (len(graphs), graphs.mib) == (2, 80)
    graphs.kept_by_driver = 10
    graphs.clear()
    assert (len(graphs), graphs.mib) == (0, 10)
    graphs.free = 990
    run_all(graphs, range(3))
    assert (len(graphs), graphs.mib) == (2, 70)
    assert len(told) == 2


def test_a_full_gpu_ends_the_captures_and_not_the_step(monkeypatch, told):
    graphs = Played(100, [10, None, 10], monkeypatch)
    assert run_all(graphs, range(4)) == [3] * 4
    assert len(graphs) == 1 and graphs.sizes == [10]
    (sentence,) = told
    assert "no memory" in sentence


@pytest.mark.parametrize("pages", [1, 2, 3, 4, 5, 7, 9, 127, 128, 129, 1000, 8192])
def test_a_bucket_is_at_most_half_too_large(pages):
    assert pages <= bucket(pages) <= max(pages + 1, 1.5 * pages)
    assert bucket(bucket(pages)) == bucket(pages)


def test_there_are_few_buckets():
    assert len({bucket(pages) for pages in range(129, 8193)}) == 12
