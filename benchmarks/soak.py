"""Case `soak`: a real server kept full for long, with requests that come, go and are given up;
nothing wrong, nothing lost, no growth.
"""

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

import aiohttp
import typer

from benchmarks import report
from benchmarks.children import ChildError, engine_env, run_child
from benchmarks.machine import gpus
from benchmarks.serving import write_tokenizer
from benchmarks.shapes import DEMO_MODEL, NAMES, Shape
from specontext_vllm.config import PAGE_SIZE

MAX_MODEL_LEN = 1024
PROMPTS = 200
"""Different prompts; each comes many times, so that some hit the prefix cache and some find their
pages evicted.
"""
ANSWER_TOKENS = 48
SAMPLE_SECONDS = 2.0
"""Time between two looks at the server's memory."""
WARM_UP_SHARE = 0.5
"""Share of the requests after which memory must not grow any more: that of a process of this size
levels off only after some 5,000 requests.
"""
GROWTH = 0.02
"""Growth of resident memory, over the rest of the run, that counts as none."""
MEMORY_SHARE_CPU, MEMORY_SHARE_GPU = 0.3, 0.28
"""vLLM's --gpu-memory-utilization; of an H200 that holds an 8B model's weights in float32 and some
room, three times side by side.
"""
KV_BYTES_GPU = 4 << 30
"""Room for KV on a GPU. Named, not found out: vLLM measures what is free, and a soak beside this
one may be using it.
"""
REFERENCES_AT_ONCE, REFERENCE_TOKENS = 64, 4096
"""Requests and prompt tokens of a step while the references are recorded."""
REQUEST_SECONDS = 300
"""Longest wait for one answer."""
NEAR_TIE_CPU, NEAR_TIE_GPU = 1e-4, 0.05
"""Distance of the two likeliest tokens' log-probabilities under which either may come out of
another order of the same sums: in float32 on a CPU, and on a GPU, where vLLM's Triton attention
    multiplies float32 in tf32 (some three digits) and our decode kernel does not."""


@dataclass(frozen=True)
class Load:
    """What is asked: prompts, and the tokens that dense attention answers.

    Attributes:
        prompts, references: token ids, one reference per prompt.
        gaps: per reference and token, how far the second likeliest token is behind in
            log-probability.
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
        """What is to be said of an answer to a prompt, of at most ``limit`` tokens, ``whole`` or
        given up: "wrong", "near tie" or nothing.

        With it the gap of the token at which the answer parted from the reference, if it did at
        one.
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


@dataclass
class Outcome:
    """What came of a load.

    Attributes:
        counts: requests by kind ("whole", "streamed", "given up"), "wrong", "near tie" and
            "failed".
        wrong, failed: the first few of them, described.
        partings: the gap of every token at which an answer parted from its reference.
        memory: ``(seconds, requests done, bytes)`` samples of the server's resident memory.
    """

    counts: Counter[str] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)
    failed: list[str] = field(default_factory=list)
    partings: list[float] = field(default_factory=list)
    memory: list[tuple[float, int, int]] = field(default_factory=list)
    seconds: float = 0.0

    @property
    def done(self) -> int:
        return sum(self.counts[kind] for kind in ("whole", "streamed", "given up"))

    def growth(self) -> float | None:
        """Relative growth of the median memory from the first to the last third of the samples
        after warm-up; None with too few.
        """
        import numpy as np

        after = [size for _, _, size in self._after_warm_up()]
        third = len(after) // 3
        return float(np.median(after[-third:]) / np.median(after[:third]) - 1) if third else None

    def slope(self) -> float | None:
        """Bytes of memory a request after warm-up, by least squares; None with too few samples."""
        import numpy as np

        after = self._after_warm_up()
        return (
            float(np.polyfit([done for _, done, _ in after], [size for _, _, size in after], 1)[0])
            if len(after) > 2
            else None
        )

    def _after_warm_up(self) -> list[tuple[float, int, int]]:
        return [sample for sample in self.memory if sample[1] >= WARM_UP_SHARE * self.done]


