"""Case `transfer`: how much of the budget must be fetched a step, on the demo model, by size of the
hot buffers.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from benchmarks import report
from benchmarks.children import ChildError, engine_env, run_child
from benchmarks.intervals import of_scores
from benchmarks.machine import gpus
from benchmarks.shapes import DEMO_MODEL, Shape
from specontext_vllm.config import PAGE_SIZE, SpeContextConfig, pages_for
from specontext_vllm.residency.memory_model import KVShape, MemoryModel

REQUESTS = 16
"""vLLM's max_num_seqs."""
FIRST_SEED = 7000
REPLY_TOKENS = 24
"""Tokens a reply may have beyond its answer's own."""


@dataclass(frozen=True)
class Setting:
    """Slots of the hot buffers as a multiple of the budget, and the margin of sticky selection."""

    slots: float
    stickiness: float

    @property
    def name(self) -> str:
        what = "elastic" if self.stickiness == 0 else f"elastic, stickiness {self.stickiness:g}"
        return what if self.slots == 1 else f"{what}, {self.slots:g}x slots"


SETTINGS = (
    Setting(1, 0),
    Setting(1, 0.5),
    Setting(1, 1),
    Setting(1, 3),
    Setting(2, 0),
    Setting(2, 1),
    Setting(2, 3),
)


def make_problems(needles: int, recitations: int, tokens: int) -> list[Any]:
    """Held-out problems of the demo model; every layout in turn, seeds fixed."""
    from specontext_vllm.synthetic.tasks import LAYOUTS, make_problem

    kinds = [("needle", i) for i in range(needles)] + [
        ("recitation", i) for i in range(recitations)
    ]
    return [
        make_problem(
            kind,
            seed=FIRST_SEED + number,
            approx_tokens=tokens,
            layout=LAYOUTS[i % len(LAYOUTS)],
            split="test",
        )
        for number, (kind, i) in enumerate(kinds)
    ]


def accuracy(problems: Sequence[Any], replies: Sequence[str]) -> dict[str, Any]:
    """Needle accuracy and recitation with their 95 % intervals."""
    from specontext_vllm.synthetic.tasks import score

    scores: dict[str, list[float]] = {"needle": [], "recitation": []}
    for problem, reply in zip(problems, replies, strict=True):
        scores[problem.kind].append(score(problem, reply))
    row: dict[str, Any] = {}
    for kind, values in scores.items():
        if values:
            row |= {
                kind: sum(values) / len(values),
                f"{kind}_interval": "{:.2f} to {:.2f}".format(*of_scores(values, kind == "needle")),
            }
    return row


