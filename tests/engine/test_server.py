"""A real `vllm serve` process with the demo model, asked by the real OpenAI client; and starts that
must fail.
"""

from __future__ import annotations

import io
import json
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from openai import BadRequestError, OpenAI
from rich.console import Console

from specontext_vllm.demo.__main__ import question
from specontext_vllm.demo.asking import Servers
from specontext_vllm.demo.server import device_arguments, serve_command, server_environment
from specontext_vllm.demo.speed import answer_all, measure
from specontext_vllm.synthetic.tasks import Problem, make_problem, score
from tests.forked import ServerProcess

ROOT = Path(__file__).parents[2]
DEMO_MODEL = ROOT / "models" / "demo"
REPLY_TOKENS = 40

pytestmark = pytest.mark.skipif(
    not (DEMO_MODEL / "config.json").exists(),
    reason=(
        "models/demo is missing; make it with python -m specontext_vllm.demo.train --out "
        "models/demo"
    ),
)


def needle(seed: int, tokens: int) -> Problem:
    return make_problem("needle", seed=seed, approx_tokens=tokens, layout="question_last")


def reply(client: OpenAI, problem: Problem) -> str:
    answer = client.chat.completions.create(
        model="demo", messages=problem.messages, temperature=0, max_tokens=REPLY_TOKENS
    )
    return answer.choices[0].message.content


def test_a_chat_finds_the_needle_and_reads_few_pages(server, client):
    problem = needle(1, 3000)
    server.rpc("specontext_stats", reset=True)
    answer = client.chat.completions.create(
        model="demo", messages=problem.messages, temperature=0, max_tokens=REPLY_TOKENS
    )
    assert score(problem, answer.choices[0].message.content) == 1.0, answer.choices[
        0
    ].message.content
    assert answer.choices[0].finish_reason == "stop"
    assert 2000 < answer.usage.prompt_tokens < 4000
    stats = server.rpc("specontext_stats")
    assert stats["decode_rows"] >= answer.usage.completion_tokens - 1
    # 512 of about 3,000 tokens.
    assert 0.1 < stats["pages_read"] / stats["pages_total"] < 0.25


def test_replies_at_once_are_as_long_as_asked(server):
    questions = [question(needle(seed, 1000)) for seed in (3, 4)]
    begin = time.perf_counter()
    # The answers themselves would end after some ten tokens.
    rate, prompt = answer_all(server, "demo", questions, 48)
    assert rate >= 2 * 48 / (time.perf_counter() - begin) and 700 < prompt < 1400
    said = io.StringIO()
    both = Servers(server, server, "demo")
    speeds = measure(Console(file=said, width=160), both, questions, rounds=1, tokens=24)
    assert (speeds.requests, speeds.prompt_tokens, speeds.tokens) == (2, prompt, 24)
    assert len(speeds.sparse) == len(speeds.dense) == 1
    assert "round 1 of 1: specontext " in said.getvalue()


def test_streaming_gives_the_same_text_piece_by_piece(client):
    problem = needle(2, 2000)
    whole = reply(client, problem)
    stream = client.chat.completions.create(
        model="demo",
        messages=problem.messages,
        temperature=0,
        max_tokens=REPLY_TOKENS,
        stream=True,
        stream_options={"include_usage": True},
    )
    parts, usage = [], None
    for chunk in stream:
        usage = chunk.usage or usage
        if chunk.choices and chunk.choices[0].delta.content:
            parts.append(chunk.choices[0].delta.content)
    assert "".join(parts) == whole
    assert len(parts) > 1
    assert usage.completion_tokens > 1


def test_a_request_asks_for_a_budget_of_its_own(server, client):
    """512 is the server's."""
    problem, read = needle(1, 3000), {}
    for budget in (None, 128, 512):
        own = {} if budget is None else {"vllm_xargs": {"specontext_budget": budget}}
        server.rpc("specontext_stats", reset=True)
        answer = client.chat.completions.create(
            model="demo", messages=problem.messages, temperature=0, max_tokens=20, extra_body=own
        )
        stats = server.rpc("specontext_stats")
        read[budget] = stats["pages_read"] / stats["decode_rows"]
        assert stats["decode_rows"] >= answer.usage.completion_tokens - 1 > 3
    # Two KV heads of pages of 16 tokens.
    assert read == {None: 64, 128: 16, 512: 64}