def make_prompts(model: Path, count: int = PROMPTS) -> list[list[int]]:
    """Token ids of 200 to 900 tokens, and, one in five, of only their first tokens, 1 to 100 of
    them: demo problems, or for another model random ones.
    """
    from transformers import AutoTokenizer

    from specontext_vllm.synthetic.tasks import make_problem

    tokenizer = AutoTokenizer.from_pretrained(str(model))
    rng = Random(0)
    prompts = []
    for seed in range(count):
        length = rng.randint(200, 900)
        if model.resolve() == DEMO_MODEL.resolve():
            problem = make_problem(
                "recitation" if seed % 3 == 2 else "needle",
                seed=20_000 + seed,
                approx_tokens=length,
            )
            ids = tokenizer.apply_chat_template(
                problem.messages, add_generation_prompt=True, tokenize=True, return_dict=False
            )
        else:
            ids = [rng.randrange(tokenizer.vocab_size) for _ in range(length)]
        ids = ids[: MAX_MODEL_LEN - ANSWER_TOKENS]
        prompts.append(
            ids[: rng.choice((1, 2, 15, 16, 17, rng.randint(18, 100)))] if seed % 5 == 4 else ids
        )
    return prompts


def write_random_model(shape: Shape, folder: Path) -> Path:
    """A model of the shape whose weights are drawn as a new model's are: vLLM's own dummy weights
    are so small that attention hardly counts.
    """
    import torch
    from safetensors.torch import save_file
    from transformers import AutoConfig, AutoModelForCausalLM

    shape.write(folder)
    write_tokenizer(shape, folder)
    with torch.device("meta"):
        skeleton = AutoModelForCausalLM.from_config(
            AutoConfig.from_pretrained(folder), dtype=torch.bfloat16
        )
    device = "cuda" if torch.cuda.is_available() else "cpu"
    generator = torch.Generator(device).manual_seed(0)
    tensors = {}
    for name, tensor in skeleton.state_dict().items():
        drawn = torch.empty(tensor.shape, dtype=torch.bfloat16, device=device)
        tensors[name] = (
            drawn.fill_(1.0)
            if drawn.dim() == 1
            else drawn.normal_(0.0, skeleton.config.initializer_range, generator=generator)
        ).cpu()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def answer_densely(model: str, on_gpu: bool, prompts: list[list[int]]) -> Iterator[tuple[str, Any]]:
    """Stock vLLM's greedy answers; runs in a child. Yields
    ``("references", (token ids per prompt, gaps per prompt))``.
    """
    from vllm import LLM, SamplingParams

    share = MEMORY_SHARE_GPU if on_gpu else MEMORY_SHARE_CPU
    llm = LLM(
        model=model,
        dtype="float32",
        max_model_len=MAX_MODEL_LEN,
        max_num_seqs=REFERENCES_AT_ONCE,
        max_num_batched_tokens=REFERENCE_TOKENS,
        enforce_eager=True,
        seed=0,
        gpu_memory_utilization=share,
        kv_cache_memory_bytes=KV_BYTES_GPU if on_gpu else None,
    )
    params = SamplingParams(temperature=0, max_tokens=ANSWER_TOKENS, detokenize=False, logprobs=2)
    outputs = [
        output.outputs[0]
        for output in llm.generate(
            [{"prompt_token_ids": ids} for ids in prompts], params, use_tqdm=False
        )
    ]
    yield (
        "references",
        (
            [list(output.token_ids) for output in outputs],
            [[gap(step) for step in output.logprobs] for output in outputs],
        ),
    )


def gap(logprobs: dict[int, Any]) -> float:
    """Between the two likeliest of a step's tokens."""
    best, second = sorted((entry.logprob for entry in logprobs.values()), reverse=True)[:2]
    return best - second


