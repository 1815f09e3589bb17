"""The ledger under random schedules: no frame owned twice, none lost, and every page that is needed
can be found.
"""

import numpy as np
import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from specontext_vllm.residency.ledger import COOLDOWN_STEPS, Ledger
from specontext_vllm.step_data import ScheduledStep, StartedRequest

LAYERS, MIRRORED, HOT, LANES, PAGES = 5, 3, 4, 4, 60
FRAMES = (LAYERS - MIRRORED) * PAGES + MIRRORED * HOT * LANES


def follow(ledger, hot_limit=None, **step):
    return ledger.follow(
        ScheduledStep(**{name: list(value) for name, value in step.items()}), hot_limit
    )


class Schedule(RuleBasedStateMachine):
    """A scheduler with prefix caching drives the ledger; a model of what every place holds follows
    its changes.

    ``content[place]`` is the (layer, page, version) whose KV a frame or a host place holds. A page
    gets a new version when it is handed out anew, and when a token is added to it.
    """

    return_pages = PAGES
    """Layers come back at once; the schedules below differ."""
    prefix_caching = True

    def __init__(self):
        super().__init__()
        self.ledger = Ledger(
            num_layers=LAYERS,
            num_pages=PAGES,
            frames=np.arange(10, 10 + FRAMES),
            host_layers=MIRRORED,
            hot_pages=HOT,
            max_requests=LANES,
            keep_unreferenced=self.prefix_caching,
            return_pages=self.return_pages,
        )
        self.version = np.zeros(PAGES, int)
        self.host = {}
        self.frame = {}
        self.running: dict[str, list[int]] = {}
        self.cached: list[list[int]] = []
        self.free = list(range(PAGES))
        self.counter = self.wrote = 0

    def step(
        self, released=(), started=(), grown=(), decode_all=True, hot_limit=None, resumed_in=()
    ):
        before = self.ledger.resident
        decoding = (
            [name for name in self.ledger.requests.lanes if name not in released]
            + [r.name for r in started]
            if decode_all
            else []
        )
        # Each decode row adds a token to its last page.
        tails = {name: len(pages) - 1 for name, pages in self.running.items() if name in decoding}
        tails |= {name: len(self.running[name]) - len(pages) for name, pages in grown}
        written = [
            (name, first) for name, first in tails.items() if name not in [r.name for r in started]
        ] + list(resumed_in)
        changes = follow(
            self.ledger,
            released=released,
            started=started,
            grown=grown,
            decoding=decoding,
            hot_limit=hot_limit,
            written=written,
        )
        for frames in changes.given_up:
            for frame in frames:
                self.frame.pop(int(frame), None)
        for layer, pages in changes.loads:
            for page in pages:
                self.frame[int(self.ledger.frames.frame_table[layer, page])] = (
                    layer,
                    page,
                    self.host.get((layer, page)),
                )
        fresh = {page for r in started for page in r.pages[r.computed :]} | {
            page for name, first in written for page in self.running[name][first:]
        }
        if changes.returning is not None:
            layer, pages = changes.returning
            assert (
                layer == self.ledger.resident < LAYERS
                and 0 < len(pages) <= self.return_pages + self.wrote
            )
            assert not fresh & set(pages.tolist()), "a page is copied while it is written"
            for page in pages:
                self.frame[int(self.ledger.frames.frame_table[layer, page])] = (
                    layer,
                    page,
                    self.host.get((layer, page)),
                )
        self.wrote = len(fresh)
        assert all(before > layer >= self.ledger.resident for layer in changes.offloaded)
        # The forward pass writes every new page, and mirrors it.
        for page in fresh:
            self.version[page] += 1
            for layer in range(LAYERS):
                if layer >= LAYERS - MIRRORED:
                    self.host[(layer, page)] = self.version[page]
                if layer < self.ledger.resident:
                    self.frame[int(self.ledger.frames.frame_table[layer, page])] = (
                        layer,
                        page,
                        self.version[page],
                    )

    @precondition(lambda self: len(self.running) < LANES and len(self.free) >= 1)
    @rule(count=st.integers(1, 20), reuse=st.booleans())
    def start(self, count, reuse):
        hit = []
        if reuse and self.cached:
            hit = [p for p in self.cached[-1]]
            self.free = [p for p in self.free if p not in hit]
        fresh, self.free = self.free[:count], self.free[count:]
        self.cached = [c for c in self.cached if not set(c) & set(fresh)]
        if not hit + fresh:
            return
        name = f"r{self.counter}"
        self.counter += 1
        self.running[name] = hit + fresh
        self.step(started=[StartedRequest(name, hit + fresh, len(hit))])

    @precondition(lambda self: self.running and self.free)
    @rule(pick=st.integers(0, 99), count=st.integers(1, 3))
    def grow(self, pick, count):
        name = sorted(self.running)[pick % len(self.running)]
        fresh, self.free = self.free[:count], self.free[count:]
        self.cached = [c for c in self.cached if not set(c) & set(fresh)]
        self.running[name] += fresh
        self.step(grown=[(name, fresh)])

    @precondition(lambda self: self.running)
    @rule(pick=st.integers(0, 99))
    def finish(self, pick):
        name = sorted(self.running)[pick % len(self.running)]
        pages = self.running.pop(name)
        held = {p for other in self.running.values() for p in other}
        self.free += [p for p in pages if p not in held]
        if self.prefix_caching:
            self.cached.append(pages)
        self.step(released=[name, "unknown"])

    @precondition(lambda self: self.running and self.free)
    @rule(pick=st.integers(0, 99), count=st.integers(0, 3))
    def go_on(self, pick, count):
        """A session's next chunk of input: the request starts anew within its last page, and may
        get more.
        """
        name = sorted(self.running)[pick % len(self.running)]
        computed = len(self.running[name])
        fresh, self.free = self.free[:count], self.free[count:]
        self.cached = [c for c in self.cached if not set(c) & set(fresh)]
        self.running[name] += fresh
        self.step(
            started=[StartedRequest(name, list(self.running[name]), computed)],
            resumed_in=[(name, computed - 1)],
        )

    @rule(slots=st.integers(1, HOT))
    def resize(self, slots):
        self.step(hot_limit=slots)

    @rule(steps=st.integers(1, 80))
    def idle(self, steps):
        for _ in range(steps):
            self.step()

    @invariant()
    def no_frame_twice_and_none_lost(self):
        ledger = self.ledger
        held = np.concatenate(
            [
                ledger.frames.frame_table[ledger.frames.frame_table >= 0],
                ledger.frames.hot_table[ledger.frames.hot_table >= 0],
            ]
        )
        everything = np.concatenate([held, ledger.frames.free])
        assert sorted(everything) == list(range(10, 10 + FRAMES))
        assert ledger.audit()["requests"] == len(ledger.requests.lanes)

    @invariant()
    def pages_are_where_the_tables_say(self):
        ledger = self.ledger
        assert (
            ledger.frames.frame_table[ledger.framed :] < 0
        ).all() and ledger.resident <= ledger.framed <= ledger.resident + 1
        assert (ledger.frames.hot_table[: ledger.resident] < 0).all()
        for pages in self.running.values():
            for page in pages:
                for layer in range(ledger.resident):
                    assert self.frame[int(ledger.frames.frame_table[layer, page])] == (
                        layer,
                        page,
                        self.version[page],
                    )
                for layer in range(ledger.resident, LAYERS):
                    assert self.host[(layer, page)] == self.version[page]
        for name, lane in ledger.requests.lanes.items():
            slots = min(ledger.hot_limit, len(self.running[name])) if ledger.capacity[lane] else 0
            assert slots <= ledger.capacity[lane] <= ledger.hot_limit
            assert (ledger.frames.hot_table[:, lane, ledger.capacity[lane] :] < 0).all()
            assert (
                ledger.frames.hot_table[ledger.resident :, lane, : ledger.capacity[lane]] >= 0
            ).all()

    @invariant()
    def cached_pages_survive(self):
        """What a prefix hit may ask for is still somewhere."""
        held = {p for pages in self.running.values() for p in pages}
        for pages in self.cached:
            for page in set(pages) - held:
                for layer in range(LAYERS - MIRRORED):
                    assert self.frame[int(self.ledger.frames.frame_table[layer, page])] == (
                        layer,
                        page,
                        self.version[page],
                    )


