"""Case `recall`: does the demo model still answer when each step reads only what a retriever chose?"""

from __future__ import annotations

import json
import os
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from benchmarks import report
from benchmarks.children import ChildError, run_child
from benchmarks.intervals import bootstrap, wilson
from benchmarks.machine import gpus
from benchmarks.shapes import DEMO_MODEL

NEEDLES, RECITATIONS = 30, 10
FIRST_SEED = 7000
PROMPT_TOKENS = 8000
REPLY_TOKENS = 24
"""Tokens a reply may have beyond its answer's own."""

ENGINE_ENV = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1"}
STOCK, DENSE = "stock vLLM", "dense"


@dataclass(frozen=True)
class Setting:
    """One row of the table: a retriever and its budget in tokens (None where there is none to set)."""

    retriever: str
    budget: int | None = None

    @property
    def name(self) -> str:
        return self.retriever if self.budget is None else f"{self.retriever} {self.budget}"


# Dense first: it fills the prefix cache with the prompts' pages, which the others share.
SETTINGS = (
    Setting(DENSE),
    *(Setting("dlm", budget) for budget in (1024, 512, 256, 128)),
    Setting("recent", 512),
    Setting("random", 512),
)


def make_problems(needles: int, recitations: int, tokens: int) -> list[Any]:
    """Held-out problems; every layout in turn, seeds fixed."""
    from specontext_vllm.demo.tasks import LAYOUTS, make_problem

    kinds = [("needle", i) for i in range(needles)] + [("recitation", i) for i in range(recitations)]
    return [
        make_problem(kind, seed=FIRST_SEED + number, approx_tokens=tokens, layout=LAYOUTS[i % len(LAYOUTS)], split="test")
        for number, (kind, i) in enumerate(kinds)
    ]


def run_engine(
    model: str, on_gpu: bool, dtype: str, sparse: bool, settings: Sequence[Setting], counts: tuple[int, int], tokens: int
) -> Iterator[tuple[str, Any]]:
    """One engine answers all problems, once with each setting; runs in a child.

    Yields:
        ``("ready", facts)``, then ``("row", (setting's name, replies, stats, seconds))`` with one reply per problem.
    """
    begin = time.perf_counter()
    from vllm import LLM, SamplingParams

    problems = make_problems(*counts, tokens)
    arguments: dict[str, Any] = {
        "model": model, "dtype": dtype, "seed": 0, "enable_prefix_caching": True, "max_num_seqs": 16, "disable_log_stats": True,
    }  # fmt: skip
    # The model is tiny: a small share of the GPU holds all prompts many times over.
    arguments |= {"gpu_memory_utilization": 0.3} if on_gpu else {"enforce_eager": True}
    if sparse:
        # Started dense, the page table is as wide as the longest context, so that every budget may follow.
        head = str(Path(model, "retrieval_head"))
        config = {"retriever": DENSE, "retrieval_head": head, "budget": max(s.budget or 0 for s in settings) or 2048}
        arguments |= {"attention_backend": "specontext", "additional_config": {"specontext": config}}
    elif on_gpu:
        arguments["attention_backend"] = "FLASH_ATTN"
    llm = LLM(**arguments)
    tokenizer = llm.get_tokenizer()
    lengths = [len(tokenizer.apply_chat_template(p.messages, add_generation_prompt=True, return_dict=False)) for p in problems]
    params = [
        SamplingParams(temperature=0, max_tokens=REPLY_TOKENS + len(tokenizer.encode(p.answer, add_special_tokens=False)))
        for p in problems
    ]
    yield "ready", {"start_s": round(time.perf_counter() - begin, 1), "prompt_tokens": lengths, "arguments": arguments}
    for setting in settings:
        if sparse:
            llm.collective_rpc("specontext_set", kwargs={"retriever": setting.retriever, "budget": setting.budget})
            llm.collective_rpc("specontext_stats", args=(True,))
        start = time.perf_counter()
        # A prompt's pages hold prompt tokens only and were made densely, so sharing them between settings is exact.
        outputs = llm.chat([p.messages for p in problems], params, use_tqdm=False)
        seconds = time.perf_counter() - start
        stats = llm.collective_rpc("specontext_stats")[0] if sparse else None
        replies = [output.outputs[0].text for output in outputs]
        yield "row", (setting.name if sparse else STOCK, replies, stats, seconds)


TABLES = {
    "By retriever": (
        report.Column("name", "retriever and budget"),
        report.Column("needle", "needle accuracy", ".3f"),
        report.Column("needle_interval", "95 %"),
        report.Column("needle_ratio", "of dense", ".3f"),
        report.Column("recitation", "recitation", ".3f"),
        report.Column("recitation_interval", "95 %"),
        report.Column("recitation_ratio", "of dense", ".3f"),
        report.Column("pages_read", "pages read", ".1%"),
        report.Column("kept_mass", "kept mass", ".3f"),
        report.Column("seconds", "s", ".1f"),
    ),
}