WRONG_REQUESTS = {
    "too much": ({"specontext_budget": 1024}, "found 1024, but requests of this engine may have"),
    "text": ({"specontext_budget": "512"}, "specontext_budget: found '512'; give a whole number"),
    "dense": ({"specontext_mode": "dense"}, "max_budget full, or leave it out."),
    "a slip": ({"specontext_bugdet": 128}, "did you mean specontext_budget?"),
}


@pytest.mark.parametrize("name", WRONG_REQUESTS)
@pytest.mark.parametrize("stream", [False, True], ids=["at once", "streamed"])
def test_a_wrong_budget_is_a_bad_request_with_its_sentence(client, name, stream):
    asked, sentence = WRONG_REQUESTS[name]
    problem = needle(4, 300)
    with pytest.raises(BadRequestError) as caught:
        client.chat.completions.create(
            model="demo",
            messages=problem.messages,
            max_tokens=4,
            stream=stream,
            extra_body={"vllm_xargs": asked},
        )
    assert caught.value.status_code == 400 and sentence in caught.value.message
    assert reply(client, problem)


def test_concurrent_requests_answer_as_alone(client):
    problems = [needle(10 + i, tokens) for i, tokens in enumerate((300, 1000, 2000, 2500))]
    with ThreadPoolExecutor(len(problems)) as pool:
        together = list(pool.map(lambda problem: reply(client, problem), problems))
    alone = [reply(client, problem) for problem in problems]
    assert together == alone
    assert (
        sum(score(problem, text) for problem, text in zip(problems, together, strict=True))
        >= len(problems) - 1
    ), together


def test_an_aborted_stream_leaves_the_server_well(client):
    problem = needle(3, 2000)
    expected = reply(client, problem)
    with client.chat.completions.create(
        model="demo",
        messages=problem.messages,
        max_tokens=2000,
        stream=True,
        extra_body={"ignore_eos": True},
    ) as stream:
        next(iter(stream))
    assert reply(client, problem) == expected


REFUSED_SECONDS = 180
REFUSALS = {
    "budget below sinks and recents": ({"budget": 8}, "budget: found 8"),
    "unknown key": ({"buget": 512}, "unknown key 'buget'; did you mean 'budget'?"),
    "no head": ({}, "retrieval_head: none given"),
}


@pytest.fixture(scope="session")
def refused(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[int, str]]:
    """Exit code and stderr of the starts in ``REFUSALS``."""
    headless = tmp_path_factory.mktemp("headless")
    for file in DEMO_MODEL.iterdir():
        if file.is_file():
            (headless / file.name).symlink_to(file.resolve())
    found, running = {}, {}
    for name, (settings, _) in REFUSALS.items():
        command = serve_command(
            headless if name == "no head" else DEMO_MODEL,
            "--attention-backend",
            "specontext",
            "--port",
            "0",
            "--additional-config",
            json.dumps({"specontext": settings}),
            *device_arguments(),
        )
        with (headless / f"{name}.log").open("wb") as log:
            running[name] = ServerProcess(
                command, cwd=headless, env=server_environment(), stdout=log
            )
    for name, process in running.items():
        try:
            code = process.wait(REFUSED_SECONDS)
        finally:
            process.kill()
        found[name] = code, (headless / f"{name}.log").read_text()
    return found


@pytest.mark.slow
@pytest.mark.parametrize("name", REFUSALS, ids=str)
def test_a_wrong_config_ends_the_start_with_its_sentence(refused, name):
    code, stderr = refused[name]
    assert code != 0, stderr[-2000:]
    assert REFUSALS[name][1] in stderr, stderr[-2000:]
    # Before any engine process: what the user sees last is the sentence.
    assert "EngineCore failed to start" not in stderr