def server_arguments(settings: dict[str, Any] | None, pages: int, max_num_seqs: int) -> list[str]:
    """Options of `vllm serve`, without specontext if there are no ``settings``; few ``pages``:
    running requests run out of them and are preempted.
    """
    from specontext_vllm.demo.server import device_arguments, has_gpu

    on_gpu = has_gpu()
    # vLLM's own CPU attention takes no blocks of 16 tokens; as many tokens in all.
    block_size = 32 if settings is None and not on_gpu else PAGE_SIZE
    pages = -(-pages * PAGE_SIZE // block_size)
    plugin = (
        []
        if settings is None
        else [
            "--attention-backend",
            "specontext",
            "--additional-config",
            json.dumps({"specontext": settings}),
        ]
    )
    return [
        *plugin,
        "--block-size",
        str(block_size),
        "--max-model-len",
        str(MAX_MODEL_LEN),
        "--max-num-seqs",
        str(max_num_seqs),
        "--max-num-batched-tokens",
        "512",
        "--served-model-name",
        "demo",
        "--gpu-memory-utilization",
        str(MEMORY_SHARE_GPU if on_gpu else MEMORY_SHARE_CPU),
        "--num-gpu-blocks-override",
        str(pages),
        *(
            ["--dtype", "float32", "--kv-cache-memory-bytes", str(KV_BYTES_GPU)]
            if on_gpu
            else device_arguments()
        ),
    ]


def client_session() -> aiohttp.ClientSession:
    """A client of any number of connections, one a request; to be made in an event loop.

    uvicorn closes a connection that is idle for five seconds. A client that a busy machine holds up
    for as long, between an answer and its next request, would write into a connection that is gone,
    and a request that the server never saw would count as failed.
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
            await ask(session, server.url, load, rng, outcome)

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


async def ask(session: Any, url: str, load: Load, rng: Random, outcome: Outcome) -> None:
    """One request: its whole answer, a stream, or a stream that the client leaves before its end."""
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


def metric(url: str, name: str) -> float:
    """Sum of a vLLM metric over its labels."""
    from prometheus_client.parser import text_string_to_metric_families

    with urllib.request.urlopen(f"{url}/metrics", timeout=30) as response:
        families = text_string_to_metric_families(response.read().decode())
        return sum(
            sample.value for family in families for sample in family.samples if sample.name == name
        )


def settle(server: Any, prompt: list[int], plugin: bool) -> dict[str, Any]:
    """Wait until the server is idle, and count what it still holds; of the worker's books only
    where the ``plugin`` keeps some.

    One more short request makes the worker hear of the last requests' end, and is itself still in
    the books then.
    """
    deadline = time.monotonic() + 60
    while (
        metric(server.url, "vllm:num_requests_running")
        + metric(server.url, "vllm:num_requests_waiting")
        and time.monotonic() < deadline
    ):
        time.sleep(0.5)
    body = json.dumps(
        {"model": "demo", "prompt": prompt[:4], "max_tokens": 2, "temperature": 0}
    ).encode()
    urllib.request.urlopen(
        urllib.request.Request(
            f"{server.url}/v1/completions", body, {"Content-Type": "application/json"}
        ),
        timeout=60,
    ).read()
    time.sleep(1)
    return {
        "running": metric(server.url, "vllm:num_requests_running"),
        "waiting": metric(server.url, "vllm:num_requests_waiting"),
        "kv_cache_usage": metric(server.url, "vllm:kv_cache_usage_perc"),
        "preemptions": metric(server.url, "vllm:num_preemptions_total"),
        "prefix_hit_tokens": metric(server.url, "vllm:prefix_cache_hits_total"),
        "books": server.rpc("specontext_audit") if plugin else {},
        "stats": server.rpc("specontext_stats") if plugin else {},
    }


def soak(
    model: Path, load: Load, settings: dict[str, Any] | None, pages: int, max_num_seqs: int
) -> tuple[Outcome, dict[str, Any]]:
    """Start a server, apply the load, and look at what is left; ``(outcome, settle's figures)``."""
    from specontext_vllm.demo.server import VllmServer

    with VllmServer(model, server_arguments(settings, pages, max_num_seqs)) as server:
        return put_under(load, server, settings is not None)


def put_under(load: Load, server: Any, plugin: bool) -> tuple[Outcome, dict[str, Any]]:
    """The same with a server that runs, with our ``plugin`` or without."""
    outcome = asyncio.run(apply_load(server, load))
    return outcome, settle(server, load.prompts[0], plugin)


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
        found["requests left"] = (
            f"{left['running']:.0f} running, {left['waiting']:.0f} waiting, "
            f"{left['kv_cache_usage']:.1%} of the pages in use"
        )
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
        report.Column("near_ties", "that parted at a near-tie", ",d"),
        report.Column("widest", "widest gap where one parted", ".3f"),
        report.Column("failed", "failed", ",d"),
        report.Column("memory_gib", "resident memory, GiB", ".2f"),
        report.Column("growth", "growth after warm-up", ".2%"),
        report.Column("kib_a_request", "KiB a request", ".1f"),
        report.Column("pages_left", "pages in use at the end", ".1%"),
        report.Column("layer_moves", "layer moves", ",d"),
    ),
}


