"""What clients and the machine do to servers: a few hundred requests of the soak benchmark, odd
prompts, crowds that hang up, and a worker or an engine that is killed.

Two servers go through it one after the other, each killed in the end.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from random import Random

import psutil
import pytest
from openai import BadRequestError, OpenAI, OpenAIError

from benchmarks.near_tie import NEAR_TIE_CPU, NEAR_TIE_GPU
from benchmarks.prompts import make_prompts
from benchmarks.soak.client import Load, client_session, send_request
from benchmarks.soak.outcome import Outcome, complaints
from benchmarks.soak.references import dense_engine, greedy_answers
from benchmarks.soak.server import ENGINES, MAX_MODEL_LEN, run_load, server_arguments, settle
from specontext_vllm.demo.server import VllmServer
from tests.conftest import CUDA
from tests.engine.conftest import DEMO_MODEL, GPU_OPTIONS, client_of, engine
from tests.stopping import stop

CLIENTS, REQUESTS = 200, 120


def arguments(name: str, pages: int, max_num_seqs: int) -> list[str]:
    """Of one of the benchmark's servers, with its worker in a process of its own, as with several
    of them.
    """
    return [
        *server_arguments(ENGINES[name].settings, pages, max_num_seqs),
        "--distributed-executor-backend",
        "mp",
        *GPU_OPTIONS,
    ]


@pytest.fixture(scope="module")
def server(forking_servers) -> Iterator[VllmServer]:
    """Two tiers, and pages for a few long requests only. Hot buffers leave room for no more than
    16.
    """
    with VllmServer(DEMO_MODEL, arguments("two-tiers", ENGINES["two-tiers"].pages, 16)) as running:
        yield running


@pytest.fixture(scope="module")
def following(forking_servers) -> Iterator[VllmServer]:
    """One tier, with half the benchmark's pages for twice its running requests: few requests
    preempt some too.
    """
    with VllmServer(
        DEMO_MODEL, arguments("one-tier", ENGINES["one-tier"].pages // 2, 32)
    ) as running:
        yield running


@pytest.fixture(scope="module")
def client(server) -> OpenAI:
    return client_of(server)


@pytest.fixture(scope="module")
def load() -> Load:
    prompts = make_prompts(DEMO_MODEL, 40)
    stock = {"block_size": None, "num_gpu_blocks_override": None}
    with engine(**stock, **dense_engine(str(DEMO_MODEL), CUDA)) as llm:
        references, gaps = greedy_answers(llm, prompts)
    return Load(
        prompts,
        references,
        gaps,
        REQUESTS,
        None,
        40,
        NEAR_TIE_GPU if CUDA else NEAR_TIE_CPU,
    )


@pytest.fixture(scope="module")
def prompts() -> list[list[int]]:
    return make_prompts(DEMO_MODEL, 20)


def complete(client, prompt, **options):
    return client.completions.create(
        model="demo", prompt=prompt, temperature=0, **{"max_tokens": 8, **options}
    )


def check_full(server, load, name: str) -> tuple[Outcome, dict]:
    """The load's outcome, once it is seen that a full server answers all and forgets all."""
    outcome, left = run_load(load, server, plugin=True)
    # These are too few to speak of memory.
    assert {
        k: v for k, v in complaints(outcome, left, ENGINES[name].exact).items() if k != "memory"
    } == {}
    assert outcome.done == REQUESTS and outcome.counts["given up"] > 10
    assert left["prefix_hit_tokens"] > 0
    return outcome, left


def test_a_full_server_with_two_tiers_answers_all_and_forgets_all(server, load):
    outcome, left = check_full(server, load, "two-tiers")
    assert left["stats"]["layer_moves"] > 0 and left["stats"]["fetched_bytes"] > 0
    # Every answer that dense attention and few pages agree on is one that paging cannot have
    # spoilt.
    assert outcome.counts["wrong"] < 0.2 * REQUESTS


@pytest.mark.parametrize(
    "length",
    [1, MAX_MODEL_LEN - 8, MAX_MODEL_LEN - 1],
    ids=["one-token", "decodes-to-the-end", "longest"],
)
def test_prompts_of_extreme_lengths_are_answered(client, prompts, length):
    long = (prompts[0] * 8)[:length]
    assert complete(client, long, extra_body={"ignore_eos": True}).usage.completion_tokens == min(
        8, MAX_MODEL_LEN - length
    )


def test_a_prompt_beyond_the_model_is_refused_and_harms_nobody(client, prompts):
    before = complete(client, prompts[0]).choices[0].text
    # With the longest context no token is left to make, which is vLLM's sentence then.
    for length, sentence in (
        (MAX_MODEL_LEN, "max_tokens must be at least 1"),
        (MAX_MODEL_LEN + 1, str(MAX_MODEL_LEN)),
    ):
        with pytest.raises(BadRequestError, match=sentence):
            complete(client, (prompts[0] * 8)[:length])
    assert complete(client, prompts[0]).choices[0].text == before