Schedule.TestCase.settings = settings(
    max_examples=40,
    stateful_step_count=50,
    deadline=None,
    derandomize=True,
    suppress_health_check=list(HealthCheck),
)
test_schedule = Schedule.TestCase


class SlowSchedule(Schedule):
    """Layers come back three pages a step."""

    return_pages = 3


SlowSchedule.TestCase.settings = Schedule.TestCase.settings
test_schedule_with_slow_returns = SlowSchedule.TestCase


class UncachedSchedule(Schedule):
    """Without prefix caching pages nobody refers to lose their content."""

    prefix_caching = False


UncachedSchedule.TestCase.settings = settings(Schedule.TestCase.settings, max_examples=20)
test_schedule_without_prefix_caching = UncachedSchedule.TestCase


def make_ledger(**changes):
    arguments = dict(
        num_layers=4,
        num_pages=40,
        frames=np.arange(96),
        host_layers=3,
        hot_pages=4,
        max_requests=2,
        keep_unreferenced=True,
        return_pages=40,
    )
    return Ledger(**{**arguments, **changes})


def test_offloads_last_layer_first_and_returns_it_when_pressure_falls():
    ledger = make_ledger(frames=np.arange(120))
    follow(ledger, started=[StartedRequest("a", list(range(20)), 0)])
    assert ledger.resident == 4
    changes = follow(ledger, started=[StartedRequest("b", list(range(20, 40)), 0)], decoding=["a"])
    assert ledger.resident == 2 and changes.given_up
    follow(ledger, released=["b"])
    for _ in range(200):
        follow(ledger, decoding=["a"])
    # b's pages are unreferenced but cached, in the layer without a mirror they keep their frames.
    assert ledger.resident == 4 and (ledger.frames.frame_table[0] >= 0).all()


