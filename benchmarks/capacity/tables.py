"""The tables of the cases `capacity` and `overlap`, and the engines that fill them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import typer

from benchmarks import report
from benchmarks.capacity.engine import Load, run_engine
from benchmarks.children import ENGINE_ENV, ChildError, run_child
from benchmarks.shapes import Shape

TABLES = {
    "Steady decode": (
        report.Column("name", "engine, pages scored anew a step"),
        report.Column("capacity", "KV capacity, tokens", ",d"),
        report.Column("at_once", "requests at once"),
        report.Column("step", "step, ms", ".2f"),
        report.Column("mean", "mean, ms", ".2f"),
        report.Column("p90", "p90, ms", ".2f"),
        report.Column("rate", "tokens/s", ",.0f"),
        report.Column("ratio", "times stock", ".2f"),
        report.Column("fetched", "fetched a step, MB", ".0f"),
        report.Column("missed", "of the budget", ".1%"),
        report.Column("late", "late prefetches", ".1%"),
        report.Column("late_us", "late by, us", ".0f"),
        report.Column("resident", "resident layers"),
    ),
    "End to end, from an empty prefix cache": (
        report.Column("cold", "engine, pages scored anew a step"),
        report.Column("requests", "requests"),
        report.Column("last_first", "until the last first token, s", ".1f"),
        report.Column("prompt_rate", "prompt tokens/s until then", ",.0f"),
        report.Column("total", "until all are done, s", ".1f"),
        report.Column("throughput", "output tokens/s", ",.0f"),
    ),
}


def make_rows(details: dict[str, Any], budget: int, heads: int) -> list[dict[str, Any]]:
    """The tables' rows from what the children have reported."""
    rows = []
    first = {
        engine: next(iter(kept["passes"].values()), None)
        for engine, kept in details["engines"].items()
    }
    stock, untiered = first.get(NAMES["stock"]), first.get(NAMES["untiered"])
    for engine, kept in details["engines"].items():
        for number, (name, figures) in enumerate(kept["passes"].items()):
            label = f"{engine}, {name}" if engine != "stock" else engine
            row = {
                "name": label,
                "capacity": kept["kv_capacity_tokens"],
                "at_once": figures["decoding_at_once"],
                "step": figures["step_ms"],
                "mean": figures["step_mean_ms"],
                "p90": figures["step_p90_ms"],
                "rate": figures["decode_tokens_per_s"],
            }
            if number == 0:  # later passes find their prompts in the prefix cache
                last = figures["first_token_s"]["last"]
                row |= {
                    "cold": label,
                    "requests": figures["requests"],
                    "last_first": last,
                    "total": figures["total_s"],
                    "throughput": figures["output_tokens_per_s"],
                    "prompt_rate": figures["requests"] * details["prompt_tokens"] / last,
                }
            if stock and engine != "stock" and row["rate"] and stock["decode_tokens_per_s"]:
                row["ratio"] = row["rate"] / stock["decode_tokens_per_s"]
            if untiered and engine == NAMES["tiered"] and row["step"]:
                row["against"] = row["step"] / untiered["step_ms"]
            stats = figures["stats"]
            if stats and stats.get("tier_steps"):
                row |= {"late": stats["late_share"], "late_us": stats["late_us"]}
                row["fetched"] = stats["fetched_bytes"] / stats["tier_steps"] / 1e6
                row["missed"] = (
                    stats["missed_head_pages"]
                    / stats["tier_steps"]
                    / (figures["decoding_at_once"] * heads * budget / 16)
                )
                row["resident"] = f"{stats['resident_layers']} of {stats['num_layers']}"
            rows.append(row)
    return rows


NAMES = {"stock": "stock", "untiered": "specontext, one tier", "tiered": "specontext"}
STEADY = (
    "Steady decode: step (median), mean and slowest tenth over the steps in which nothing prefills "
    "and as many requests decode as do at once for long: all, or a full wave where "
    "the rest queues; tokens/s by the mean. The engines ran in "
    "this one command, each in a process of its own, with prefix caching, chunked prefill, async "
    "scheduling and CUDA graphs as vLLM sets "
    "them. Late: layers whose misses arrived after the layer was ready for them, by the GPU's "
    "clock."
)

WORKERS = (
    "With several workers the memory on the GPU is that of each, the host pool is the machine's; "
    "what is fetched, late and resident is the first worker's."
)


def compare(
    result: report.Report,
    load: Load,
    shape: Shape,
    engines: dict[str, dict[str, list[float]]],
    folder: Path,
    out: Path,
    seconds: float,
) -> None:
    """Run the engines one after the other into the result; the first one says how many requests
    there are.

    Args:
        engines: by name, each with its passes.
    """
    details = result.details

    def save() -> None:
        # Counters are those of the first worker.
        heads = max(1, shape.num_key_value_heads // load.workers)
        result.rows = make_rows(details, load.budget, heads)
        result.write(out)

    requests: int | None = None
    for engine, passes in engines.items():
        name = NAMES[engine]
        kept = details["engines"].setdefault(name, {"passes": {}})
        log = folder / f"{engine}.log"
        print(f"{name}: starting (log {log})", flush=True)
        try:
            arguments = (load, engine, requests, passes, engine != "stock")
            for kind, value in run_child(
                run_engine, *arguments, log=log, seconds=seconds, env=ENGINE_ENV
            ):
                if kind == "ready":
                    kept |= value
                    print(
                        f"{name}: ready after {value['start_s']} s, "
                        f"{value['kv_capacity_tokens']:,} tokens, {value['fitting']} fit",
                        flush=True,
                    )
                elif kind == "timeline":
                    details.setdefault("timeline", {})[name] = value
                else:
                    kept["passes"][value[0]] = value[1]
                    requests = requests or value[1]["requests"]
                    print(f"{name} {value[0]}: {value[1]}", flush=True)
                save()
        except ChildError as error:
            result.failures[name] = str(error)
            save()
    result.show()
    raise typer.Exit(1 if result.failures else 0)