@dataclass(frozen=True)
class Room:
    """Memory for a load of the demo model.

    Attributes:
        pages: pages that the scheduler hands out.
        max_model_len: longest context, in tokens.
        gpu_bytes, host_bytes: for KV.
        fetches: whether layers are offloaded, so that there is something to fetch, and the hot
            buffers of every setting fit.
    """

    pages: int
    max_model_len: int
    gpu_bytes: int
    host_bytes: int
    fetches: bool

    @classmethod
    def of(cls, problems: int, tokens: int, budget: int, itemsize: int) -> Room:
        """Room for all ``problems``, of ``tokens`` tokens each, in elements of ``itemsize`` bytes:
        on the GPU for the largest hot buffers of all layers, but not for one layer's pages, so that
        every layer may be offloaded.
        """
        shape, config = Shape.named("demo"), SpeContextConfig(budget=budget)
        pages, max_model_len = (tokens // PAGE_SIZE + 40) * problems, tokens + 1024
        layers, heads, d = shape.num_hidden_layers, shape.num_key_value_heads, shape.head_dim
        retriever_page_bytes = (PAGE_SIZE * heads * d + shape.hidden_size) * itemsize
        kv = KVShape(layers, heads, d, itemsize, retriever_page_bytes)
        gpu_bytes = (
            REQUESTS * 2 * config.budget_pages * layers + pages // 2 + 4 * tokens // PAGE_SIZE
        ) * kv.page_bytes + pages * 12288
        host_bytes = (layers + 1) * pages * kv.page_bytes
        model = MemoryModel(
            kv,
            budget_pages=config.budget_pages,
            table_pages=config.table_pages(max_model_len),
            max_num_seqs=REQUESTS,
            max_model_len=max_model_len,
        )
        holds_one = gpu_bytes >= model.min_gpu_bytes(host_bytes, max_model_len)
        holds_one = holds_one and pages > pages_for(max_model_len)
        fetches = False
        if holds_one:
            plan = model.plan(gpu_bytes, host_bytes, pages)
            hot_pages = int(max(setting.slots for setting in SETTINGS) * config.budget_pages)
            fetches = plan.host_layers > 0 and plan.hot_pages >= hot_pages
        return cls(pages, max_model_len, gpu_bytes, host_bytes, fetches)


def apply(worker: Any, setting: Setting) -> None:
    """Use a setting in a worker from the next step on, and note the misses of each step."""
    import torch

    runtime = worker.model_runner.runtime
    tiers = runtime.tiers
    runtime.settings.change(stickiness=setting.stickiness)
    slots = int(setting.slots * runtime.config.budget_pages)
    # Not the time law's choice, which depends on the load.
    tiers.hot_size.choose = lambda ledger: slots
    with torch.inference_mode():
        tiers.resize_hot_buffers(slots)
    if not hasattr(tiers, "noted"):
        original = tiers.resolve

        def resolve(selection: Any, batch: Any) -> None:
            original(selection, batch)
            selected = int(((selection.lengths + PAGE_SIZE - 1) // PAGE_SIZE).sum())
            if selected:
                tiers.noted.append((int(tiers.misses.count), selected))

        tiers.resolve = resolve
    tiers.noted = []


def noted(worker: Any, setting: Setting) -> list[tuple[int, int]]:
    """Per step: head pages missed and head pages selected.

    Raises:
        RuntimeError: the hot buffers had another size than the setting's.
    """
    runtime = worker.model_runner.runtime
    slots = runtime.tiers.status().hot_tokens // PAGE_SIZE
    if slots != int(setting.slots * runtime.config.budget_pages):
        raise RuntimeError(f"{setting.name}: the hot buffers had {slots} slots")
    return runtime.tiers.noted


def run_engine(
    model: str,
    on_gpu: bool,
    dtype: str,
    budget: int,
    counts: tuple[int, int],
    tokens: int,
    settings: Sequence[Setting],
) -> Iterator[tuple[str, Any]]:
    """One engine answers all problems with each setting; runs in a child.

    Yields:
        ``("ready", facts)``, then ``("row", (setting, replies, stats, seconds, misses by step))``.
    """
    from vllm import LLM, SamplingParams

    problems = make_problems(*counts, tokens)
    room = Room.of(sum(counts), tokens, budget, itemsize=4 if dtype == "float32" else 2)
    config = {
        "retrieval_head": str(Path(model, "retrieval_head")),
        "budget": budget,
        "gpu_kv_gib": room.gpu_bytes / 2**30,
        "host_kv_gib": room.host_bytes / 2**30,
    }
    arguments: dict[str, Any] = {
        "model": model,
        "dtype": dtype,
        "seed": 0,
        "enable_prefix_caching": True,
        "max_num_seqs": REQUESTS,
        "disable_log_stats": True,
        "max_model_len": room.max_model_len,
        "num_gpu_blocks_override": room.pages,
        "attention_backend": "specontext",
        "additional_config": {"specontext": config},
    }
    arguments |= {"gpu_memory_utilization": 0.3} if on_gpu else {"enforce_eager": True}
    llm = LLM(**arguments)
    tokenizer = llm.get_tokenizer()
    params = [
        SamplingParams(
            temperature=0,
            max_tokens=REPLY_TOKENS + len(tokenizer.encode(p.answer, add_special_tokens=False)),
        )
        for p in problems
    ]
    yield "ready", {"arguments": arguments}
    for setting in settings:
        llm.collective_rpc(apply, args=(setting,))
        llm.collective_rpc("specontext_stats", args=(True,))
        start = time.perf_counter()
        outputs = llm.chat([p.messages for p in problems], params, use_tqdm=False)
        seconds = time.perf_counter() - start
        yield (
            "row",
            (
                setting,
                [output.outputs[0].text for output in outputs],
                llm.collective_rpc("specontext_stats")[0],
                seconds,
                llm.collective_rpc(noted, args=(setting,))[0],
            ),
        )


TABLES = {
    "Fetched a step, as a share of the budget": (
        report.Column("name", "hot buffers"),
        report.Column("share", "fetched, mean", ".1%"),
        report.Column("p50", "median step", ".1%"),
        report.Column("p90", "90th percentile", ".1%"),
        report.Column("needle", "needle accuracy", ".3f"),
        report.Column("needle_interval", "95 %"),
        report.Column("recitation", "recitation", ".3f"),
        report.Column("recitation_interval", "95 %"),
    ),
}


def summarize(steps: Sequence[tuple[int, int]]) -> dict[str, Any]:
    """Shares of the steps in which no request began: a request's first selection is all misses,
    whatever the policy.
    """
    import numpy as np

    shares = np.array([missed / selected for missed, selected in steps if selected])
    steady = shares[shares < 0.5]
    total = sum(missed for missed, _ in steps) / max(1, sum(selected for _, selected in steps))
    return {
        "share": float(steady.mean()),
        "p50": float(np.median(steady)),
        "p90": float(np.percentile(steady, 90)),
        "share_with_first_steps": total,
        "steady_steps": len(steady),
        "steps": len(shares),
    }


def main(
    needles: Annotated[int, typer.Option(help="Needle problems.")] = 30,
    recitations: Annotated[int, typer.Option(help="Recitation problems.")] = 10,
    tokens: Annotated[int, typer.Option(help="Prompt length.")] = 8000,
    budget: Annotated[int, typer.Option(help="Tokens a KV head may read in a step.")] = 512,
    seconds: Annotated[
        float, typer.Option(help="Time limit of the engine; what it measured till then is kept.")
    ] = 1500,
    out: Annotated[Path, typer.Option(help="Folder of the result files.")] = report.RESULTS,
) -> None:
    """Misses of the hot buffers and accuracy, by slots and stickiness. Exit code 1 if anything
    failed.
    """
    on_gpu = bool(gpus())
    dtype, itemsize = ("bfloat16", 2) if on_gpu else ("float32", 4)
    if not Room.of(needles + recitations, tokens, budget, itemsize).fetches:
        raise typer.BadParameter(
            f"found {needles} --needles and {recitations} --recitations of {tokens} --tokens, "
            "which leave nothing to fetch, or no room for hot buffers of every size; give more or "
            "longer ones, or a smaller --budget."
        )
    problems = make_problems(needles, recitations, tokens)
    details: dict[str, Any] = {"budget": budget, "tokens": tokens, "stats": {}, "steady_shares": {}}
    result = report.Report(
        "transfer",
        f"Elastic loading on the demo model, prompts of {tokens} tokens, budget {budget}",
        TABLES,
        details=details,
    )
    result.notes.append(
        "Without elastic loading every step fetches the whole budget (100 %) and selects as with "
        "stickiness 0. Mean over the steps in which fewer than half of the "
        "selected pages were new; a request's first decode step fetches its whole selection "
        "whatever the policy."
    )
    env = engine_env(on_gpu, cpu_kv_gib=4)
    log = Path(tempfile.mkdtemp(prefix="specontext-bench-")) / "transfer.log"
    arguments = (str(DEMO_MODEL), on_gpu, dtype, budget, (needles, recitations), tokens, SETTINGS)
    print(f"starting (log {log})", flush=True)
    try:
        for kind, value in run_child(run_engine, *arguments, log=log, seconds=seconds, env=env):
            if kind == "ready":
                details |= value
                continue
            setting, replies, stats, took, steps = value
            row = {
                "name": setting.name,
                "seconds": took,
                **accuracy(problems, replies),
                **summarize(steps),
            }
            details["stats"][setting.name] = stats
            details["steady_shares"][setting.name] = [
                round(m / s, 4) for m, s in steps if s and m / s < 0.5
            ]
            result.rows.append(row)
            result.write(out)
            print(f"{setting.name}: {row['share']:.1%} a step, {took:.0f} s", flush=True)
    except ChildError as error:
        result.failures["engine"] = str(error)
    result.write(out)
    result.show()
    raise typer.Exit(1 if result.failures else 0)
