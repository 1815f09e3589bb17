"""A sidecar in a real Ray process selects what the head in the worker does, step for step, and
densely while it is dead.
"""

from __future__ import annotations

import contextlib
import inspect
import os
import re
import signal
import time

import psutil
import pytest
import torch
import torch.nn.functional as F

from specontext_vllm.config import PAGE_SIZE, ConfigError, pages_for
from specontext_vllm.retrieval.local import LocalRetriever
from specontext_vllm.retrieval.protocol import Retriever
from specontext_vllm.sidecar import link
from specontext_vllm.sidecar.remote import RemoteRetriever
from specontext_vllm.step_data import WHOLE
from tests.conftest import CUDA
from tests.retrieval.test_local import KV_HEADS, MAX_LEN, VOCAB, World, new_selection
from tests.steps import bare_step
from tests.stopping import stop

# Longer than each of its own waits. Some of Ray's have no bound, as that for a graph's last task.
pytestmark = pytest.mark.seconds(240)
BLOCKS = 200
SIDECAR = {"sidecar": "ray", **({"sidecar_gpus": 0.25} if CUDA else {})}
"""On the device of the inline head that it is compared with: on a machine with one GPU, the same
GPU.
"""


class Twins:
    """An inline retriever and a remote one that see the same steps; stands in for
    ``World.retriever``.
    """

    def __init__(self, inline, remote, device):
        self.inline, self.remote, self.config, self.pages_read = inline, remote, inline.config, 0
        self.selection = new_selection(device)
        self.pages, self.lengths = self.selection.pages, self.selection.lengths
        self.remote_step = bare_step(remote, self.selection)

    def select_eagerly(self, batch, selection):
        self.inline.select_eagerly(batch, selection)
        self.remote_step.before_model(batch)
        self.pages_read += sum(
            pages_for(n) for n in self.lengths[: batch.num_decodes * KV_HEADS].tolist()
        )

    def learn(self, batch, rows, aux):
        self.inline.learn(batch, rows, aux)
        self.before_learning()
        self.remote_step.after_model(batch, aux)

    def before_learning(self):
        """A test's place between a selection and what is learned from its step."""


@pytest.fixture(scope="module")
def world():
    device = torch.device("cuda" if CUDA else "cpu")
    torch.manual_seed(0)
    # 8-bit keys also travel, and are mirrored; tests/engine/test_sidecar.py has what the machine's
    # default is.
    # Its decode rows' keys are made when their tokens are learned, as those of prompts are;
    # tests/engine/test_sidecar.py has a head that makes them before.
    world = World(device, kind="own-mlps", head_key_dtype="fp8")
    config = replace_config(world.config, **SIDECAR)

    def make(config):
        return RemoteRetriever(
            config,
            world.checkpoint,
            lambda ids: F.embedding(ids, world.table),
            vocab_size=VOCAB,
            num_kv_heads=KV_HEADS,
            max_model_len=MAX_LEN,
            max_rows=8,
            max_tokens=256,
            dtype=torch.float32,
            device=device,
        )

    before = signal.getsignal(signal.SIGTERM)
    world.make_remote, remote = make, make(config)
    remote.allocate_cache(BLOCKS)
    world.sigterm = before, signal.getsignal(signal.SIGTERM)
    world.retriever = Twins(world.retriever, remote, device)
    yield world
    remote.close()


def replace_config(config, **changes):
    return type(config).from_settings({**config.model_dump(exclude_unset=True), **changes})


def actor_pid() -> int:
    """The actor's process, a grandchild of this one."""
    actors = [
        p for p in psutil.Process().children(recursive=True) if p.name().startswith("ray::Sidecar")
    ]
    assert len(actors) == 1, [p.name() for p in psutil.Process().children(recursive=True)]
    return actors[0].pid


def next_actor_pid(dead: int) -> int:
    """That of the actor which takes the place of ``dead``, as soon as it is there; it is still
    being filled then.
    """
    deadline = time.monotonic() + 120
    while True:
        with contextlib.suppress(AssertionError, psutil.NoSuchProcess):
            if (pid := actor_pid()) != dead:
                return pid
        assert time.monotonic() < deadline
        time.sleep(0.05)


def row_of(lengths, pages, row):
    """What a row of the page table holds, per head."""
    heads = range(row * KV_HEADS, (row + 1) * KV_HEADS)
    return [(int(lengths[h]), pages[h, : pages_for(int(lengths[h]))].tolist()) for h in heads]


def whole(world, name, length):
    return [
        (length, [block * KV_HEADS + head for block in world.rows[name][: pages_for(length)]])
        for head in range(KV_HEADS)
    ]


def step(world, *spans):
    """One step; per decode row, in the order of ``spans``: what the inline head selects, and what
    the remote's page table holds.
    """
    world.step(*spans)
    twins, decodes = world.retriever, [s for s in spans if s[2] - s[1] == 1]
    return [
        (row_of(world.lengths, world.pages, i), row_of(twins.lengths, twins.pages, i))
        for i in range(len(decodes))
    ]


