"""The command `soak`."""

from __future__ import annotations

import tempfile
from collections import Counter
from pathlib import Path
from typing import Annotated, Any

import typer

from benchmarks import report
from benchmarks.children import ChildError, engine_env, run_child
from benchmarks.machine import gpus
from benchmarks.near_tie import NEAR_TIE_CPU, NEAR_TIE_GPU
from benchmarks.prompts import make_prompts
from benchmarks.shapes import DEMO_MODEL, NAMES, Shape
from benchmarks.soak.client import ANSWER_TOKENS, Load
from benchmarks.soak.outcome import GROWTH, WARM_UP_SHARE, Outcome, complaints
from benchmarks.soak.references import answer_densely, write_random_model
from benchmarks.soak.server import ENGINES, MAX_MODEL_LEN, settings_of, soak_engine

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
PROMPTS = 200
"""Different prompts; each comes many times, so that some hit the prefix cache and some find their
pages evicted.
"""


def make_row(title: str, outcome: Outcome, left: dict[str, Any], exact: bool) -> dict[str, Any]:
    """One row of both tables. Gaps are given for engines that must be ``exact`` only: the others'
    tokens are not dense attention's.
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
    """Make rows and failures from the details, so that earlier runs are judged as the new one."""
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
            # The control's memory is shown, not judged.
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
    prompts = make_prompts(model, PROMPTS, MAX_MODEL_LEN - ANSWER_TOKENS)
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
        outcome, left = soak_engine(model, load, settings, engine.pages, max_num_seqs)
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
