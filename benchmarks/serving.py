"""`vllm bench serve` against real `vllm serve` processes, one engine after the other."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks import report
from benchmarks.engines import BATCHED_TOKENS, RETRIEVERS
from benchmarks.shapes import Shape
from specontext_vllm.demo.server import (
    ServerError,
    VllmServer,
    device_arguments,
    server_environment,
)

MARGIN = 64
"""Tokens of --max-model-len beyond the longest load."""

FIGURES = (
    "completed",
    "failed",
    "duration",
    "request_throughput",
    "output_throughput",
    "total_input_tokens",
    "total_output_tokens",
    "median_ttft_ms",
    "p99_ttft_ms",
    "median_tpot_ms",
    "p99_tpot_ms",
)
"""What is kept of the client's result."""


@dataclass(frozen=True)
class Load:
    """Requests of so many tokens in and out, so many of them at once."""

    name: str
    prompt: int
    output: int
    concurrency: int

    @property
    def cell(self) -> str:
        return f"{self.name}@{self.concurrency}"


def parse_loads(lengths: str, concurrency: str, shape: Shape, max_num_seqs: int) -> list[Load]:
    """All pairs of `8k/1k,32k/4k` and `1,8,24`.

    Raises:
        ValueError: another form, more than the shape's longest context, or than ``max_num_seqs``
            requests at once.
    """
    loads = []
    for text in lengths.split(","):
        found = re.fullmatch(r"(\d+)(k?)/(\d+)(k?)", text.strip())
        if not found or "0" in (found[1], found[3]):
            raise ValueError(f"--lengths: found {text!r}; write IN/OUT, as in 8k/1k or 256/32.")
        prompt, output = (
            int(n) * (1024 if k else 1) for n, k in ((found[1], found[2]), (found[3], found[4]))
        )
        if prompt + output + MARGIN > shape.max_position_embeddings:
            raise ValueError(
                f"--lengths: {text.strip()} exceeds the {shape.max_position_embeddings} tokens of "
                f"--model-shape {shape.name}."
            )
        for number in concurrency.split(","):
            if not number.strip().isdigit() or not 0 < int(number) <= max_num_seqs:
                raise ValueError(
                    f"--concurrency: found {number!r}; give numbers from 1 to --max-num-seqs "
                    f"({max_num_seqs})."
                )
            loads.append(Load(text.strip(), prompt, output, int(number)))
    return loads


def write_tokenizer(shape: Shape, folder: Path) -> None:
    """Give a model's folder a tokenizer in which every id of the vocabulary is a word of its own.

    The client makes its random prompts as text; with these words the server reads back exactly the
    tokens that it meant.
    """
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    # In brackets, since the special ones are looked for inside words too.
    words = {f"<{i}>": i for i in range(shape.vocab_size)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<0>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    special = {"bos_token": f"<{shape.bos_token_id}>", "eos_token": f"<{shape.eos_token_id}>"}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special).save_pretrained(folder)


def server_arguments(
    engine: str,
    loads: Sequence[Load],
    budget: int,
    max_num_seqs: int,
    on_gpu: bool,
    more: Sequence[str] = (),
) -> list[str]:
    """Options of `vllm serve`: the same for all engines, ``more`` among them, but for the
    backend.
    """
    longest = max(load.prompt + load.output for load in loads) + MARGIN
    arguments = [
        *device_arguments(),
        "--load-format",
        "dummy",
        "--seed",
        "0",
        "--max-model-len",
        str(longest),
        "--max-num-seqs",
        str(max_num_seqs),
        "--max-num-batched-tokens",
        str(BATCHED_TOKENS),
        "--enable-prefix-caching",
        *more,
    ]
    if engine in RETRIEVERS:
        settings = {"specontext": RETRIEVERS[engine] | {"budget": budget}}
        return [
            *arguments,
            "--attention-backend",
            "specontext",
            "--additional-config",
            json.dumps(settings),
        ]
    return [*arguments, "--attention-backend", "FLASH_ATTN"] if on_gpu else arguments