def wait_until_up(remote):
    deadline = time.monotonic() + 120
    while not remote.stats()["sidecar_up"]:
        assert time.monotonic() < deadline, "the sidecar did not come back"
        time.sleep(0.1)


def test_both_retrievers_are_complete():
    """Every member of the interface, each method with the interface's parameters."""
    members = [name for name in {**vars(Retriever), **Retriever.__annotations__} if name[0] != "_"]
    assert {"shape_step", "project", "score", "select", "learn", "close"} < set(members)
    for cls in (LocalRetriever, RemoteRetriever):
        for name in members:
            if inspect.isfunction(asked := getattr(Retriever, name, None)):
                mine = inspect.signature(getattr(cls, name))
                assert list(mine.parameters) == list(inspect.signature(asked).parameters), name
            else:
                assert hasattr(cls, name) or f"self.{name}" in inspect.getsource(cls), name


def test_first_replies_may_take_longer_than_later_ones(world, monkeypatch):
    """The first step of all, and the first one that waits until prompt tokens are learned."""
    remote, waits = world.retriever.remote, []
    receive = remote.exchange.keeper.link.receive

    def noted(sent, seconds=None):
        waits.append(seconds)
        return receive(sent, seconds)

    monkeypatch.setattr(remote.exchange.keeper.link, "receive", noted)
    world.add("first", 60)
    for span in ((0, 40), (40, 50), (50, 60)):
        world.step(("first", *span))
    # One selection, then twice what was learned and a selection.
    assert len(waits) == 5
    assert all(link.FIRST_SECONDS / 2 < wait <= link.FIRST_SECONDS for wait in waits[:3])
    assert all(wait < link.FIRST_SECONDS / 2 for wait in waits[3:])


def test_the_page_table_is_the_inline_heads(world):
    """Chunked prompts, a prefix hit, mixed and ragged steps, contexts within the budget and beyond
    it.
    """
    world.add("a", 300)
    world.add("short", 60)
    world.step(("a", 0, 130))
    world.step(("a", 130, 200), ("short", 0, 40))
    for i in range(200, 215):
        for inline, remote in step(world, ("a", i, i + 1), ("short", i - 160, i - 159)):
            assert remote == inline
    world.add("hit", 300, prefix_of="a", shared=112)
    for inline, remote in step(world, ("a", 215, 216), ("hit", 112, 180)):
        assert remote == inline
    rows = step(world, ("hit", 180, 181), ("a", 216, 217))
    assert all(remote == inline for inline, remote in rows)
    assert rows[0][1] != whole(world, "hit", 181), "the budget must matter"
    world.own = {"hit": WHOLE, "a": 112}
    rows = step(world, ("hit", 181, 182), ("a", 217, 218))
    assert all(remote == inline for inline, remote in rows)
    assert rows[0][1] == whole(world, "hit", 182)
    assert len(rows[1][1][0][1]) == 112 // PAGE_SIZE
    world.own = {}
    ours, theirs = world.retriever.remote.stats(), world.retriever.inline.stats()
    assert {name: ours[name] for name in theirs} == pytest.approx(theirs)
    assert ours["sidecar_dense_rows"] == 0 and ours["sidecar_wait_seconds"] > 0


def test_settings_change_between_steps(world):
    twins = world.retriever
    for budget in (96, 64):
        for retriever in (twins.inline, twins.remote):
            retriever.configure(replace_config(retriever.config, budget=budget))
        at = 217 + (budget == 64)
        ((inline, remote),) = step(world, ("a", at, at + 1))
        assert remote == inline and len(remote[0][1]) == budget // PAGE_SIZE


@pytest.mark.parametrize("death", ["killed", "hung"])
def test_requests_go_on_densely_and_what_was_known_is_known_again(world, death, monkeypatch):
    """A request that lived through the outage stays dense; one that paused, a prefix hit on its
    pages, and a new one do not.
    """
    remote = world.retriever.remote
    lived, paused, hit, new, cut = (
        f"{name} {death}" for name in ("lived", "paused", "hit", "new", "cut")
    )
    world.blocks = (torch.randperm(BLOCKS - 1) + 1).tolist()
    assert remote.stats(reset=True)["sidecar_up"]
    world.retriever.pages_read = 0
    for name in (lived, paused):
        world.add(name, 200)
        step(world, (name, 0, 150))
        step(world, (name, 150, 151))
    world.add(cut, 200)
    # What this chunk teaches is sent but never acknowledged: it is lost.
    monkeypatch.setattr(world.retriever, "before_learning", lambda: stop(actor_pid()))
    step(world, (cut, 0, 150))
    if death == "killed":
        os.kill(actor_pid(), signal.SIGKILL)
    monkeypatch.undo()
    begin = time.monotonic()
    for i in (151, 152):
        assert [remote for _, remote in step(world, (lived, i, i + 1))] == [
            whole(world, lived, i + 1)
        ]
    assert time.monotonic() - begin < link.FIRST_SECONDS / 2, "a step waits for seconds only"
    assert remote.stats()["sidecar_up"] == 0
    wait_until_up(remote)
    world.add(hit, 200, prefix_of=paused, shared=144)
    world.add(new, 200)
    step(world, (hit, 144, 170), (new, 0, 170))
    rows = step(
        world,
        (hit, 170, 171),
        (lived, 153, 154),
        (new, 170, 171),
        (paused, 151, 152),
        (cut, 150, 151),
    )
    for row, (inline, found) in enumerate(rows):
        name, length = ((hit, 171), (lived, 154), (new, 171), (paused, 152), (cut, 151))[row]
        assert found == (whole(world, name, length) if name in (lived, cut) else inline), name
        assert inline != whole(world, name, length)
    after = remote.stats()
    assert after["pages_read"] == world.retriever.pages_read
    assert (
        after["sidecar_restarts"] == 1
        and after["sidecar_dense_rows"] == 4
        and after["sidecar_lost_pages"] > 0
    )


