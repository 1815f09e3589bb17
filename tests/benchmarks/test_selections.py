"""Selections of real text in hot buffers: followed in transformers, counted by an engine."""

import json
import math

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from benchmarks import forcing
from benchmarks.__main__ import app
from benchmarks.marks.heads import load_head
from benchmarks.marks.inputs import load_model, make_prompts
from benchmarks.selections.buffers import DECILES, Follower, Policy, StepCounts
from benchmarks.selections.command import ATTENTION
from benchmarks.selections.emulated import Chooser, measure
from benchmarks.selections.engine import Load, follow
from benchmarks.selections.scored_steps import Course, run_steps
from benchmarks.selections.tally import figures, repeated
from specontext_vllm.config import PAGE_SIZE
from specontext_vllm.retrieval.reference import chosen_pages
from specontext_vllm.triton_kernels.counters import MISSED, SELECTED
from tests.distillation.tiny_models import make_config, make_model
from tests.engine.conftest import DEMO_MODEL, engine

TEXTS, HEADS, MAX_PAGES = 2, 3, 24


class NaiveBuffer:
    """A list of pages, the one that was read longest ago first."""

    def __init__(self, slots):
        self.slots, self.pages = slots, []

    def read(self, pages):
        """The pages that were not there."""
        missed = [page for page in pages if page not in self.pages]
        self.pages = [page for page in self.pages if page not in pages] + list(pages)
        self.pages = self.pages[-self.slots :]
        return missed


