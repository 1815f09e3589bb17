"""Case `soak`: a real server kept full for long, with requests that come, go and are given up; nothing wrong, nothing lost, no growth."""

from __future__ import annotations

import asyncio
import json
import tempfile
import time
import urllib.request
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Annotated, Any

import typer

from benchmarks import report
from benchmarks.children import ChildError, engine_env, run_child
from benchmarks.machine import gpus
from benchmarks.shapes import DEMO_MODEL
from specontext_vllm.config import PAGE_SIZE

MAX_MODEL_LEN = 1024
PROMPTS = 200
"""Different prompts; each comes many times, so that some hit the prefix cache and some find their pages evicted."""
ANSWER_TOKENS = 48
SAMPLE_SECONDS = 2.0
"""Time between two looks at the server's memory."""
WARM_UP_SHARE = 0.5
"""Share of the requests after which memory must not grow any more: that of a process of this size levels off only after some 5,000 requests."""
GROWTH = 0.02
"""Growth of resident memory, over the rest of the run, that counts as none."""
REQUEST_SECONDS = 300
"""Longest wait for one answer."""


@dataclass(frozen=True)
class Load:
    """What is asked: prompts, and the tokens that dense attention answers.

    Attributes:
        prompts, references: token ids, one reference per prompt.
        requests: how many requests in all; None: until ``seconds`` are over.
        seconds: time limit of the load; None: none.
        concurrency: requests in flight on the client's side, more than the engine runs at once.
        seed: of lengths, kinds and order.
    """

    prompts: list[list[int]]
    references: list[list[int]]
    requests: int | None
    seconds: float | None
    concurrency: int
    seed: int = 0


@dataclass
class Outcome:
    """What came of a load.

    Attributes:
        counts: requests by kind ("whole", "streamed", "given up"), "wrong" and "failed".
        wrong, failed: the first few of them, described.
        memory: ``(seconds, requests done, bytes)`` samples of the server's resident memory.
    """

    counts: Counter[str] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)
    failed: list[str] = field(default_factory=list)
    memory: list[tuple[float, int, int]] = field(default_factory=list)
    seconds: float = 0.0

    @property
    def done(self) -> int:
        return sum(self.counts[kind] for kind in ("whole", "streamed", "given up"))

    def growth(self) -> float | None:
        """Relative growth of the median memory from the first to the last third of the samples after warm-up; None with too few."""
        import numpy as np

        after = [size for _, done, size in self.memory if done >= WARM_UP_SHARE * self.done]
        third = len(after) // 3
        return float(np.median(after[-third:]) / np.median(after[:third]) - 1) if third else None


def make_prompts(model: Path, count: int = PROMPTS) -> list[list[int]]:
    """Token ids of demo problems of 200 to 900 tokens, and, one in five, of only their first tokens: 1 to 100 of them."""
    from transformers import AutoTokenizer

    from specontext_vllm.demo.tasks import make_problem

    tokenizer = AutoTokenizer.from_pretrained(str(model))
    rng = Random(0)
    prompts = []
    for seed in range(count):
        problem = make_problem("recitation" if seed % 3 == 2 else "needle", seed=20_000 + seed, approx_tokens=rng.randint(200, 900))
        ids = tokenizer.apply_chat_template(problem.messages, add_generation_prompt=True, tokenize=True, return_dict=False)
        ids = ids[: MAX_MODEL_LEN - ANSWER_TOKENS]
        prompts.append(ids[: rng.choice((1, 2, 15, 16, 17, rng.randint(18, 100)))] if seed % 5 == 4 else ids)
    return prompts


def answer_densely(model: str, on_gpu: bool, prompts: list[list[int]]) -> Iterator[tuple[str, Any]]:
    """Stock vLLM's greedy answers; runs in a child. Yields ``("references", token ids per prompt)``."""
    from vllm import LLM, SamplingParams

    arguments: dict[str, Any] = {"attention_backend": "FLASH_ATTN", "gpu_memory_utilization": 0.3} if on_gpu else {"dtype": "float32"}
    llm = LLM(model=model, max_model_len=MAX_MODEL_LEN, max_num_seqs=16, enforce_eager=True, seed=0, **arguments)
    params = SamplingParams(temperature=0, max_tokens=ANSWER_TOKENS, detokenize=False)
    outputs = llm.generate([{"prompt_token_ids": ids} for ids in prompts], params, use_tqdm=False)
    yield "references", [list(output.outputs[0].token_ids) for output in outputs]