def make_row(title: str, outcome: Outcome, left: dict[str, Any], exact: bool) -> dict[str, Any]:
    """One row of both tables; the gaps only of an engine that must be ``exact``: another's tokens
    are not dense attention's.
    """
    return {
        "name": title,
        "requests": outcome.done,
        "given_up": outcome.counts["given up"],
        "preemptions": int(left["preemptions"]),
        "hit_tokens": int(left["prefix_hit_tokens"]),
        "per_second": outcome.done / outcome.seconds,
        "minutes": outcome.seconds / 60,
        "wrong": outcome.counts["wrong"],
        "near_ties": outcome.counts["near tie"],
        "widest": max(outcome.partings, default=None) if exact else None,
        "failed": outcome.counts["failed"],
        "memory_gib": outcome.memory[-1][2] / 2**30,
        "growth": outcome.growth(),
        "kib_a_request": None if (slope := outcome.slope()) is None else slope / 1024,
        "pages_left": left["kv_cache_usage"],
        "layer_moves": left["stats"].get("layer_moves"),
    }


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
    # Pages of generated tokens are made anew, densely, after a preemption, so that a small budget's
    # tokens hang on the schedule.
    "two-tiers": Engine(
        "two tiers, budget 192",
        {"budget": 192, "host_kv_gib": 0.5, "gpu_kv_gib": 0.026},
        401,
        False,
    ),
    # What vLLM does by itself under this load, its growth of memory above all.
    "stock": Engine("stock vLLM", None, 321, True),
}


def settings_of(engine: Engine, shape: Shape) -> dict[str, Any] | None:
    """The engine's settings for a shape: as many tokens in both tiers, and random weights for its
    head too.
    """
    if engine.settings is None or shape.name == "demo":
        return engine.settings
    larger = shape.kv_bytes_per_token / Shape.named("demo").kv_bytes_per_token
    scaled = {
        key: value * larger if key in ("host_kv_gib", "gpu_kv_gib") else value
        for key, value in engine.settings.items()
    }
    return {"retrieval_head": "dummy", **scaled}


def chosen_engines(text: str) -> list[str]:
    """Names out of ``--engines``.

    Raises:
        typer.BadParameter: one is unknown.
    """
    names = text.split(",")
    for name in names:
        if name not in ENGINES:
            raise typer.BadParameter(
                f"--engines: found {name!r}; use some of {', '.join(ENGINES)}."
            )
    return names


def tabulate(result: report.Report) -> None:
    """Rows and failures anew from the details, so that what an earlier run measured is judged as a
    new one.
    """
    result.rows, result.failures = [], {}
    for name, engine in ENGINES.items():
        if name not in result.details:
            continue
        found = result.details[name]
        outcome = Outcome(
            Counter(found["counts"]),
            found["wrong"],
            found["failed"],
            found.get("partings", []),
            found["memory"],
            found["seconds"],
        )
        result.rows.append(make_row(engine.title, outcome, found["left"], engine.exact))
        complained = complaints(outcome, found["left"], engine.exact)
        if engine.settings is None:
            # The control: what vLLM's memory does by itself is to be seen, not judged.
            complained.pop("memory", None)
        result.failures |= {f"{engine.title}: {what}": why for what, why in complained.items()}


def run_notes(details: dict[str, Any]) -> list[str]:
    """Which run measured which engine, where several have."""
    return report.run_notes((found, ENGINES[name].title) for name, found in details.items())


