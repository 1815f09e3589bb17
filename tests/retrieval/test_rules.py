"""Rules: found by their files, cheap to ask for their needs, and scoring as they say."""

from __future__ import annotations

import dataclasses
import itertools
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from specontext_vllm.config import PAGE_SIZE, SpeContextConfig, pages_for
from specontext_vllm.residency.hot_buffers import HotBuffers
from specontext_vllm.retrieval import rules
from specontext_vllm.retrieval.reference import Budget
from specontext_vllm.retrieval.rules import Rule, find_rule, listed_rules, make_rule, rule_names
from specontext_vllm.retrieval.scoring import ScoreInputs, row_starts
from specontext_vllm.retrieval.selection import select_rows
from specontext_vllm.step_data import PageScores, Selection, Stickiness
from specontext_vllm.tier_data import DecodeRows
from specontext_vllm.triton_kernels.counters import COUNTERS
from tests.paging import of_each_row, paged_rows
from tests.selections import listed


def test_every_file_is_a_rule_and_a_value_of_the_setting():
    files = {f.stem for f in Path(rules.__file__).parent.glob("*.py")} - {"__init__"}
    assert set(rule_names()) == files
    assert set(listed_rules()) == files - {"driven"}
    for name in rule_names():
        assert SpeContextConfig(retriever=name).rule is find_rule(name)
        assert find_rule(name).__doc__ and sys.modules[find_rule(name).__module__].__doc__


