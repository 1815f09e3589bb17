"""The ledger under random schedules: no frame owned twice, none lost, and every page that is needed
can be found.
"""

import numpy as np
import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from specontext_vllm.residency.ledger import COOLDOWN_STEPS, Ledger, StartedRequest

LAYERS, MIRRORED, HOT, LANES, PAGES = 5, 3, 4, 4, 60
FRAMES = (LAYERS - MIRRORED) * PAGES + MIRRORED * HOT * LANES


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
            [name for name in self.ledger.lanes if name not in released] + [r.name for r in started]
            if decode_all
            else []
        )
        # Each decode row adds a token to its last page.
        tails = {name: len(pages) - 1 for name, pages in self.running.items() if name in decoding}
        tails |= {name: len(self.running[name]) - len(pages) for name, pages in grown}
        written = [
            (name, first) for name, first in tails.items() if name not in [r.name for r in started]
        ] + list(resumed_in)
        changes = self.ledger.begin_step(
            released, started, grown, decoding, hot_limit, written=written
        )
        for frames in changes.given_up:
            for frame in frames:
                self.frame.pop(int(frame), None)
        for layer, pages in changes.loads:
            for page in pages:
                self.frame[int(self.ledger.frame_table[layer, page])] = (
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
                self.frame[int(self.ledger.frame_table[layer, page])] = (
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
                    self.frame[int(self.ledger.frame_table[layer, page])] = (
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
            [ledger.frame_table[ledger.frame_table >= 0], ledger.hot_table[ledger.hot_table >= 0]]
        )
        everything = np.concatenate([held, ledger._free[: ledger.free_frames]])
        assert sorted(everything) == list(range(10, 10 + FRAMES))
        assert ledger.audit()["requests"] == len(ledger.lanes)

    @invariant()
    def pages_are_where_the_tables_say(self):
        ledger = self.ledger
        assert (
            ledger.frame_table[ledger.framed :] < 0
        ).all() and ledger.resident <= ledger.framed <= ledger.resident + 1
        assert (ledger.hot_table[: ledger.resident] < 0).all()
        for pages in self.running.values():
            for page in pages:
                for layer in range(ledger.resident):
                    assert self.frame[int(ledger.frame_table[layer, page])] == (
                        layer,
                        page,
                        self.version[page],
                    )
                for layer in range(ledger.resident, LAYERS):
                    assert self.host[(layer, page)] == self.version[page]
        for name, lane in ledger.lanes.items():
            slots = min(ledger.hot_limit, len(self.running[name])) if ledger.capacity[lane] else 0
            assert slots <= ledger.capacity[lane] <= ledger.hot_limit
            assert (ledger.hot_table[:, lane, ledger.capacity[lane] :] < 0).all()
            assert (ledger.hot_table[ledger.resident :, lane, : ledger.capacity[lane]] >= 0).all()

    @invariant()
    def cached_pages_survive(self):
        """What a prefix hit may ask for is still somewhere."""
        held = {p for pages in self.running.values() for p in pages}
        for pages in self.cached:
            for page in set(pages) - held:
                for layer in range(LAYERS - MIRRORED):
                    assert self.frame[int(self.ledger.frame_table[layer, page])] == (
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


def ledger(**changes):
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
    books = ledger(frames=np.arange(120))
    books.begin_step([], [StartedRequest("a", list(range(20)), 0)], [], [])
    assert books.resident == 4
    changes = books.begin_step([], [StartedRequest("b", list(range(20, 40)), 0)], [], ["a"])
    assert books.resident == 2 and changes.given_up
    books.begin_step(["b"], [], [], [])
    for _ in range(200):
        books.begin_step([], [], [], ["a"])
    # b's pages are unreferenced but cached, in the layer without a mirror they keep their frames.
    assert books.resident == 4 and (books.frame_table[0] >= 0).all()


def returning():
    """Books of which layer 3 has begun to come back, three pages a step, for "a" (pages 0 to 9) and
    "c" (10 to 19); pages 20 to 29 are cached.
    """
    books = ledger(return_pages=3, num_pages=60, frames=np.arange(170), max_requests=3)
    books.begin_step([], [StartedRequest("c", list(range(10, 20)), 0)], [], [])
    books.begin_step([], [StartedRequest("b", list(range(20, 56)), 0)], [], [])
    assert books.resident == 3
    changes = books.begin_step(["b"], [StartedRequest("a", list(range(10)), 0)], [], [])
    for _ in range(COOLDOWN_STEPS):
        if books.framed == 4:
            return books
        changes = books.begin_step([], [], [], [])
    raise AssertionError(f"no layer comes back: {changes}")


def copied(books, steps, **arguments):
    """Pages of layer 3 that the next steps copy, beside the layers and before the one in which it
    is resident again.
    """
    beside, last = [], []
    for _ in range(steps):
        changes = books.begin_step([], [], [], [], **arguments)
        beside += [] if changes.returning is None else changes.returning[1].tolist()
        last += [page for layer, pages in changes.loads if layer == 3 for page in pages.tolist()]
        arguments = {"written": [("a", 9)]}
    return beside, last


def test_a_large_layer_comes_back_a_share_a_step_and_what_is_written_meanwhile_once_more():
    books = returning()
    beside, last = copied(books, 8, written=[("a", 9)])
    assert books.resident == books.framed == 4
    assert sorted({*beside, *last}) == list(range(20)) and len(beside) >= 15 and len(last) <= 5
    assert 9 in last and 9 not in beside, (
        "the page that every step writes is copied when no step writes past its frame any more"
    )


def test_a_page_that_is_written_after_it_was_copied_is_copied_again():
    books = returning()
    for _ in range(2):
        first = books.begin_step([], [], [], [], written=[("c", 9)]).returning[1]
    assert 4 in first
    books.begin_step([], [], [], [], written=[("a", 4)])
    beside, last = copied(books, 8, written=[("c", 9)])
    assert books.resident == 4 and 4 in {*beside, *last}


@pytest.mark.parametrize("rows, chunk", [(12, 1), (1, 9)], ids=["many decode rows", "long prefill"])
def test_a_layer_comes_back_however_much_each_step_writes(rows, chunk):
    books = ledger(return_pages=3, num_pages=800, frames=np.arange(1700), max_requests=rows + 2)
    pages = iter(range(800))

    def take(count):
        return [next(pages) for _ in range(count)]

    names = [f"r{i}" for i in range(rows)]
    books.begin_step([], [StartedRequest(name, take(4), 0) for name in names], [], [])
    books.begin_step([], [StartedRequest("large", take(440), 0)], [], [])
    assert books.resident < 4
    held = dict.fromkeys(names, 4)
    changes = books.begin_step(["large"], [], [], [])
    for _ in range(COOLDOWN_STEPS + 20):
        grown = (
            [(name, take(chunk)) for name in names]
            if chunk > 1 and sum(held.values()) < 180
            else []
        )
        held |= {name: held[name] + len(new) for name, new in grown}
        changes = books.begin_step(
            [], [], grown, [], written=[(name, held[name] - chunk) for name in names]
        )
        if books.resident == 4:
            break
    assert books.resident == 4, changes


def test_nothing_is_copied_in_a_step_that_runs_no_layer():
    books = returning()
    assert copied(books, 1) == ([], []) and books.framed == 4


def test_pages_that_nobody_holds_when_a_layer_is_back_are_loaded_for_the_next_that_does():
    books = returning()
    books.begin_step(["c"], [], [], [], written=[("a", 9)])
    copied(books, 8, written=[("a", 9)])
    assert books.resident == 4
    changes = books.begin_step([], [StartedRequest("d", [*range(10, 20), 58], 10)], [], [])
    assert [pages.tolist() for layer, pages in changes.loads if layer == 3] == [list(range(10, 20))]


def test_a_prefix_hit_on_a_layers_way_back_is_copied_with_it():
    books = returning()
    changes = books.begin_step(
        [], [StartedRequest("d", [*range(20, 30), 58], 10)], [], [], written=[("a", 9)]
    )
    assert all(layer < 3 for layer, _ in changes.loads)
    beside, last = copied(books, 16, written=[("a", 9)])
    assert books.resident == 4 and {*range(20, 30)} <= {*beside, *last}


def test_pressure_ends_a_layers_way_back():
    books = returning()
    changes = books.begin_step([], [StartedRequest("d", [*range(20, 56)], 0)], [], [])
    assert books.framed == books.resident < 4 and changes.given_up
    books.audit()


def test_layers_to_offload_is_what_the_load_forces():
    for limit in (1, 2, 4):
        books = ledger(frames=np.arange(120), hot_pages=4)
        books.begin_step(
            [],
            [StartedRequest("a", list(range(20)), 0), StartedRequest("b", list(range(20, 36)), 0)],
            [],
            ["a", "b"],
            limit,
        )
        for _ in range(200):
            books.begin_step([], [], [], ["a", "b"])
        assert 0 < books.layers_to_offload(limit) == 4 - books.resident
    assert ledger(frames=np.arange(400)).layers_to_offload(4) == 0


@pytest.mark.parametrize("damage", ["twice", "lost", "reference", "lane"])
def test_audit_finds_damage(damage):
    books = ledger()
    books.begin_step([], [StartedRequest("a", [1, 2, 3], 0)], [], ["a"])
    assert books.audit() == {"requests": 1, "pages": 3, "frames": 12, "free_frames": 84}
    if damage == "twice":
        books.frame_table[0, 1] = books.frame_table[0, 2]
    elif damage == "lost":
        books.frame_table[0, 1] = -1
    elif damage == "reference":
        books.references[7] = 1
    else:
        books.lanes.pop("a")
    with pytest.raises(RuntimeError, match="please report it"):
        books.audit()


def test_without_prefix_caching_released_pages_lose_their_frames():
    books = ledger(keep_unreferenced=False)
    books.begin_step([], [StartedRequest("a", [1, 2, 3], 0)], [], ["a"])
    books.begin_step(["a"], [], [], [])
    assert books.free_frames == 96 and not books.lanes


def test_a_name_that_starts_again_lets_go_of_what_it_held():
    """vLLM's sessions of streamed input: the same request enters the batch with more pages."""
    books = ledger()
    books.begin_step([], [StartedRequest("a", [1, 2, 3], 0)], [], ["a"])
    changes = books.begin_step([], [StartedRequest("a", [1, 2, 3, 4], 3)], [], [])
    assert books.audit() == {"requests": 1, "pages": 4, "frames": 16, "free_frames": 80}
    assert not changes.loads, "its frames hold what they held"
    assert books.lanes["a"] in changes.lanes
    books.begin_step(["a"], [], [], [])
    assert books.audit()["requests"] == 0