def make_row(name: str, problems: Sequence[Any], replies: Sequence[str], stats: dict[str, Any] | None, seconds: float) -> dict[str, Any]:
    """One row without its ratios to dense."""
    from specontext_vllm.demo.tasks import score

    by_kind: dict[str, list[float]] = {"needle": [], "recitation": []}
    for problem, reply in zip(problems, replies, strict=True):
        by_kind[problem.kind].append(score(problem, reply))
    right = [value == 1.0 for value in by_kind["needle"]]
    recited = by_kind["recitation"]
    row: dict[str, Any] = {"name": name, "seconds": seconds}
    if right:
        row |= {"needle": sum(right) / len(right), "needle_interval": "{:.2f} to {:.2f}".format(*wilson(sum(right), len(right)))}
    if recited:
        row |= {"recitation": sum(recited) / len(recited), "recitation_interval": "{:.2f} to {:.2f}".format(*bootstrap(recited))}
    if stats and stats["pages_total"]:
        row |= {"pages_read": stats["pages_read"] / stats["pages_total"], "kept_mass": stats["kept_mass_mean"]}
    return row


def add_ratios(rows: list[dict[str, Any]]) -> None:
    """Set each row's ratio to the dense one: stock vLLM's where it ran, else the specontext backend reading all pages."""
    dense = next((row for name in (STOCK, DENSE) for row in rows if row["name"] == name), None)
    for row in rows:
        for kind in ("needle", "recitation"):
            if dense and dense.get(kind) and kind in row:
                row[f"{kind}_ratio"] = row[kind] / dense[kind]


def main(
    model: Annotated[Path, typer.Option(help="Model folder with a retrieval_head/ folder in it.")] = DEMO_MODEL,
    limit: Annotated[int, typer.Option(min=2, help="Number of prompts; three in four are needles.")] = NEEDLES + RECITATIONS,
    tokens: Annotated[int, typer.Option(help="Approximate tokens of each prompt.")] = PROMPT_TOKENS,
    dtype: Annotated[str, typer.Option(help="float32, bfloat16, or auto: float32 on a CPU, the model's own on a GPU.")] = "auto",
    engine_seconds: Annotated[float, typer.Option(help="Time limit of each engine.")] = 7200,
    out: Annotated[Path, typer.Option(help="Folder of the result files.")] = report.RESULTS,
    work: Annotated[Path | None, typer.Option(help="Folder of the engines' logs; default a new temporary one.")] = None,
) -> None:
    """Needle accuracy and recitation of the demo model by retriever and budget. Exit code 1 if anything failed."""
    if not (model / "config.json").exists():
        typer.echo(f"--model: no config.json in {model}; name a model folder.", err=True)
        raise typer.Exit(2)
    recitations = max(1, round(limit * RECITATIONS / (NEEDLES + RECITATIONS)))
    counts = (limit - recitations, recitations)
    problems = make_problems(*counts, tokens)
    folder = work or Path(tempfile.mkdtemp(prefix="specontext-bench-"))
    folder.mkdir(parents=True, exist_ok=True)
    on_gpu = bool(gpus())
    if dtype == "auto" and not on_gpu:
        dtype = "float32"
    details: dict[str, Any] = {
        "model": str(model), "dtype": dtype, "engines": {}, "replies": {},
        "problems": [{"kind": p.kind, "layout": p.layout, "answer": p.answer} for p in problems],
    }  # fmt: skip
    title = f"Demo model: {counts[0]} needle questions and {counts[1]} recitations in prompts of about {tokens:,} tokens"
    result = report.Report("recall", title, TABLES, details=details)
    result.notes = [
        "Greedy replies to held-out prompts in all layouts; a needle counts when the whole answer is right. Intervals: Wilson "
        "(needles), bootstrap over prompts (recitation). `dense`: the specontext backend reading every page; ratios are to "
        "stock vLLM.",
    ]
    settings = json.loads((model / "config.json").read_text())
    result.notes.append(
        f"{settings['num_hidden_layers']} layers, hidden size {settings['hidden_size']}, {settings['num_attention_heads']} query and "
        f"{settings['num_key_value_heads']} KV heads; one selection a step for all layers; dtype {dtype}."
    )
    env = {**ENGINE_ENV, **({} if on_gpu else {"VLLM_CPU_KVCACHE_SPACE": os.environ.get("VLLM_CPU_KVCACHE_SPACE", "4")})}
    for name, sparse, rows in (("specontext", True, SETTINGS), ("stock", False, (Setting(DENSE),))):
        print(f"{name}: starting (log {folder / name}.log)", flush=True)
        try:
            events = run_child(
                run_engine, str(model), on_gpu, dtype, sparse, rows, counts, tokens,
                log=folder / f"{name}.log", seconds=engine_seconds, env=env,
            )  # fmt: skip
            for kind, value in events:
                if kind == "ready":
                    details["engines"][name] = value
                    print(f"{name}: ready after {value['start_s']} s, prompts of {min(value['prompt_tokens']):,} to "
                          f"{max(value['prompt_tokens']):,} tokens", flush=True)  # fmt: skip
                    continue
                row_name, replies, stats, seconds = value
                details["replies"][row_name] = {"text": replies, "stats": stats}
                row = make_row(row_name, problems, replies, stats, seconds)
                # Stock vLLM is the reference: it heads the table.
                result.rows.insert(0 if row_name == STOCK else len(result.rows), row)
                add_ratios(result.rows)
                result.write(out)
                print(f"{row_name}: needle {row.get('needle', 0):.3f}, recitation {row.get('recitation', 0):.3f}, {seconds:.0f} s", flush=True)
        except ChildError as error:
            result.failures[name] = str(error)
            result.write(out)
    result.show()
    print(f"written: {out}", flush=True)
    raise typer.Exit(1 if result.failures else 0)