@pytest.mark.parametrize("stickiness", [0.0, 3.0])
def test_a_follower_selects_and_misses_as_lists_of_pages_do(stickiness):
    """One page is chosen besides sinks and recents, so that those that go are of different age, and
    their slots say nothing.
    """
    policy = Policy(112, stickiness, 2)
    follower = Follower(policy, TEXTS, HEADS, MAX_PAGES, torch.device("cpu"))
    naive = [[NaiveBuffer(policy.hot_pages) for _ in range(HEADS)] for _ in range(TEXTS)]
    generator = torch.Generator().manual_seed(0)
    scores = torch.randn(TEXTS, HEADS, MAX_PAGES, generator=generator)
    last = None
    for position in range(290, 340):
        scores = scores + 0.5 * torch.randn(scores.shape, generator=generator)
        count = position // PAGE_SIZE + 1
        chosen, counts = follower.follow(scores, position)
        selected, missed, kept = [0] * DECILES, [0] * DECILES, 0
        for text in range(TEXTS):
            for head in range(HEADS):
                buffer = naive[text][head]
                ranked = sorted(
                    range(1, count - 5),
                    key=lambda page: (
                        scores[text, head, page].item()
                        + math.log1p(stickiness) * (page in buffer.pages)
                    ),
                )
                wanted = {0, *range(count - 5, count), ranked[-1]}
                assert set(chosen[text, head].nonzero().flatten().tolist()) == wanted
                for page in wanted:
                    selected[page * DECILES // count] += 1
                for page in buffer.read(sorted(wanted)):
                    begun = page == count - 1 and position % PAGE_SIZE == 0
                    missed[page * DECILES // count] += not begun
                kept += len(wanted & (last[text, head] if last else wanted))
        assert (counts.selected.tolist(), counts.missed.tolist()) == (selected, missed)
        assert int(counts.kept) == kept
        last = {
            (text, head): set(chosen[text, head].nonzero().flatten().tolist())
            for text in range(TEXTS)
            for head in range(HEADS)
        }
    # The same as the engine's counters.
    assert int(follower.hot.counts[SELECTED]) == 50 * TEXTS * HEADS * 7


def test_counters_are_the_engines():
    policy = Policy(160, 0, 1)
    follower = Follower(policy, TEXTS, HEADS, MAX_PAGES, torch.device("cpu"))
    generator = torch.Generator().manual_seed(1)
    missed = selected = 0
    for position in range(200, 240):
        scores = torch.randn(TEXTS, HEADS, MAX_PAGES, generator=generator)
        _, counts = follower.follow(scores, position)
        missed, selected = missed + counts.missed.sum(), selected + counts.selected.sum()
    assert (int(follower.hot.counts[MISSED]), int(follower.hot.counts[SELECTED])) == (
        int(missed),
        int(selected),
    )


def test_figures_leave_the_first_step_out():
    def step(missed, kept, free_kept):
        places = torch.zeros(2, DECILES, dtype=torch.int64)
        places[0, 0], places[0, 9], places[1, 9] = 6, 2, missed
        return StepCounts(*places, *(torch.tensor(n) for n in (kept, 4, free_kept)))

    found = figures([step(2, 0, 0), step(1, 6, 2), step(0, 8, 4), step(2, 4, 0)])
    assert found["shares"] == [0.125, 0, 0.25] == found["by_stretch"]
    assert found["share"] == pytest.approx(0.125) and found["p50"] == 0.125
    assert (found["overlap"], found["free_overlap"]) == (18 / 24, 6 / 12)
    assert found["missed_by_place"] == [0.0] * 9 + [0.5]
    assert found["selected_by_place"] == [0.75, *[0.0] * 8, 0.25]


def test_repeated_runs_of_tokens():
    circle = np.tile(np.arange(4), 5)[None]
    assert repeated(np.arange(20)[None]) == 0
    assert repeated(circle) == pytest.approx(1 - 4 / 13)


def test_generation_is_the_models_own():
    model = make_model(make_config("llama")).eval().requires_grad_(False)
    ids = torch.randint(0, 97, (2, 60), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        model.set_attn_implementation("eager")
        options = {"max_new_tokens": 13, "do_sample": False, "use_cache": True}
        wanted = model.generate(ids[:, :40], pad_token_id=0, eos_token_id=None, **options)
    seen = []
    steps = run_steps(model, None, Course(ids, 40, forced=False), lambda *a: seen.append(a))
    found = torch.stack(list(steps), 1)
    assert found[:, :12].tolist() == wanted[:, 41:].tolist()
    assert [position for _, position in seen] == list(range(40, 60))
    # Of each page the largest weight of any layer and query head of the group.
    with torch.no_grad():
        layers = model(wanted[:, :45], output_attentions=True).attentions
    weights = torch.stack(layers)[:, :, :, -1].amax(0).unflatten(1, (2, 2)).amax(2)
    largest = torch.nn.functional.pad(weights, (0, 3)).unflatten(-1, (3, PAGE_SIZE)).amax(-1)
    torch.testing.assert_close(seen[4][0][..., :3].exp(), largest, rtol=1e-3, atol=1e-6)


def test_what_the_model_reads_is_what_was_chosen(texts):
    """A head's run over seven pages of twenty gives other tokens than one over all of them."""
    teacher = load_model(DEMO_MODEL, "float32")
    tokens = make_prompts(DEMO_MODEL, [texts], ["text"], 320, 16, 1, 0)["text"]
    head = load_head(DEMO_MODEL / "retrieval_head", teacher, 320)
    budget = Policy(112, 0, 1).pages

    def choose(scores, position):
        return chosen_pages(scores, position // PAGE_SIZE + 1, budget)

    course = Course(tokens, 304, forced=True)
    dense = [int(token) for token in run_steps(teacher, None, course, lambda *_: None)]
    forced = tokens[0, 305:].tolist()
    assert dense[:-1] == forced
    free = Course(tokens, 304, forced=False)
    runs = {
        name: [int(token) for token in run_steps(teacher, head, free, chooser)]
        for name, chooser in {"sparse": choose, "dense": lambda *_: None}.items()
    }
    assert runs["sparse"] != runs["dense"]


@pytest.mark.parametrize("forced", [True, False], ids=["text", "generation"])
def test_the_engine_misses_what_is_missed_in_transformers(forced, demo_engine):
    llm, load, tokens = demo_engine
    teacher = load_model(DEMO_MODEL, "float32")
    chooser = Chooser("h", load_head(DEMO_MODEL / "retrieval_head", teacher, load.context), True)
    start = load.context - 40
    for policy, found in measure(
        teacher, chooser, load.policies, Course(tokens.to(teacher.device), start, forced)
    ):
        counted = follow(llm, policy, (tokens.tolist(), start, forced), load.on_gpu)
        assert counted["first_steps"] == 1
        shares = [round(missed / selected, 4) for missed, selected in counted["steps"]]
        if load.on_gpu:
            # Half precision chooses otherwise here and there.
            assert np.mean(shares) == pytest.approx(found["share"], abs=0.02)
        else:
            # The last token is emitted and not read any more.
            assert shares == found["shares"][:-1]
        assert len(shares) == 38 and sum(shares) > 0


@pytest.fixture(scope="module")
def demo_engine(texts):
    policies = [Policy(112, 0, 1), Policy(160, 1, 1.5)]
    on_gpu = torch.cuda.is_available()
    head = str(DEMO_MODEL / "retrieval_head")
    load = Load(str(DEMO_MODEL), head, "float32", 1, 640, policies, on_gpu)
    tokens = make_prompts(DEMO_MODEL, [texts], ["text"], load.context, 40, 1, 0)["text"]
    arguments = {**load.arguments(), **forcing.engine_arguments(on_gpu)}
    with engine(**arguments) as llm:
        yield llm, load, tokens


def test_the_command(texts, tmp_path):
    arguments = ["--model", str(DEMO_MODEL), "--texts", str(texts), "--out", str(tmp_path)]
    arguments += ["--context", "256", "--steps", "16", "--prompts", "1", "--budgets", "112,128"]
    arguments += ["--stickiness", "0,1", "--slots", "1", "--no-engine"]
    done = CliRunner().invoke(app, ["selections", *arguments])
    assert done.exit_code == 0, done.output
    result = json.loads(next(tmp_path.glob("selections-demo-*.json")).read_text())
    rows = result["rows"]
    assert {(row["kind"], row["by"]) for row in rows} == {
        (kind, by) for kind in ("text", "generation") for by in (ATTENTION, "own")
    }
    assert len(rows) == 4 * 2 * 2
    assert sum("place_0" in row for row in rows) == 4 * 2
    for row in rows:
        name = f"{row['kind']}, {row['by']}, {row['budget']}, stickiness {row['stickiness']:g}"
        shares = result["details"]["steady_shares"][f"{name}, 1x slots"]
        assert len(shares) == 15 and np.mean(shares) == pytest.approx(row["share"], abs=1e-4)
        assert ("repeated" in row) == (row["kind"] == "generation")
    assert next(tmp_path.glob("*.png")).stat().st_size > 1000


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--slots", "0.5"], "--slots: found 0.5"),
        (["--slots", "8", "--budgets", "512"], "--slots: buffers of 4096 tokens leave nothing"),
        (["--budgets", "64"], "budget: found 64"),
        (["--kinds", "prose"], "--kinds: found 'prose'"),
        (["--serving", "best"], "--serving: found 'best'"),
    ],
    ids=["small buffers", "large buffers", "budget", "kinds", "serving"],
)
def test_a_wrong_option_ends_with_its_name(arguments, told, texts, tmp_path):
    given = ["--model", str(DEMO_MODEL), "--texts", str(texts), "--out", str(tmp_path)]
    given += ["--context", "1024", "--steps", "16"]
    done = CliRunner().invoke(app, ["selections", *given, *arguments])
    assert done.exit_code == 2 and told in done.stderr
