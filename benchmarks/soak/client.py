"""The client: keeps a server full of requests and judges every answer."""

from __future__ import annotations

import asyncio
import json
import time
from dataclasses import dataclass
from random import Random
from typing import Any

import aiohttp

from benchmarks.near_tie import NEAR_TIE_CPU
from benchmarks.soak.outcome import Outcome

ANSWER_TOKENS = 48
"""The most tokens that a request asks for."""
SAMPLE_SECONDS = 2.0
"""Time between two looks at the server's memory."""
REQUEST_SECONDS = 300
"""Longest wait for one answer."""


@dataclass(frozen=True)
class Load:
    """The requests: prompts, and the tokens that dense attention answers.

    Attributes:
        prompts, references: token ids, one reference per prompt.
        gaps: per reference and token, how much less log-probability the second likeliest token has.
        near_tie: smaller gaps than this leave the token open.
        requests: how many requests in all; None: until ``seconds`` are over.
        seconds: time limit of the load; None: none.
        concurrency: requests in flight on the client's side, more than the engine runs at once.
        seed: of lengths, kinds and order.
    """

    prompts: list[list[int]]
    references: list[list[int]]
    gaps: list[list[float]]
    requests: int | None
    seconds: float | None
    concurrency: int
    near_tie: float = NEAR_TIE_CPU
    seed: int = 0

    def judge(
        self, index: int, got: list[int], limit: int, whole: bool
    ) -> tuple[str | None, float | None]:
        """Compare an answer of at most ``limit`` tokens, ``whole`` or given up, with its reference.

        Returns:
            "wrong", "near tie" or None, and the gap of the first token that differs; None where
            none does.
        """
        wanted = self.references[index][:limit]
        wanted = wanted if whole else wanted[: len(got)]
        if got == wanted:
            return None, None
        parted = next(
            (i for i, (ours, theirs) in enumerate(zip(got, wanted)) if ours != theirs), None
        )
        if parted is None:
            return "wrong", None
        gap = self.gaps[index][parted]
        return "near tie" if gap < self.near_tie else "wrong", gap


def client_session() -> aiohttp.ClientSession:
    """A client with a connection of its own for each request; make it in an event loop.

    uvicorn closes a connection that is idle for five seconds. On a busy machine a client may take
    as long between an answer and its next request; reusing the connection would then fail a request
    that the server never saw.
    """
    limits = aiohttp.ClientTimeout(total=REQUEST_SECONDS)
    return aiohttp.ClientSession(
        timeout=limits, connector=aiohttp.TCPConnector(limit=0, force_close=True)
    )


async def apply_load(server: Any, load: Load) -> Outcome:
    """Keep ``load.concurrency`` requests in flight until all are done."""
    outcome, begin = Outcome(), time.monotonic()
    numbers = iter(range(load.requests)) if load.requests else iter(int, 1)
    ended = asyncio.Event()

    def due() -> bool:
        return load.seconds is not None and time.monotonic() - begin > load.seconds

    async def client(session: aiohttp.ClientSession, first: int) -> None:
        rng = Random(f"{load.seed}/{first}")
        for _ in numbers:
            if due():
                return
            await send_request(session, server.url, load, rng, outcome)

    async def watch() -> None:
        while not ended.is_set():
            outcome.memory.append((time.monotonic() - begin, outcome.done, server.resident_bytes()))
            await asyncio.wait([asyncio.create_task(ended.wait())], timeout=SAMPLE_SECONDS)

    async with client_session() as session:
        watcher = asyncio.create_task(watch())
        await asyncio.gather(*(client(session, i) for i in range(load.concurrency)))
        ended.set()
        await watcher
    outcome.seconds = time.monotonic() - begin
    return outcome


async def send_request(session: Any, url: str, load: Load, rng: Random, outcome: Outcome) -> None:
    """One request: its whole answer, a stream, or a stream that the client gives up."""
    index = rng.randrange(len(load.prompts))
    prompt = load.prompts[index]
    limit = ANSWER_TOKENS if rng.random() < 0.5 else rng.randint(1, ANSWER_TOKENS)
    kind = rng.choices(("whole", "streamed", "given up"), (6, 2, 2))[0]
    leave_after = rng.randint(0, 12) if kind == "given up" else None
    body = {
        "model": "demo",
        "prompt": prompt,
        "max_tokens": limit,
        "temperature": 0,
        "return_token_ids": True,
        "stream": kind != "whole",
    }
    got: list[int] = []
    try:
        async with session.post(f"{url}/v1/completions", json=body) as response:
            if response.status != 200:
                raise aiohttp.ClientError(
                    f"status {response.status}: {(await response.text())[:200]}"
                )
            if kind == "whole":
                got = (await response.json())["choices"][0]["token_ids"]
            else:
                got = await read_stream(response, leave_after)
    except (aiohttp.ClientError, TimeoutError) as error:
        outcome.counts["failed"] += 1
        outcome.failed.append(f"prompt {index}: {type(error).__name__} {error}")
        await asyncio.sleep(0.5)
        return
    outcome.counts[kind] += 1
    verdict, gap_there = load.judge(index, got, limit, whole=kind != "given up")
    if gap_there is not None:
        outcome.partings.append(gap_there)
    if verdict:
        outcome.counts[verdict] += 1
        if verdict == "wrong":
            wanted = load.references[index][:limit]
            outcome.wrong.append(
                f"prompt {index} ({len(prompt)} tokens), {kind}, at most {limit} tokens: {got} "
                f"instead of {wanted}"
            )


async def read_stream(response: Any, leave_after: int | None) -> list[int]:
    """Token ids of a server-sent stream; closes the connection after ``leave_after`` events.

    Raises:
        aiohttp.ClientPayloadError: the server ended the stream with an error.
    """
    got: list[int] = []
    events = 0
    async for line in response.content:
        if not line.startswith(b"data:") or line.strip() == b"data: [DONE]":
            continue
        if leave_after is not None and events >= leave_after:
            response.close()
            break
        events += 1
        event = json.loads(line[5:])
        if "error" in event:
            raise aiohttp.ClientPayloadError(f"the stream ends with {event['error']}")
        for choice in event["choices"]:
            got += choice["token_ids"] or []
    return got
