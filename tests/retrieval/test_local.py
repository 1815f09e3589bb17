"""The head's memory: whatever way a sequence is cut into steps, its keys are those of one pass over
the whole.
"""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from specontext_vllm.config import PAGE_SIZE, ConfigError, SpeContextConfig, pages_for
from specontext_vllm.retrieval import cached_head
from specontext_vllm.retrieval.cache import HeadCache, head_key_dtype
from specontext_vllm.retrieval.checkpoint import dummy_checkpoint, random_checkpoint
from specontext_vllm.retrieval.head import RetrievalHead
from specontext_vllm.retrieval.local import LocalRetriever
from specontext_vllm.retrieval.reference import Budget
from specontext_vllm.retrieval.rules import find_rule
from specontext_vllm.retrieval.scoring import score_row
from specontext_vllm.retrieval.selection import select_row
from specontext_vllm.step_data import WHOLE, PageTable, Selection, StepBatch
from tests.paging import assert_close
from tests.retrieval.own_heads import KINDS

VOCAB, HIDDEN, HEADS, KV_HEADS, HEAD_DIM = 97, 32, 4, 2, 16
MAX_LEN = 512
MOST_ROWS = 8


def new_selection(device):
    """An empty one for ``MOST_ROWS`` rows of up to ``MAX_LEN`` tokens."""
    return Selection.into(PageTable.allocate(MOST_ROWS, KV_HEADS, MAX_LEN // PAGE_SIZE, device))


class World:
    """Made-up sequences whose aux states are a function of (sequence, position), and a retriever
    that sees them in steps.
    """

    def __init__(self, device, seed=0, max_len=MAX_LEN, kind=None, **settings):
        generator = torch.Generator().manual_seed(seed)
        self.device = device
        checkpoint = dummy_checkpoint(
            hidden_size=HIDDEN,
            num_layers=12,
            num_heads=HEADS,
            num_kv_heads=KV_HEADS,
            head_dim=HEAD_DIM,
            rope_theta=1e4,
            max_position=max_len,
            dtype=torch.float32,
            seed=seed,
        )
        if kind is not None:
            # As wide as nothing else.
            changes = {"hidden_size": 24, "key_states": "own", **KINDS[kind]}
            changes.pop("biases", None)
            checkpoint = random_checkpoint(replace(checkpoint.spec, **changes), seed)
        self.checkpoint = checkpoint
        self.head = RetrievalHead(
            checkpoint, max_position=max_len, dtype=torch.float32, device=device
        )
        self.table = torch.randn(VOCAB, HIDDEN, generator=generator).to(device)
        self.config = SpeContextConfig(
            **{
                "budget": 64,
                "sink_tokens": 16,
                "recent_tokens": 17,
                "head_key_dtype": "model",
                **settings,
            }
        )
        self.retriever = LocalRetriever(
            self.config,
            self.head,
            lambda ids: F.embedding(ids, self.table),
            num_kv_heads=KV_HEADS,
            max_model_len=max_len,
            table_pages=pages_for(max_len),
            device=device,
            max_rows=MOST_ROWS,
        )
        # Block 0 is vLLM's null block: no sequence lies in it.
        self.blocks = (torch.randperm(199, generator=generator) + 1).tolist()
        self.retriever.allocate_cache(200)
        self.retriever.cache.keys.fill_(float("nan"))
        self.retriever.cache.fused.fill_(float("nan"))
        self.tokens, self.aux, self.rows = {}, {}, {}
        self.own: dict[str, int] = {}
        """Budgets of sequences that have one of their own, in tokens."""
        self.selection = new_selection(device)
        self.pages, self.lengths = self.selection.pages, self.selection.lengths

    def add(self, name, length, prefix_of=None, shared=0):
        """A sequence of ``length`` tokens; its first ``shared`` tokens, and their blocks, are
        another one's.
        """
        self.tokens[name] = torch.randint(0, VOCAB, (length,), device=self.device)
        self.aux[name] = [torch.randn(length, HIDDEN, device=self.device) for _ in range(3)]
        row = [self.blocks.pop() for _ in range(pages_for(length))]
        if prefix_of is not None:
            self.tokens[name][:shared] = self.tokens[prefix_of][:shared]
            for mine, theirs in zip(self.aux[name], self.aux[prefix_of]):
                mine[:shared] = theirs[:shared]
            row[: shared // PAGE_SIZE] = self.rows[prefix_of][: shared // PAGE_SIZE]
        self.rows[name] = row

    def step(self, *spans, prompts=()):
        """One engine step over (name, first, last) spans, decode rows first; returns the batch.

        A span of one token is a decode row, unless its name is among ``prompts``.
        """

        def decodes(span):
            return span[2] - span[1] == 1 and span[0] not in prompts

        spans = sorted(spans, key=decodes, reverse=True)
        width = max(len(row) for row in self.rows.values()) + 1
        table = torch.full((len(spans), width), 199, dtype=torch.int32)
        ids, positions, slots, starts, lens = [], [], [], [0], []
        for row, (name, first, last) in enumerate(spans):
            table[row, : len(self.rows[name])] = torch.tensor(self.rows[name])
            at = torch.arange(first, last)
            ids.append(self.tokens[name][first:last])
            positions.append(at)
            slots.append(
                torch.tensor(self.rows[name])[at // PAGE_SIZE] * PAGE_SIZE + at % PAGE_SIZE
            )
            starts.append(starts[-1] + last - first)
            lens.append(last)
        num_decodes = sum(map(decodes, spans))
        batch = StepBatch(
            token_ids=torch.cat(ids),
            positions=torch.cat(positions).to(self.device),
            slots=torch.cat(slots).to(self.device),
            query_starts=torch.tensor(starts, dtype=torch.int32, device=self.device),
            seq_lens=torch.tensor(lens, dtype=torch.int32, device=self.device),
            block_table=table.to(self.device),
            seq_lens_bound=lens,
            num_decodes=num_decodes,
            table_rows=num_decodes,
            num_tokens=starts[-1],
            budgets=self.budgets_of([name for name, _, _ in spans[:num_decodes]]),
        )
        self.retriever.select_eagerly(batch, self.selection)
        aux = [torch.cat([self.aux[n][i][a:b] for n, a, b in spans]) for i in range(3)]
        self.retriever.learn(batch, batch.num_decodes, aux)
        return batch

    def budgets_of(self, names):
        return tuple(self.own.get(name) for name in names) if self.own else ()

    def expected_keys(self, name):
        """Keys of the whole sequence by the definition: the pair (token p+1, aux p) at p+1, in some
        heads with aux p+1; zeros for aux before token 0.
        """
        fused = self.head.fuse(self.aux[name])
        previous = torch.cat([torch.zeros_like(fused[:1]), fused[:-1]])
        return self.head.keys(
            F.embedding(self.tokens[name], self.table),
            previous,
            torch.arange(len(fused), device=self.device),
            fused if self.head.spec.key_states == "own" else None,
        )

    def stored_keys(self, name, length):
        at = torch.arange(length)
        blocks = torch.tensor(self.rows[name])[at // PAGE_SIZE]
        return self.retriever.cache.keys_at((blocks * PAGE_SIZE + at % PAGE_SIZE).to(self.device))


kinds = pytest.mark.parametrize("kind", [None, "own-mlps"], ids=["eagle3", "own-mlps"])
"""EAGLE-3's shape, and a kind whose keys are made after the forward pass."""

CUTS = {
    "one pass": [(0, 150)],
    "chunks off the page grid": [(0, 37), (37, 90), (90, 150)],
    "chunks on the page grid": [(0, 48), (48, 96), (96, 150)],
    "token by token": [(i, i + 1) for i in range(150)],
    "prefill then decode": [(0, 60), *[(i, i + 1) for i in range(60, 150)]],
}


@pytest.mark.parametrize("key_dtype", ["model", "fp8"])
@pytest.mark.parametrize("cut", CUTS.values(), ids=CUTS.keys())
@kinds
def test_keys_do_not_depend_on_the_steps(cut, key_dtype, kind, device):
    world = World(device, kind=kind, head_key_dtype=key_dtype)
    world.add("a", 150)
    for first, last in cut:
        world.step(("a", first, last))
    expected, stored = world.expected_keys("a"), world.stored_keys("a", 150)
    if key_dtype == "model":
        assert_close("keys", expected, stored, 1e-5)
    else:
        # The last bit of a sum may decide where a key is rounded to.
        rounded = expected.to(torch.float8_e4m3fn).float()
        assert float((stored.float() != rounded).float().mean()) < 1e-3
        assert_close("keys", rounded, stored, 1e-2)


@pytest.mark.parametrize("kind", [None, *KINDS], ids=["eagle3", *KINDS])
def test_keys_do_not_depend_on_random_steps(kind, device, monkeypatch):
    """Chunks, decode rows and prompt rows of one token, in any order and company."""
    monkeypatch.setattr(cached_head, "PREFILL_CHUNK", 29)
    world, chance = World(device, kind=kind), random.Random(5)
    reached = {"a": 0, "b": 0, "c": 0}
    for name, length in (("a", 150), ("b", 90), ("c", 45)):
        world.add(name, length)
    while left := [name for name, at in reached.items() if at < len(world.tokens[name])]:
        spans = []
        for name in chance.sample(left, chance.randint(1, len(left))):
            longest = len(world.tokens[name]) - reached[name]
            count = min(longest, chance.choice([1, 1, 1, chance.randint(2, 40)]))
            spans.append((name, reached[name], reached[name] + count))
            reached[name] += count
        world.step(*spans, prompts=chance.sample(left, chance.randint(0, 1)))
    for name, tokens in world.tokens.items():
        assert_close(name, world.expected_keys(name), world.stored_keys(name, len(tokens)), 1e-5)


@pytest.mark.parametrize("end", [20, 31, 32, 33])
@kinds
def test_a_token_that_was_taken_back_leaves_no_trace_behind_the_start_of_its_page(
    end, kind, device
):
    """As a session goes on (engine/scheduler.py): the step behind the answer's end ran with a token
    that was discarded.
    """
    world = World(device, kind=kind)
    world.add("a", 80)
    world.step(("a", 0, end))
    token, aux = world.tokens["a"][end].clone(), [state[end].clone() for state in world.aux["a"]]
    world.tokens["a"][end] = (token + 1) % VOCAB
    for state in world.aux["a"]:
        state[end] = 3.0
    world.step(("a", end, end + 1))
    world.tokens["a"][end] = token
    for state, kept in zip(world.aux["a"], aux):
        state[end] = kept
    world.step(("a", end // PAGE_SIZE * PAGE_SIZE, 80))
    assert_close("keys", world.expected_keys("a"), world.stored_keys("a", 80), 1e-5)


@kinds
def test_prompt_chunks_of_the_head_itself(kind, device, monkeypatch):
    """The head makes long prompts' keys a chunk at a time; seams inside rows and between rows must
    not show.
    """
    monkeypatch.setattr(cached_head, "PREFILL_CHUNK", 29)
    world = World(device, kind=kind)
    world.add("a", 150)
    world.add("b", 61)
    world.add("c", 40)
    world.step(("c", 0, 39))
    world.step(("a", 0, 150), ("b", 0, 61), ("c", 39, 40))
    for name in "abc":
        assert_close(
            name, world.expected_keys(name), world.stored_keys(name, len(world.tokens[name])), 1e-5
        )


@kinds
def test_ragged_batches_mixed_steps_and_a_shared_prefix(kind, device):
    world = World(device, kind=kind)
    world.add("a", 120)
    world.step(("a", 0, 100))
    # b hits a's first 80 tokens and starts behind them; c is shorter than a page; a decodes
    # meanwhile.
    world.add("b", 130, prefix_of="a", shared=80)
    world.add("c", 7)
    world.step(("a", 100, 101), ("b", 80, 111), ("c", 0, 7))
    world.step(("a", 101, 102), ("b", 111, 130))
    # d hits all but one token of its prompt: its only row is a decode row at a page boundary.
    world.add("d", 81, prefix_of="a", shared=80)
    world.step(("d", 80, 81), ("a", 102, 103))
    for name, length in (("a", 103), ("b", 130), ("c", 7), ("d", 81)):
        assert_close(
            name, world.expected_keys(name)[:length], world.stored_keys(name, length), 1e-5
        )


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"confidence_threshold": 0.9, "fallback_budget": 96},
        {"confidence_threshold": 0.9, "own": {"a": 96, "b": WHOLE, "c": 48}},
        {"head_key_dtype": "fp8", "own": {"a": WHOLE, "c": 112}},
    ],
    ids=["plain", "fallback", "fallback-own-budgets", "8-bit-keys-own-budgets"],
)
@pytest.mark.parametrize("left_behind", [300.0, float("nan")], ids=["stale", "nan"])
@kinds
def test_the_page_table_is_the_naive_selection(settings, left_behind, kind, device):
    """Whatever earlier owners of the page have left where the newest tokens' keys belong."""
    settings = dict(settings)
    own = settings.pop("own", {})
    world = World(device, kind=kind, **settings)
    world.own = own
    lengths = {"a": 210, "b": 60, "c": 161}
    for name, length in lengths.items():
        world.add(name, length)
        world.step((name, 0, length - 1))
        block, at = world.rows[name][(length - 1) // PAGE_SIZE], (length - 1) % PAGE_SIZE
        world.retriever.cache.keys[block, :, at:] = left_behind
    batch = world.step(*[(name, length - 1, length) for name, length in lengths.items()])
    config = world.config
    for row, (name, length) in enumerate(lengths.items()):
        fused = world.head.fuse(world.aux[name])
        embeds = F.embedding(world.tokens[name][-1:], world.table)
        query = world.head.queries(embeds, fused[-2:-1], torch.tensor([length - 1], device=device))
        # A key from own states is made behind the selection.
        page_max, page_lse = score_row(
            query[0],
            world.retriever.cache.keys,
            batch.block_table[row],
            length,
            keyless=1 if world.head.spec.key_states == "own" else 0,
        )
        count = pages_for(length)
        tokens = own.get(name, config.budget)
        budget = replace(Budget.of(config), total=tokens // PAGE_SIZE)
        kept, mass = select_row(page_max.cpu(), page_lse.cpu(), count, KV_HEADS, budget)
        if config.confidence_threshold and mass.mean() < config.confidence_threshold:
            kept, _ = select_row(
                page_max.cpu(),
                page_lse.cpu(),
                count,
                KV_HEADS,
                replace(budget, total=(config.fallback_budget or 4 * tokens) // PAGE_SIZE),
            )
        for head in range(KV_HEADS):
            expected = torch.tensor(world.rows[name])[kept[head]] * KV_HEADS + head
            sequence = row * KV_HEADS + head
            assert world.pages[sequence, : kept.shape[1]].tolist() == expected.tolist()
            assert int(world.lengths[sequence]) == length - (count - kept.shape[1]) * PAGE_SIZE


def test_a_batch_larger_than_the_workspace_is_scored_in_parts(device):
    tables = []
    for capacity in (1000, 14):
        torch.manual_seed(1)
        world = World(device)
        scores = world.retriever.scores
        for name in ("page_max", "page_lse", "order"):
            object.__setattr__(scores, name, getattr(scores, name)[:, :capacity].contiguous())
        for name, length in (("a", 210), ("b", 200), ("c", 161)):
            world.add(name, length)
            world.step((name, 0, length - 1))
        world.step(("a", 209, 210), ("b", 199, 200), ("c", 160, 161))
        tables.append((world.pages[: 3 * KV_HEADS, :4].clone(), world.lengths.clone()))
    assert torch.equal(tables[0][0], tables[1][0]) and torch.equal(tables[0][1], tables[1][1])


@pytest.mark.parametrize("retriever", ["random", "recent", "dense"])
def test_baselines(retriever, device):
    world = World(device)
    world.retriever.configure(world.config.model_copy(update={"retriever": retriever}))
    world.add("a", 210)
    world.step(("a", 0, 209))
    world.step(("a", 209, 210))
    pages = [
        world.rows["a"].index(p // KV_HEADS)
        for p in world.pages[0, :14].tolist()
        if p // KV_HEADS in world.rows["a"]
    ]
    if retriever == "dense":
        assert int(world.lengths[0]) == 210 and pages == list(range(14))
    elif retriever == "recent":
        assert pages[:4] == [0, 11, 12, 13]
    else:
        assert pages[0] == 0 and pages[2:4] == [12, 13] and 0 < pages[1] < 12
    # Switching the retriever never costs the head its memory.
    assert_close("keys", world.expected_keys("a"), world.stored_keys("a", 210), 1e-5)


def test_stats_count_pages(device):
    world = World(device)
    world.add("a", 210)
    world.step(("a", 0, 209))
    world.step(("a", 209, 210))
    stats = world.retriever.stats(reset=True)
    assert (stats["pages_read"], stats["pages_total"]) == (4 * KV_HEADS, 14 * KV_HEADS)
    assert stats["decode_rows"] == 1 and 0 < stats["kept_mass_mean"] < 1
    assert world.retriever.stats()["pages_read"] == 0


def test_a_rule_that_cannot_be_made_leaves_the_old_settings_in_force(device, monkeypatch):
    """Named regression: the settings in force named the failed rule, and the one before ran."""
    retriever = World(device).retriever
    before, rule = retriever.config, retriever.rule

    def fail(self, settings, device):
        raise RuntimeError("no memory")

    monkeypatch.setattr(find_rule("mass"), "__init__", fail)
    with pytest.raises(RuntimeError, match="no memory"):
        retriever.configure(before.model_copy(update={"retriever": "mass"}))
    assert retriever.config is before and retriever.rule is rule


def test_settings_beyond_the_table_are_refused(device):
    world = World(device)
    world.retriever.table_pages = 8
    with pytest.raises(
        ConfigError, match="holds 128 tokens a head and these settings read up to 256"
    ):
        world.retriever.configure(world.config.model_copy(update={"budget": 256}))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_8_bit_keys_are_cut_off_at_what_they_hold_and_nan_stays(dtype, device):
    cache = HeadCache.allocate(2, 1, 4, 8, dtype, torch.float8_e4m3fn, device)
    cache.write_keys(
        torch.tensor([[[1e6, -1e6, 448.0, float("nan")]]], dtype=dtype, device=device),
        torch.tensor([17], device=device),
    )
    stored = cache.keys[1, 0, 1].float().tolist()
    assert stored[:3] == [448, -448, 448] and stored[3] != stored[3]
    assert (
        HeadCache.bytes_per_block(1, 4, 8, dtype, torch.float8_e4m3fn)
        == 64 + 8 * dtype.itemsize
        == 64 + cache.fused[0].nbytes
    )


def test_the_keys_dtype_is_the_models_where_there_are_no_8_bit_floats(monkeypatch):
    cpu, gpu = torch.device("cpu"), torch.device("cuda")
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "A100")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    assert (
        head_key_dtype("auto", torch.bfloat16, cpu)
        == head_key_dtype("model", torch.bfloat16, gpu)
        == torch.bfloat16
    )
    assert head_key_dtype("fp8", torch.bfloat16, cpu) == torch.float8_e4m3fn
    assert head_key_dtype("auto", torch.float16, gpu) == torch.float16
    with pytest.raises(
        ConfigError,
        match="head_key_dtype: found 'fp8', but A100 cannot multiply .* .compute capability 8.0, "
        "needed 9.0.; use model",
    ):
        head_key_dtype("fp8", torch.float16, gpu)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    assert head_key_dtype("auto", torch.float16, gpu) == torch.float8_e4m3fn


def test_warming_up_leaves_no_trace_but_in_block_0(device):
    world = World(device)
    world.add("a", 150)
    world.step(("a", 0, 149))
    before = world.retriever.cache.keys.clone()
    world.retriever.warm_up(world.selection)
    after = world.retriever.cache.keys
    assert torch.equal(before[1:].nan_to_num(7.0), after[1:].nan_to_num(7.0))
    assert world.retriever.stats()["decode_rows"] == 0
    # It chose: the row was a page longer than the budget.
    assert int(world.lengths[0]) == world.config.budget


@pytest.mark.parametrize("max_len", [9, 77])
def test_warming_up_stays_within_a_context_that_ends_inside_a_page(device, max_len):
    """Named regression: the head was asked about the last page's end, and an engine with an odd
    --max-model-len within the budget did not start.
    """
    world = World(device, max_len=max_len, budget=128)
    world.retriever.warm_up(world.selection)
    assert int(world.lengths[0]) == max_len


def test_an_engine_may_bind_twice_the_first_time_in_inference_mode(device):
    """Named regression: vLLM's graph profiling binds inside inference mode, the engine proper
    outside, and the CUDA engine did not start.
    """
    world = World(device)
    with torch.inference_mode():
        world.retriever.allocate_cache(50)
        world.retriever.warm_up(world.selection)
    world.retriever.allocate_cache(200)
    world.retriever.warm_up(world.selection)
    assert world.retriever.stats()["steps"] == 0