def main(
    model_shape: Annotated[
        str,
        typer.Option(
            help=f"One of {', '.join(NAMES)}; all but the demo have random weights and head."
        ),
    ] = "demo",
    engines: Annotated[
        str,
        typer.Option(
            help="Some of them; the others' figures stay as an earlier run in --out left them."
        ),
    ] = ",".join(ENGINES),
    requests: Annotated[int, typer.Option(min=10, help="Requests for each engine.")] = 10_000,
    seconds: Annotated[float | None, typer.Option(help="Time limit of each engine's load.")] = None,
    max_num_seqs: Annotated[
        int, typer.Option(help="Requests the engine runs at once; half as many more wait.")
    ] = 16,
    out: Annotated[Path, typer.Option(help="Folder of the result files.")] = report.RESULTS,
    work: Annotated[
        Path | None,
        typer.Option(help="Folder of the references' log; default a new temporary one."),
    ] = None,
) -> None:
    """Keep a server full of mixed requests, aborts and preemptions, and compare every answer. Exit
    code 1 if anything is wrong or left over.
    """
    names = chosen_engines(engines)
    try:
        shape = Shape.named(model_shape)
    except ValueError as error:
        typer.echo(str(error), err=True)
        raise typer.Exit(2) from None
    folder = work or Path(tempfile.mkdtemp(prefix="specontext-bench-"))
    folder.mkdir(parents=True, exist_ok=True)
    model = DEMO_MODEL if shape.name == "demo" else write_random_model(shape, folder / "model")
    on_gpu = bool(gpus())
    near_tie = NEAR_TIE_GPU if on_gpu else NEAR_TIE_CPU
    prompts = make_prompts(model)
    case, what = (
        ("soak", "Demo model")
        if shape.name == "demo"
        else (f"soak-{shape.name}", f"{shape.name} shape, random weights")
    )
    result = report.Report(
        case, f"{what}: requests of 1 to {MAX_MODEL_LEN} tokens at a full server", TABLES
    )
    notes = [
        f"{len(prompts)} prompts of 1 to {max(map(len, prompts))} tokens in random order, up to "
        f"{ANSWER_TOKENS} tokens asked for; six in ten answers are "
        "taken whole, two streamed, two given up in the stream. References: stock vLLM, dense, "
        f"recorded before. {max_num_seqs} requests run at once, "
        f"half as many more wait.",
        "Growth: median resident memory of the server's processes in the last third against the "
        "first third of the samples after the first "
        f"{WARM_UP_SHARE:.0%} of the requests; up to {GROWTH:.0%} counts as none. Stock vLLM is "
        "the control, whose growth is not judged.",
        "float32 everywhere. Near-tie: dense attention's two likeliest tokens were less than "
        f"{near_tie:g} apart in log-probability where the answer parted from it; "
        f"the widest gap is the largest such distance.",
        "With the small budget an answer may differ from dense attention's, and after a preemption "
        "from its own undisturbed run; the number says how many did.",
    ]
    try:
        ((_, (references, gaps)),) = run_child(
            answer_densely,
            str(model),
            on_gpu,
            prompts,
            log=folder / "references.log",
            seconds=1800,
            env=engine_env(on_gpu),
        )
    except ChildError as error:
        typer.echo(f"the references could not be made: {error}", err=True)
        raise typer.Exit(1) from None
    load = Load(
        prompts, references, gaps, requests, seconds, max_num_seqs + max_num_seqs // 2, near_tie
    )
    for name in names:
        engine = ENGINES[name]
        settings = settings_of(engine, shape)
        print(f"{engine.title}: starting", flush=True)
        outcome, left = soak(model, load, settings, engine.pages, max_num_seqs)
        # Only now: another run may have written another engine's figures meanwhile.
        result.take_over(out, same=())
        result.details[name] = {
            **result.run(),
            "settings": settings,
            "pages": engine.pages,
            "seconds": outcome.seconds,
            "counts": dict(outcome.counts),
            "wrong": outcome.wrong[:20],
            "failed": outcome.failed[:20],
            "partings": outcome.partings,
            "memory": outcome.memory,
            "left": left,
        }
        tabulate(result)
        result.notes = [*notes, *run_notes(result.details)]
        result.write(out)
        print(
            f"{engine.title}: {outcome.done} requests in {outcome.seconds:.0f} s, "
            f"{outcome.counts['wrong']} with other tokens",
            flush=True,
        )
    result.show()
    raise typer.Exit(1 if result.failures else 0)