def test_settings_change_while_a_new_actor_starts_and_the_old_one_cannot_be_cleared_away(
    world, monkeypatch
):
    remote, inline = world.retriever.remote, world.retriever.inline
    world.blocks = (torch.randperm(BLOCKS - 1) + 1).tolist()
    world.add("changed", 200)
    step(world, ("changed", 0, 150))
    torn_down = remote.exchange.keeper.link.graph.teardown

    def teardown(**how):
        torn_down(**how)
        raise RuntimeError("the cluster's control store is gone")

    monkeypatch.setattr(remote.exchange.keeper.link.graph, "teardown", teardown)
    dead = actor_pid()
    os.kill(dead, signal.SIGKILL)
    assert [found for _, found in step(world, ("changed", 150, 151))] == [
        whole(world, "changed", 151)
    ]
    next_actor_pid(dead)
    budget = 96 if inline.config.budget != 96 else 64
    for retriever in (inline, remote):
        retriever.configure(replace_config(retriever.config, budget=budget))
    wait_until_up(remote)
    world.add("after", 200)
    step(world, ("after", 0, 170))
    ((expected, found),) = step(world, ("after", 170, 171))
    assert found == expected and len(found[0][1]) == budget // PAGE_SIZE


def test_an_actor_that_finds_no_room_is_told_in_one_sentence(world, monkeypatch):
    """The cluster's one core is taken."""
    monkeypatch.setattr(link, "START_SECONDS", 1)
    second = world.make_remote(world.retriever.remote.config)
    asked = f"sidecar_cpus 1, sidecar_gpus {second.config.sidecar_gpus:g}"
    with pytest.raises(
        ConfigError,
        match=re.escape(f"sidecar: found 'ray', but its actor ({asked}) did not start: GetTimeout"),
    ):
        second.allocate_cache(BLOCKS)
    second.close()


def test_ray_listens_on_the_loopback_interface_alone(world):
    if "RAY_ADDRESS" in os.environ:
        pytest.skip("the cluster in RAY_ADDRESS is somebody else's")
    listening = [
        connection.laddr.ip
        for process in [psutil.Process(), *psutil.Process().children(recursive=True)]
        for connection in process.net_connections(kind="tcp")
        if connection.status == psutil.CONN_LISTEN
    ]
    assert len(listening) > 3
    assert {ip.removeprefix("::ffff:") for ip in listening} == {"127.0.0.1"}


def test_the_handler_of_sigterm_is_left_alone(world):
    before, after = world.sigterm
    assert after == before


def test_an_engine_ends_within_seconds_though_its_new_actor_hangs(world):
    """Ends the module's actor."""
    remote = world.retriever.remote
    world.blocks = (torch.randperm(BLOCKS - 1) + 1).tolist()
    world.add("last", 200)
    dead = actor_pid()
    os.kill(dead, signal.SIGKILL)
    step(world, ("last", 0, 150))
    assert remote.stats()["sidecar_up"] == 0
    following = next_actor_pid(dead)
    stop(following)
    begin = time.monotonic()
    remote.close()
    assert time.monotonic() - begin < 2 * link.CLOSE_SECONDS + 1
    # Ray's own patience with it.
    _, alive = psutil.wait_procs(
        [psutil.Process(following)] if psutil.pid_exists(following) else [], timeout=30
    )
    assert not alive


@pytest.mark.gpu
def test_an_actor_on_a_cpu_selects_for_a_worker_on_a_gpu(world):
    """The last test of this module, whose actor's core it takes."""
    world.retriever.remote.close()
    beside = World(world.device)
    remote = world.make_remote(replace_config(beside.config, sidecar="ray", head_key_dtype="auto"))
    assert remote.key_dtype == torch.float32, (
        "8-bit keys are a GPU's default, and the actor has none"
    )
    remote.allocate_cache(BLOCKS)
    try:
        beside.retriever = Twins(beside.retriever, remote, world.device)
        beside.add("a", 300)
        beside.add("short", 60)
        step(beside, ("a", 0, 200), ("short", 0, 40))
        for i in range(200, 205):
            rows = step(beside, ("a", i, i + 1), ("short", i - 160, i - 159))
            assert all(found == inline for inline, found in rows)
            assert rows[0][1] != whole(beside, "a", i + 1), "the budget must matter"
    finally:
        remote.close()
