"""The ledger under random schedules: no frame owned twice, none lost, and every page that is needed can be found."""

import numpy as np
import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from specontext_vllm.residency.ledger import Ledger, StartedRequest

LAYERS, MIRRORED, HOT, LANES, PAGES = 5, 3, 4, 4, 60
FRAMES = (LAYERS - MIRRORED) * PAGES + MIRRORED * HOT * LANES


class Schedule(RuleBasedStateMachine):
    """A scheduler with prefix caching drives the ledger; a model of what every place holds follows its changes.

    ``content[place]`` is the (layer, page, version) whose KV a frame or a host place holds. A page gets a new version when it
    is handed out anew.
    """

    def __init__(self):
        super().__init__()
        self.ledger = Ledger(
            num_layers=LAYERS, num_pages=PAGES, frames=np.arange(10, 10 + FRAMES), host_layers=MIRRORED, hot_pages=HOT,
            max_requests=LANES, keep_unreferenced=True,
        )  # fmt: skip
        self.version = np.zeros(PAGES, int)
        self.host = {}
        self.frame = {}
        self.running: dict[str, list[int]] = {}
        self.cached: list[list[int]] = []
        self.free = list(range(PAGES))
        self.counter = 0

    def step(self, released=(), started=(), grown=(), decode_all=True, hot_limit=None):
        before = self.ledger.resident
        decoding = [name for name in self.ledger.lanes if name not in released] + [r.name for r in started] if decode_all else []
        changes = self.ledger.begin_step(released, started, grown, decoding, hot_limit)
        for frames in changes.given_up:
            for frame in frames:
                self.frame.pop(int(frame), None)
        for layer, pages in changes.loads:
            for page in pages:
                self.frame[int(self.ledger.frame_table[layer, page])] = (layer, page, self.host.get((layer, page)))
        assert all(before > layer >= self.ledger.resident for layer in changes.offloaded)
        # The forward pass writes every new page, and mirrors it.
        for pages in [r.pages[r.computed :] for r in started] + [p for _, p in grown]:
            for page in pages:
                self.version[page] += 1
                for layer in range(LAYERS):
                    if layer >= LAYERS - MIRRORED:
                        self.host[(layer, page)] = self.version[page]
                    if layer < self.ledger.resident:
                        self.frame[int(self.ledger.frame_table[layer, page])] = (layer, page, self.version[page])

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
        self.cached.append(pages)
        self.step(released=[name, "unknown"])

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
        held = np.concatenate([ledger.frame_table[ledger.frame_table >= 0], ledger.hot_table[ledger.hot_table >= 0]])
        everything = np.concatenate([held, ledger._free[: ledger.free_frames]])
        assert sorted(everything) == list(range(10, 10 + FRAMES))
        assert ledger.audit()["requests"] == len(ledger.lanes)

    @invariant()
    def pages_are_where_the_tables_say(self):
        ledger = self.ledger
        assert (ledger.frame_table[ledger.resident :] < 0).all()
        assert (ledger.hot_table[: ledger.resident] < 0).all()
        for pages in self.running.values():
            for page in pages:
                for layer in range(ledger.resident):
                    assert self.frame[int(ledger.frame_table[layer, page])] == (layer, page, self.version[page])
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
                    assert self.frame[int(self.ledger.frame_table[layer, page])] == (layer, page, self.version[page])


Schedule.TestCase.settings = settings(
    max_examples=40, stateful_step_count=50, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck)
)
test_schedule = Schedule.TestCase


def ledger(**changes):
    arguments = dict(
        num_layers=4, num_pages=40, frames=np.arange(96), host_layers=3, hot_pages=4, max_requests=2, keep_unreferenced=True
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


def test_layers_to_offload_is_what_the_load_forces():
    for limit in (1, 2, 4):
        books = ledger(frames=np.arange(120), hot_pages=4)
        books.begin_step([], [StartedRequest("a", list(range(20)), 0), StartedRequest("b", list(range(20, 36)), 0)], [], ["a", "b"], limit)
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