def run_server(
    model: Path,
    arguments: Sequence[str],
    loads: Sequence[Load],
    *,
    rounds: int,
    seconds: float,
    folder: Path,
) -> Iterator[tuple[str, Any]]:
    """Start a server and run the client once per load.

    Args:
        rounds: requests of a load for each one at a time.
        seconds: time limit of all, the start included.
        folder: takes the client's results and logs.

    Yields:
        ``("ready", facts)``, then per load ``("cell", (name, figures))`` or
        ``("failed", (name, reason))``.

    Raises:
        ServerError: the server did not start or answer in time.
    """
    deadline = time.monotonic() + seconds

    def in_time(waited: float) -> None:
        if time.monotonic() > deadline:
            raise ServerError(
                f"the server did not start within the {seconds:.0f} s of --engine-seconds."
            )

    with VllmServer(model, arguments, on_wait=in_time) as server:
        # Before the first load, so that no load includes what first requests compile or capture.
        concurrency = max(load.concurrency for load in loads)
        warm_up = Load("warm-up", min(512, *(load.prompt for load in loads)), 16, concurrency)
        _bench(
            server.url,
            model,
            warm_up,
            seed=0,
            requests=concurrency,
            seconds=deadline - time.monotonic(),
            folder=folder,
        )
        yield "ready", {"start_s": round(server.start_seconds, 1), "arguments": list(arguments)}
        for seed, load in enumerate(loads, 1):
            # The seed gives each load prompts of its own: nothing may hit the prefix cache.
            left = deadline - time.monotonic()
            try:
                yield (
                    "cell",
                    (
                        load.cell,
                        _bench(
                            server.url, model, load, seed, load.concurrency * rounds, left, folder
                        ),
                    ),
                )
            except ServerError as error:
                yield "failed", (load.cell, str(error))


def _bench(
    url: str, model: Path, load: Load, seed: int, requests: int, seconds: float, folder: Path
) -> dict[str, Any]:
    """Run `vllm bench serve` once; ``FIGURES`` of its result.

    Raises:
        ServerError: the client or a request failed, or it took more than ``seconds``.
    """
    stem = f"{load.cell.replace('/', '-')}"
    result, log = folder / f"{stem}.json", folder / f"{stem}.log"
    result.unlink(missing_ok=True)
    command = [
        sys.executable,
        "-m",
        "vllm.entrypoints.cli.main",
        "bench",
        "serve",
        "--base-url",
        url,
        "--model",
        str(model),
        "--dataset-name",
        "random",
        "--random-input-len",
        str(load.prompt),
        "--random-output-len",
        str(load.output),
        "--num-prompts",
        str(requests),
        "--max-concurrency",
        str(load.concurrency),
        "--seed",
        str(seed),
        "--temperature",
        "0",
        "--percentile-metrics",
        "ttft,tpot",
        "--save-result",
        "--result-dir",
        str(folder),
        "--result-filename",
        result.name,
        "--disable-tqdm",
    ]
    if seconds <= 0:
        raise ServerError("no time was left of --engine-seconds.")
    with log.open("wb") as output:
        try:
            done = subprocess.run(
                command,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                env=server_environment(),
                cwd=folder,
                timeout=seconds,
                check=False,
            )
        except subprocess.TimeoutExpired:
            raise ServerError(
                f"it was stopped after {seconds:.0f} s, the rest of --engine-seconds."
            ) from None
    if done.returncode or not result.exists():
        last = log.read_text(errors="replace").strip().splitlines()[-1:]
        raise ServerError(
            f"vllm bench serve ended with exit code {done.returncode}; {log} ends with: "
            f"{' '.join(last)}"
        )
    figures = {
        key: value for key, value in json.loads(result.read_text()).items() if key in FIGURES
    }
    if figures["completed"] != requests:
        raise ServerError(
            f"{figures['completed']} of {requests} requests were answered; see {log}."
        )
    return figures


COLUMNS = {
    "request_throughput": ("requests/s", ".3f"),
    "output_throughput": ("output tokens/s", ",.0f"),
    "median_ttft_ms": ("TTFT, ms", ",.0f"),
    "median_tpot_ms": ("TPOT, ms", ".2f"),
}
TABLES = {
    "Served": (
        report.Column("lengths", "in/out"),
        report.Column("concurrency", "at once"),
        *(
            report.Column(f"{key}_{figure}", f"{name}, {heading}", style)
            for figure, (heading, style) in COLUMNS.items()
            for key, name in (("stock", "stock"), ("sparse", "specontext"))
        ),
        report.Column("times_throughput", "output tokens/s, times stock", ".2f"),
        report.Column("times_tpot", "TPOT, times shorter", ".2f"),
    )
}


def make_rows(loads: Sequence[Load], details: dict[str, Any]) -> list[dict[str, Any]]:
    """The table from what the clients have reported so far."""
    rows = []
    for load in loads:
        row: dict[str, Any] = {"lengths": load.name, "concurrency": load.concurrency}
        for key, engine in (("stock", "stock"), ("sparse", "specontext")):
            figures = details["engines"].get(engine, {}).get("cells", {}).get(load.cell, {})
            row |= {f"{key}_{figure}": figures[figure] for figure in COLUMNS if figure in figures}
        if "stock_output_throughput" in row and "sparse_output_throughput" in row:
            row["times_throughput"] = (
                row["sparse_output_throughput"] / row["stock_output_throughput"]
            )
            row["times_tpot"] = row["stock_median_tpot_ms"] / row["sparse_median_tpot_ms"]
        rows.append(row)
    return rows