def test_a_crowd_that_hangs_up_leaves_nothing_behind(server, client, prompts):
    """200 clients, many more than run at once, leave after up to twelve events of their streams."""
    before = complete(client, prompts[1]).choices[0].text

    class LeavesAlways(Random):
        def choices(self, population, *args, **kwargs):
            return (
                ["given up"]
                if "given up" in population
                else super().choices(population, *args, **kwargs)
            )

    async def crowd() -> Outcome:
        outcome = Outcome()
        load = Load(prompts, [[]] * len(prompts), [[]] * len(prompts), CLIENTS, None, CLIENTS)
        async with client_session() as session:
            await asyncio.gather(
                *(
                    send_request(session, server.url, load, LeavesAlways(i), outcome)
                    for i in range(CLIENTS)
                )
            )
        return outcome

    outcome = asyncio.run(crowd())
    assert outcome.counts["given up"] == CLIENTS and not outcome.failed
    left = settle(server, prompts[0], plugin=True)
    assert (
        left["running"] == left["waiting"] == 0
        and left["kv_cache_usage"] == 0
        and left["ledger"]["requests"] <= 1
    )
    assert complete(client, prompts[1]).choices[0].text == before


def in_shared_places(processes: list[psutil.Process]) -> set[Path]:
    """Files that processes hold in the machine's shared memory and in the folder of our metrics."""
    maps = "".join(Path(f"/proc/{process.pid}/maps").read_text() for process in processes)
    paths = {line.split(maxsplit=5)[5] for line in maps.splitlines() if line.count("/")}
    return {
        Path(path)
        for path in paths
        if path.startswith("/dev/shm/") or "/specontext-metrics-" in path
        if Path(path).exists()
    }


def stopped_in_the_middle(client, prompt: list[int], victim: psutil.Process) -> Future | None:
    """Stop the process while it makes a long answer, for as long as whoever waits for it needs to
    be waiting; the answer's reason to end, which is still to come. None, with the process going on,
    where a busy machine let the answer be over first.
    """
    stream = complete(
        client,
        prompt,
        max_tokens=MAX_MODEL_LEN - len(prompt),
        stream=True,
        extra_body={"ignore_eos": True},
    )

    chunks: list[object] = []

    def rest() -> str | None:
        reason = None
        try:
            for chunk in stream:
                chunks.append(chunk)
                reason = chunk.choices[0].finish_reason if chunk.choices else reason
        except OpenAIError:
            return "error"
        return reason

    next(iter(stream))
    stop(victim.pid)
    executor = ThreadPoolExecutor(1)
    reason = executor.submit(rest)
    executor.shutdown(wait=False)
    seen = -1
    while seen < len(chunks) and not reason.done():
        seen = len(chunks)
        time.sleep(0.5)
    if not reason.done():
        return reason
    assert reason.result() == "length"
    victim.resume()
    return None


def end_by_killing(server, client, prompt: list[int], title: str) -> None:
    """Kill the server's process of that title in the middle of a step; a client in the middle of a
    stream hears of it, and nothing stays behind.
    """
    processes = [psutil.Process(server.pid), *psutil.Process(server.pid).children(recursive=True)]
    (victim,) = (process for process in processes if title in "".join(process.cmdline()))
    held = in_shared_places(processes)
    assert any("specontext-metrics" in str(path) for path in held) and any(
        str(path).startswith("/dev/shm") for path in held
    )
    stream = None
    while stream is None:
        stream = stopped_in_the_middle(client, prompt[:32], victim)
    victim.kill()
    begin = time.monotonic()
    reason = stream.result(60)
    # A server that ends closes its streams, and may do so before it has heard of the error: then
    # the answer has no reason to end.
    assert reason in ("error", None, "abort"), reason
    gone, alive = psutil.wait_procs(processes, timeout=60)
    assert not alive, alive
    assert time.monotonic() - begin < 60
    assert not {path for path in held if path.exists()}


def test_a_killed_worker_ends_the_server_at_once(server, client, prompts):
    """The last test of this server."""
    end_by_killing(server, client, prompts[0], "Worker")


def test_where_a_worker_was_killed_another_server_starts_and_when_full_answers_all_exactly(
    following, load
):
    _, left = check_full(following, load, "one-tier")
    assert left["preemptions"] > 0


def test_a_killed_engine_ends_the_server_at_once(following, prompts):
    """The last test of this server."""
    with OpenAI(
        base_url=f"{following.url}/v1", api_key="none", timeout=120, max_retries=0
    ) as client:
        assert complete(client, prompts[1]).usage.completion_tokens == 8
        end_by_killing(following, client, prompts[0], "EngineCore")