def server_arguments(settings: dict[str, Any] | None, pages: int | None, max_num_seqs: int) -> list[str]:
    """Options of `vllm serve`, without specontext if there are no ``settings``; few ``pages``: running requests run out of them and are preempted."""
    from specontext_vllm.demo.server import device_arguments, has_gpu

    # vLLM's own CPU attention takes no blocks of 16 tokens; as many tokens in all.
    block_size = 32 if settings is None and not has_gpu() else PAGE_SIZE
    pages = pages and -(-pages * PAGE_SIZE // block_size)
    plugin = [] if settings is None else ["--attention-backend", "specontext", "--additional-config", json.dumps({"specontext": settings})]
    return [
        *plugin, "--block-size", str(block_size), "--max-model-len", str(MAX_MODEL_LEN),
        "--max-num-seqs", str(max_num_seqs), "--max-num-batched-tokens", "512", "--gpu-memory-utilization", "0.3", "--served-model-name", "demo",
        *(("--num-gpu-blocks-override", str(pages)) if pages else ()), *device_arguments(),
    ]  # fmt: skip


async def apply_load(server: Any, load: Load) -> Outcome:
    """Keep ``load.concurrency`` requests in flight until all are done."""
    import aiohttp

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
            await ask(session, server.url, load, rng, outcome)

    async def watch() -> None:
        while not ended.is_set():
            outcome.memory.append((time.monotonic() - begin, outcome.done, server.resident_bytes()))
            await asyncio.wait([asyncio.create_task(ended.wait())], timeout=SAMPLE_SECONDS)

    limits = aiohttp.ClientTimeout(total=REQUEST_SECONDS)
    async with aiohttp.ClientSession(timeout=limits, connector=aiohttp.TCPConnector(limit=0)) as session:
        watcher = asyncio.create_task(watch())
        await asyncio.gather(*(client(session, i) for i in range(load.concurrency)))
        ended.set()
        await watcher
    outcome.seconds = time.monotonic() - begin
    return outcome


async def ask(session: Any, url: str, load: Load, rng: Random, outcome: Outcome) -> None:
    """One request: its whole answer, a stream, or a stream that the client leaves before its end."""
    import aiohttp

    index = rng.randrange(len(load.prompts))
    prompt, reference = load.prompts[index], load.references[index]
    limit = ANSWER_TOKENS if rng.random() < 0.5 else rng.randint(1, ANSWER_TOKENS)
    kind = rng.choices(("whole", "streamed", "given up"), (6, 2, 2))[0]
    leave_after = rng.randint(0, 12) if kind == "given up" else None
    body = {"model": "demo", "prompt": prompt, "max_tokens": limit, "temperature": 0, "return_token_ids": True, "stream": kind != "whole"}
    got: list[int] = []
    try:
        async with session.post(f"{url}/v1/completions", json=body) as response:
            if response.status != 200:
                raise aiohttp.ClientError(f"status {response.status}: {(await response.text())[:200]}")
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
    wanted = reference[:limit]
    if got != (wanted[: len(got)] if kind == "given up" else wanted):
        outcome.counts["wrong"] += 1
        outcome.wrong.append(f"prompt {index} ({len(prompt)} tokens), {kind}, at most {limit} tokens: {got} instead of {wanted}")


async def read_stream(response: Any, leave_after: int | None) -> list[int]:
    """Token ids of a server-sent stream; closes the connection after ``leave_after`` events."""
    got: list[int] = []
    events = 0
    async for line in response.content:
        if not line.startswith(b"data:") or line.strip() == b"data: [DONE]":
            continue
        if leave_after is not None and events >= leave_after:
            response.close()
            break
        events += 1
        for choice in json.loads(line[5:])["choices"]:
            got += choice["token_ids"] or []
    return got


def metric(url: str, name: str) -> float:
    """Sum of a vLLM metric over its labels."""
    from prometheus_client.parser import text_string_to_metric_families

    with urllib.request.urlopen(f"{url}/metrics", timeout=30) as response:
        families = text_string_to_metric_families(response.read().decode())
        return sum(sample.value for family in families for sample in family.samples if sample.name == name)


def settle(server: Any, prompt: list[int], plugin: bool) -> dict[str, Any]:
    """Wait until the server is idle, and count what it still holds; of the worker's books only where the ``plugin`` keeps some.

    One more short request makes the worker hear of the last requests' end, and is itself still in the books then.
    """
    deadline = time.monotonic() + 60
    while metric(server.url, "vllm:num_requests_running") + metric(server.url, "vllm:num_requests_waiting") and time.monotonic() < deadline:
        time.sleep(0.5)
    body = json.dumps({"model": "demo", "prompt": prompt[:4], "max_tokens": 2, "temperature": 0}).encode()
    urllib.request.urlopen(urllib.request.Request(f"{server.url}/v1/completions", body, {"Content-Type": "application/json"}), timeout=60).read()
    time.sleep(1)
    return {
        "running": metric(server.url, "vllm:num_requests_running"), "waiting": metric(server.url, "vllm:num_requests_waiting"),
        "kv_cache_usage": metric(server.url, "vllm:kv_cache_usage_perc"), "preemptions": metric(server.url, "vllm:num_preemptions_total"),
        "prefix_hit_tokens": metric(server.url, "vllm:prefix_cache_hits_total"), "books": server.rpc("specontext_audit") if plugin else {},
        "stats": server.rpc("specontext_stats") if plugin else {},
    }  # fmt: skip


def soak(model: Path, load: Load, settings: dict[str, Any] | None, pages: int | None, max_num_seqs: int) -> tuple[Outcome, dict[str, Any]]:
    """Start a server, apply the load, and look at what is left; ``(outcome, settle's figures)``."""
    from specontext_vllm.demo.server import VllmServer

    with VllmServer(model, server_arguments(settings, pages, max_num_seqs)) as server:
        outcome = asyncio.run(apply_load(server, load))
        return outcome, settle(server, load.prompts[0], settings is not None)


def complaints(outcome: Outcome, left: dict[str, Any], exact: bool) -> dict[str, str]:
    """What is not as it must be, by name; empty after a good run.

    Args:
        exact: whether every token must be the reference's.
    """
    found: dict[str, str] = {}
    if exact and outcome.wrong:
        found["wrong tokens"] = f"{outcome.counts['wrong']} answers, such as {outcome.wrong[0]}"
    if outcome.failed:
        found["failed requests"] = f"{outcome.counts['failed']}, such as {outcome.failed[0]}"
    growth = outcome.growth()
    if growth is not None and growth > GROWTH:
        found["memory"] = f"resident memory grew by {growth:.1%} after warm-up"
    if left["running"] or left["waiting"] or left["kv_cache_usage"] > 0:
        found["requests left"] = f"{left['running']:.0f} running, {left['waiting']:.0f} waiting, {left['kv_cache_usage']:.1%} of the pages in use"
    if left["books"].get("requests", 0) > 1:
        found["lanes left"] = f"{left['books']['requests']} requests in the worker's books"
    return found


TABLES = {
    "Load": (
        report.Column("name", "engine"),
        report.Column("requests", "requests", ",d"),
        report.Column("given_up", "of them given up", ",d"),
        report.Column("preemptions", "preemptions", ",d"),
        report.Column("hit_tokens", "tokens from the prefix cache", ",d"),
        report.Column("per_second", "requests/s", ".1f"),
        report.Column("minutes", "minutes", ".1f"),
    ),
    "Outcome": (
        report.Column("name", "engine"),
        report.Column("wrong", "answers with other tokens than dense", ",d"),
        report.Column("failed", "failed", ",d"),
        report.Column("memory_gib", "resident memory, GiB", ".2f"),
        report.Column("growth", "growth after warm-up", ".2%"),
        report.Column("pages_left", "pages in use at the end", ".1%"),
        report.Column("layer_moves", "layer moves", ",d"),
    ),
}


def make_row(title: str, outcome: Outcome, left: dict[str, Any]) -> dict[str, Any]:
    """One row of both tables."""
    return {
        "name": title, "requests": outcome.done, "given_up": outcome.counts["given up"], "preemptions": int(left["preemptions"]),
        "hit_tokens": int(left["prefix_hit_tokens"]), "per_second": outcome.done / outcome.seconds, "minutes": outcome.seconds / 60,
        "wrong": outcome.counts["wrong"], "failed": outcome.counts["failed"], "memory_gib": outcome.memory[-1][2] / 2**30,
        "growth": outcome.growth(), "pages_left": left["kv_cache_usage"], "layer_moves": left["stats"].get("layer_moves"),
    }  # fmt: skip


@dataclass(frozen=True)
class Engine:
    """One server.

    Attributes:
        title: what the tables call it.
        settings: of the plugin; None: vLLM without it.
        pages: KV room, in pages of 16 tokens.
        exact: whether every token must be dense attention's.
    """

    title: str
    settings: dict[str, Any] | None
    pages: int
    exact: bool


ENGINES = {
    # A budget over every context: the tokens are dense attention's, under preemption too.
    "one-tier": Engine("one tier, budget over the context", {"budget": MAX_MODEL_LEN}, 321, True),
    # Pages of generated tokens are made anew, densely, after a preemption, so that a small budget's tokens hang on the schedule.
    "two-tiers": Engine("two tiers, budget 192", {"budget": 192, "host_kv_gib": 0.5, "gpu_kv_gib": 0.026}, 401, False),
    # What vLLM does by itself under this load, its growth of memory above all.
    "stock": Engine("stock vLLM", None, 321, True),
}


def chosen_engines(text: str) -> list[str]:
    """Names out of ``--engines``.

    Raises:
        typer.BadParameter: one is unknown.
    """
    names = text.split(",")
    for name in names:
        if name not in ENGINES:
            raise typer.BadParameter(f"--engines: found {name!r}; use some of {', '.join(ENGINES)}.")
    return names


def tabulate(result: report.Report) -> None:
    """Rows and failures anew from the details, so that what an earlier run measured is judged as a new one."""
    result.rows, result.failures = [], {}
    for name, engine in ENGINES.items():
        if name not in result.details:
            continue
        found = result.details[name]
        outcome = Outcome(Counter(found["counts"]), found["wrong"], found["failed"], found["memory"], found["seconds"])
        result.rows.append(make_row(engine.title, outcome, found["left"]))
        result.failures |= {f"{engine.title}: {what}": why for what, why in complaints(outcome, found["left"], engine.exact).items()}


def run_notes(details: dict[str, Any]) -> list[str]:
    """Which command measured which engine, where several have."""
    runs: dict[str, list[str]] = {}
    for name, found in details.items():
        runs.setdefault(f"{found['date']} (`{found['command']}`, commit {found['commit']})", []).append(ENGINES[name].title)
    return ["Several commands made this table. " + "; ".join(f"{run}: {', '.join(titles)}" for run, titles in sorted(runs.items())) + "."] if len(runs) > 1 else []


def main(
    model: Annotated[Path, typer.Option(help="Model folder with a retrieval_head/ folder in it.")] = DEMO_MODEL,
    engines: Annotated[str, typer.Option(help="Some of them; the others' figures stay as an earlier run in --out left them.")] = ",".join(ENGINES),
    requests: Annotated[int, typer.Option(min=10, help="Requests for each engine.")] = 10_000,
    seconds: Annotated[float | None, typer.Option(help="Time limit of each engine's load.")] = None,
    max_num_seqs: Annotated[int, typer.Option(help="Requests the engine runs at once; half as many more wait.")] = 16,
    out: Annotated[Path, typer.Option(help="Folder of the result files.")] = report.RESULTS,
    work: Annotated[Path | None, typer.Option(help="Folder of the references' log; default a new temporary one.")] = None,
) -> None:
    """Keep a server full of mixed requests, aborts and preemptions, and compare every answer. Exit code 1 if anything is wrong or left over."""
    names = chosen_engines(engines)
    folder = work or Path(tempfile.mkdtemp(prefix="specontext-bench-"))
    folder.mkdir(parents=True, exist_ok=True)
    on_gpu = bool(gpus())
    prompts = make_prompts(model)
    result = report.Report("soak", f"Demo model: requests of 1 to {MAX_MODEL_LEN} tokens at a full server", TABLES)
    notes = [
        f"{len(prompts)} prompts of 1 to {max(map(len, prompts))} tokens in random order, up to {ANSWER_TOKENS} tokens asked for; six in ten answers are "
        f"taken whole, two streamed, two given up in the stream. References: stock vLLM, dense, recorded before. {max_num_seqs} requests run at once, "
        f"half as many more wait.",
        f"Growth: median resident memory of the server's processes in the last third against the first third of the samples after the first "
        f"{WARM_UP_SHARE:.0%} of the requests; up to {GROWTH:.0%} counts as none.",
        "With the small budget an answer may differ from dense attention's, and after a preemption from its own undisturbed run; the number says how many did.",
    ]
    try:
        (kind_and_references,) = run_child(answer_densely, str(model), on_gpu, prompts, log=folder / "references.log", seconds=1800, env=engine_env(on_gpu))
    except ChildError as error:
        typer.echo(f"the references could not be made: {error}", err=True)
        raise typer.Exit(1) from None
    load = Load(prompts, kind_and_references[1], requests, seconds, max_num_seqs + max_num_seqs // 2)
    result.take_over(out, same=())
    for name in names:
        engine = ENGINES[name]
        print(f"{engine.title}: starting", flush=True)
        outcome, left = soak(model, load, engine.settings, engine.pages, max_num_seqs)
        result.details[name] = {
            "date": result.date, "command": result.command, "commit": result.machine["commit"], "settings": engine.settings, "pages": engine.pages, "seconds": outcome.seconds,
            "counts": dict(outcome.counts), "wrong": outcome.wrong[:20], "failed": outcome.failed[:20], "memory": outcome.memory, "left": left,
        }  # fmt: skip
        tabulate(result)
        result.notes = [*notes, *run_notes(result.details)]
        result.write(out)
        print(f"{engine.title}: {outcome.done} requests in {outcome.seconds:.0f} s, {outcome.counts['wrong']} with other tokens", flush=True)
    result.show()
    raise typer.Exit(1 if result.failures else 0)