def test_settings_and_needs_are_known_without_torch():
    code = (
        "import sys; from specontext_vllm.config import SpeContextConfig as C\n"
        "from specontext_vllm.retrieval.rules import rule_names\n"
        "for name in rule_names(): C.from_settings({'retriever': name}).table_pages(4096)\n"
        "assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_file_that_defines_no_rule_or_two_is_told(monkeypatch):
    monkeypatch.setattr(rules, "rule_names", lambda: ("broken",))
    module = type(sys)("specontext_vllm.retrieval.rules.broken")
    module.__file__ = "broken.py"
    monkeypatch.setitem(sys.modules, module.__name__, module)
    with pytest.raises(TypeError, match="broken.py: defines 0 rules"):
        find_rule.__wrapped__("broken")
    for name in ("One", "Two"):
        setattr(module, name, type(name, (Rule,), {"__module__": module.__name__}))
    with pytest.raises(TypeError, match="defines 2 rules"):
        find_rule.__wrapped__("broken")
    with pytest.raises(KeyError):
        find_rule("magic")


def test_rules_that_score_per_layer_have_no_host_pool_and_pages_state_is_theirs_alone():
    for name in rule_names():
        rule = find_rule(name)
        assert not (rule.needs_head and rule.per_layer)
        assert rule.per_layer or not rule.page_vectors
        if rule.per_layer:
            with pytest.raises(ValueError, match="host_kv_gib"):
                SpeContextConfig(retriever=name, host_kv_gib=1)


class World:
    """Some rows, and what a rule chooses for them."""

    def __init__(self, name, device, settings=None, lengths=(401, 30, 700), heads=2):
        self.lengths, self.heads, self.device = list(lengths), heads, device
        self.rows = paged_rows(self.lengths, heads, 32, torch.float32, device, seed=3)
        self.query = torch.randn(
            len(lengths), 2 * heads, 32, generator=torch.Generator().manual_seed(4)
        ).to(device)
        self.counts = [pages_for(n) for n in lengths]
        self.scores = PageScores.allocate(2 * heads, heads, sum(self.counts), device)
        self.rule = make_rule(name, settings or {}, device)
        self.budget = Budget(8, 1, 2)
        self.row_range = range(len(lengths))
        self.starts = row_starts(self.rows.seq_lens, self.row_range)

    @property
    def totals(self):
        return of_each_row(self.budget.total, len(self.lengths), self.device)

    def inputs(self):
        return ScoreInputs(
            self.rows.block_table,
            self.rows.seq_lens,
            self.starts,
            self.row_range,
            max_pages=max(self.counts),
            min_pages=self.totals,
            queries=self.query,
            keys=self.rows.cache,
            page_vectors=self.page_vectors(),
        )

    def page_vectors(self):
        """What the rule learns of all tokens; None if it keeps no vectors."""
        if not self.rule.page_vectors:
            return None
        cache = self.rows.cache
        vectors = cache.new_zeros(len(cache), self.heads, self.rule.page_vectors, cache.shape[-1])
        kv_cache = torch.cat([cache, cache], -1)
        for row, tokens in enumerate(self.lengths):
            token = torch.arange(tokens, device=self.device)
            block = self.rows.block_table[row, token // PAGE_SIZE].long()
            self.rule.learn(kv_cache, block * PAGE_SIZE + token % PAGE_SIZE, vectors)
        return vectors

    def score(self):
        """Page maxima and sums by row."""
        inputs = self.inputs()
        self.scored = self.rule.score(inputs, self.scores)
        page_max, page_lse = self.scored.page_max, self.scored.page_lse
        for row, span in inputs.scored_rows():
            finite = page_max[:, span].isfinite() | ~page_lse[:, span].isfinite()
            assert finite.all(), f"row {row}: page_max is not finite where page_lse is"
            worst = page_max[:, span].isneginf() | ~page_lse[:, span].isneginf()
            assert worst.all(), f"row {row}: page_max is not -inf where page_lse is"
        return [part.split(self.counts, -1) for part in (page_max, page_lse)]

    def select(self, stickiness=None):
        """What selection makes of the scores; pages are counted from their row's start."""
        rows, width = len(self.lengths), self.budget.total
        selection = Selection(
            torch.full((rows * self.heads, width), -1, dtype=torch.int32, device=self.device),
            torch.zeros(rows * self.heads, dtype=torch.int32, device=self.device),
            torch.zeros(rows, self.heads, device=self.device),
        )
        positions = torch.arange(max(self.counts), dtype=torch.int32, device=self.device).repeat(
            rows, 1
        )
        select_rows(
            self.scored,
            self.rows.seq_lens,
            self.starts,
            positions,
            selection,
            self.totals,
            sinks=self.budget.sinks,
            recents=self.budget.recents,
            rows=self.row_range,
            stickiness=stickiness,
        )
        return selection

    def choose(self):
        """Chosen positions ``{(row, head): [...]}``."""
        rows, width = len(self.lengths), self.budget.total
        pages = self.select().pages.view(rows, self.heads, width) // self.heads
        return {
            (row, head): pages[row, head, : min(self.counts[row], width)].tolist()
            for row in range(rows)
            for head in range(self.heads)
        }

    def weights(self, row):
        """Softmax of a row's tokens without the first, ``[H, G, tokens]``."""
        keys, query = self.rows.dense[row], self.query[row].view(self.heads, -1, 32).cpu()
        logits = torch.einsum("hgd,htd->hgt", query, keys.cpu()) / 32**0.5
        logits[..., 0] = float("-inf")
        return logits.softmax(-1)


def check_choice(world, value_of):
    """Sinks, recents and the largest of ``value_of(weights of a page [H, G, tokens]) -> [H]``."""
    chosen = world.choose()
    for row, count in enumerate(world.counts):
        if count <= world.budget.total:
            assert chosen[row, 0] == chosen[row, 1] == list(range(count))
            continue
        values = torch.stack([value_of(p) for p in world.weights(row).split(PAGE_SIZE, -1)], -1)
        values[:, 0] = values[:, -2:] = 2.0
        for head in range(world.heads):
            wanted = values[head].topk(world.budget.total).indices.sort().values.tolist()
            assert chosen[row, head] == wanted


@pytest.mark.parametrize("name", [n for n in rule_names() if not find_rule(n).reads_everything])
def test_every_rule_scores_a_newest_page_of_one_token(name, device):
    world = World(name, device)
    assert world.lengths[0] % PAGE_SIZE == 1
    page_max, _ = world.score()
    assert page_max[0].isfinite().all()


def test_a_page_that_counts_without_a_finite_score_is_found(device):
    class Spread(Rule):
        """The spread of the page's logits, which one token alone does not have."""

        def score(self, inputs, scores):
            inputs.score_keys(scores)
            for row, span in inputs.scored_rows():
                scores.page_max[:, span] = inputs.token_logits(row).std(-1)
            return scores

    world = World("dlm", device)
    world.rule = Spread({}, device)
    with pytest.raises(AssertionError, match="row 0: page_max is not finite where page_lse is"):
        world.score()


def test_token_logits_are_those_of_attention(device):
    world = World("dlm", device)
    for row, tokens in enumerate(world.lengths):
        logits = world.inputs().token_logits(row)
        assert logits.shape == (2 * world.heads, world.counts[row], PAGE_SIZE)
        logits = logits.flatten(1).cpu()
        assert logits[:, tokens:].isneginf().all() and logits[:, 0].isneginf().all()
        weights = logits[:, :tokens].softmax(-1)
        torch.testing.assert_close(weights, world.weights(row).flatten(0, 1))


def test_dlm_takes_the_pages_with_the_heaviest_token(device):
    world = World("dlm", device)
    world.score()
    check_choice(world, lambda page: page.amax((1, 2)))


def test_mass_takes_the_pages_with_the_most_attention(device):
    world = World("mass", device)
    world.score()
    check_choice(world, lambda page: page.sum(2).amax(1))


def test_recent_takes_the_newest_pages(device):
    world = World("recent", device)
    world.score()
    assert world.choose()[2, 1] == [0, *range(44 - 7, 44)]


def test_random_differs_from_step_to_step_and_not_from_run_to_run(device):
    def two_steps():
        world = World("random", device)
        return [(world.score(), world.choose())[1] for _ in range(2)]

    first, second = two_steps()
    assert first != second and two_steps() == [first, second]


@pytest.mark.parametrize("shares", [[0.0], [0.25], [1.0], [0.5, 0.1]], ids=str)
def test_driven_scores_change_for_the_share_asked_for_and_independently(shares, device):
    world = World("driven", device, {"shares": shares}, lengths=(6000, 3000), heads=2)
    seen = [torch.cat(world.score()[0], -1) for _ in range(6)]  # Copies: the workspace is reused.
    changed = [one != other for one, other in itertools.pairwise(seen)]
    for step, (now, then) in enumerate(itertools.pairwise(changed)):
        share, following = (shares[(step + more) % len(shares)] for more in (1, 2))
        assert_share(now[::2], share)
        assert_share(then[::2][now[::2]], following)  # Of those that have just changed.
    values = seen[0]
    assert values.min() >= 0 and values.max() <= 10 and values.std() > 2
    assert torch.equal(values[0], values[1]), "query heads of a group have the same scores"


def assert_share(events, share):
    """As many of the independent events are true as the share, within four standard errors."""
    if len(events):
        error = (share * (1 - share) / events.numel()) ** 0.5
        assert events.float().mean().item() == pytest.approx(share, abs=4 * error + 1e-6)


class Independent(Rule):
    """What `driven` is a hash of: scores drawn by a generator, a share of them anew in each step.
    Of rows in which nothing else has changed.
    """

    def __init__(self, settings, device):
        super().__init__(settings, device)
        self.generator = torch.Generator().manual_seed(5)
        self.values = None

    def score(self, inputs, scores):
        shape = scores.order.shape
        values = torch.rand(shape, generator=self.generator)
        if self.values is not None:
            anew = torch.rand(shape, generator=self.generator) < self.settings["share"]
            values = values.where(anew, self.values)
        self.values = values
        scores.page_max[:] = 10 * values.repeat_interleave(2, 0)
        return dataclasses.replace(scores, page_lse=scores.page_max)


@pytest.mark.parametrize("stickiness", [0.0, 1.0], ids=["not sticky", "sticky"])
def test_driven_selections_miss_as_often_as_independent_draws(stickiness):
    share, steps, settled, lanes, heads, slots = 0.1, 80, 20, 4, 2, 32

    device = torch.device("cpu")

    def missed_share(rule):
        """Of the selected pages, by (lane, head), when the hot buffers have filled."""
        world = World("driven", device, lengths=[64 * PAGE_SIZE] * lanes, heads=heads)
        world.rule, world.budget = rule, Budget(16, 1, 2)
        hot = HotBuffers(
            lanes,
            heads,
            slots,
            64,
            max_rows=lanes,
            table_pages=16,
            num_layers=1,
            resident=torch.zeros(1, dtype=torch.int32),
            counts=torch.zeros(COUNTERS, dtype=torch.int64),
            device=device,
        )
        hot.state.capacity.fill_(slots)
        rows = DecodeRows(
            torch.arange(lanes, dtype=torch.int32), world.rows.seq_lens, world.rows.block_table
        )
        margin = math.log1p(stickiness)
        sticky = Stickiness(rows.lanes, hot.state.slot_of, margin) if margin else None
        missed = torch.zeros(lanes, heads)
        for step in range(steps):
            world.score()
            hot.resolve(world.select(sticky), rows, lanes)
            for _, target in listed(hot.misses) if step >= settled else ():
                missed[target // heads // slots, target % heads] += 1
        return missed / (world.budget.total * (steps - settled))

    driven = missed_share(make_rule("driven", {"shares": [share]}, device))
    independent = missed_share(Independent({"share": share}, device))
    error = ((driven.var() + independent.var()) / (lanes * heads)) ** 0.5
    assert error < 0.1 * independent.mean()
    assert driven.mean().item() == pytest.approx(independent.mean().item(), abs=4 * error.item())


def test_driven_scores_belong_to_the_page_and_not_to_its_place_in_the_batch(device):
    one, other = (World("driven", device, lengths=(400, 700)) for _ in range(2))
    other.rows = dataclasses.replace(
        other.rows,
        block_table=other.rows.block_table.flip(0).contiguous(),
        seq_lens=other.rows.seq_lens.flip(0).contiguous(),
    )
    other.counts = other.counts[::-1]
    other.starts = row_starts(other.rows.seq_lens, other.row_range)
    for part, swapped in zip(one.score()[0], reversed(other.score()[0]), strict=True):
        assert torch.equal(part, swapped)