def returning():
    """A ledger of which layer 3 has begun to come back, three pages a step, for "a" (pages 0 to 9)
    and "c" (10 to 19); pages 20 to 29 are cached.
    """
    ledger = make_ledger(return_pages=3, num_pages=60, frames=np.arange(170), max_requests=3)
    follow(ledger, started=[StartedRequest("c", list(range(10, 20)), 0)])
    follow(ledger, started=[StartedRequest("b", list(range(20, 56)), 0)])
    assert ledger.resident == 3
    changes = follow(ledger, released=["b"], started=[StartedRequest("a", list(range(10)), 0)])
    for _ in range(COOLDOWN_STEPS):
        if ledger.framed == 4:
            return ledger
        changes = follow(ledger)
    raise AssertionError(f"no layer comes back: {changes}")


def copied(ledger, steps, **arguments):
    """Pages of layer 3 that the next steps copy, while they compute and before the one in which it
    is resident again.
    """
    during, last = [], []
    for _ in range(steps):
        changes = follow(ledger, **arguments)
        during += [] if changes.returning is None else changes.returning[1].tolist()
        last += [page for layer, pages in changes.loads if layer == 3 for page in pages.tolist()]
        arguments = {"written": [("a", 9)]}
    return during, last


def test_a_large_layer_comes_back_a_share_a_step_and_what_is_written_meanwhile_once_more():
    ledger = returning()
    during, last = copied(ledger, 8, written=[("a", 9)])
    assert ledger.resident == ledger.framed == 4
    assert sorted({*during, *last}) == list(range(20)) and len(during) >= 15 and len(last) <= 5
    assert 9 in last and 9 not in during, (
        "the page that every step writes is copied when no step writes past its frame any more"
    )


def test_a_page_that_is_written_after_it_was_copied_is_copied_again():
    ledger = returning()
    for _ in range(2):
        first = follow(ledger, written=[("c", 9)]).returning[1]
    assert 4 in first
    follow(ledger, written=[("a", 4)])
    during, last = copied(ledger, 8, written=[("c", 9)])
    assert ledger.resident == 4 and 4 in {*during, *last}


@pytest.mark.parametrize("rows, chunk", [(12, 1), (1, 9)], ids=["many decode rows", "long prefill"])
def test_a_layer_comes_back_however_much_each_step_writes(rows, chunk):
    ledger = make_ledger(
        return_pages=3, num_pages=800, frames=np.arange(1700), max_requests=rows + 2
    )
    pages = iter(range(800))

    def take(count):
        return [next(pages) for _ in range(count)]

    names = [f"r{i}" for i in range(rows)]
    follow(ledger, started=[StartedRequest(name, take(4), 0) for name in names])
    follow(ledger, started=[StartedRequest("large", take(440), 0)])
    assert ledger.resident < 4
    held = dict.fromkeys(names, 4)
    changes = follow(ledger, released=["large"])
    for _ in range(COOLDOWN_STEPS + 20):
        grown = (
            [(name, take(chunk)) for name in names]
            if chunk > 1 and sum(held.values()) < 180
            else []
        )
        held |= {name: held[name] + len(new) for name, new in grown}
        changes = follow(
            ledger, grown=grown, written=[(name, held[name] - chunk) for name in names]
        )
        if ledger.resident == 4:
            break
    assert ledger.resident == 4, changes


def test_nothing_is_copied_in_a_step_that_runs_no_layer():
    ledger = returning()
    assert copied(ledger, 1) == ([], []) and ledger.framed == 4


def test_pages_that_nobody_holds_when_a_layer_is_back_are_loaded_for_the_next_that_does():
    ledger = returning()
    follow(ledger, released=["c"], written=[("a", 9)])
    copied(ledger, 8, written=[("a", 9)])
    assert ledger.resident == 4
    changes = follow(ledger, started=[StartedRequest("d", [*range(10, 20), 58], 10)])
    assert [pages.tolist() for layer, pages in changes.loads if layer == 3] == [list(range(10, 20))]


def test_a_prefix_hit_on_a_layers_way_back_is_copied_with_it():
    ledger = returning()
    changes = follow(
        ledger, started=[StartedRequest("d", [*range(20, 30), 58], 10)], written=[("a", 9)]
    )
    assert all(layer < 3 for layer, _ in changes.loads)
    during, last = copied(ledger, 16, written=[("a", 9)])
    assert ledger.resident == 4 and {*range(20, 30)} <= {*during, *last}


def test_pressure_ends_a_layers_way_back():
    ledger = returning()
    changes = follow(ledger, started=[StartedRequest("d", [*range(20, 56)], 0)])
    assert ledger.framed == ledger.resident < 4 and changes.given_up
    ledger.audit()


def test_layers_to_offload_is_what_the_load_forces():
    for limit in (1, 2, 4):
        ledger = make_ledger(frames=np.arange(120), hot_pages=4)
        follow(
            ledger,
            started=[
                StartedRequest("a", list(range(20)), 0),
                StartedRequest("b", list(range(20, 36)), 0),
            ],
            decoding=["a", "b"],
            hot_limit=limit,
        )
        for _ in range(200):
            follow(ledger, decoding=["a", "b"])
        assert 0 < ledger.layers_to_offload(limit) == 4 - ledger.resident
    assert make_ledger(frames=np.arange(400)).layers_to_offload(4) == 0


@pytest.mark.parametrize("damage", ["twice", "lost", "reference", "lane"])
def test_audit_finds_damage(damage):
    ledger = make_ledger()
    follow(ledger, started=[StartedRequest("a", [1, 2, 3], 0)], decoding=["a"])
    assert ledger.audit() == {"requests": 1, "pages": 3, "frames": 12, "free_frames": 84}
    if damage == "twice":
        ledger.frames.frame_table[0, 1] = ledger.frames.frame_table[0, 2]
    elif damage == "lost":
        ledger.frames.frame_table[0, 1] = -1
    elif damage == "reference":
        ledger.requests.references[7] = 1
    else:
        ledger.requests.lanes.pop("a")
    with pytest.raises(RuntimeError, match="please report it"):
        ledger.audit()


def test_without_prefix_caching_released_pages_lose_their_frames():
    ledger = make_ledger(keep_unreferenced=False)
    follow(ledger, started=[StartedRequest("a", [1, 2, 3], 0)], decoding=["a"])
    follow(ledger, released=["a"])
    assert ledger.frames.num_free == 96 and not ledger.requests.lanes


def test_a_name_that_starts_again_lets_go_of_what_it_held():
    """vLLM's sessions of streamed input: the same request enters the batch with more pages."""
    ledger = make_ledger()
    follow(ledger, started=[StartedRequest("a", [1, 2, 3], 0)], decoding=["a"])
    changes = follow(ledger, started=[StartedRequest("a", [1, 2, 3, 4], 3)])
    assert ledger.audit() == {"requests": 1, "pages": 4, "frames": 16, "free_frames": 80}
    assert not changes.loads, "its frames hold what they held"
    assert ledger.requests.lanes["a"] in changes.lanes
    follow(ledger, released=["a"])
    assert ledger.audit()["requests"] == 0
