"""The command `fuzz`."""

from __future__ import annotations

import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Annotated, Any

import typer

from benchmarks import report
from benchmarks.children import ChildError, engine_env, run_child
from benchmarks.fuzz.engines import SMALL_BUDGET, run_engine
from benchmarks.fuzz.mixes import LONGEST_PROMPT, MAX_MODEL_LEN, MAX_SEQS, PAGES, STEP_TOKENS
from benchmarks.fuzz.verdicts import NEAR_TIE_GPU, Verdict, judge
from benchmarks.machine import gpus
from benchmarks.near_tie import NEAR_TIE_CPU

LAP_ROUNDS = 40
"""Mixes between two starts of the engines, at most."""
TABLES = {
    "Mixes": (
        report.Column("name", "compared"),
        report.Column("mixes", "mixes", ",d"),
        report.Column("requests", "requests", ",d"),
        report.Column("tokens", "tokens", ",d"),
        report.Column("preemptions", "preemptions", ",d"),
        report.Column("near_ties", "parted at a near-tie", ",d"),
        report.Column("wrong", "wrong", ",d"),
    ),
}


def main(
    minutes: Annotated[float, typer.Option(min=0.5, help="No lap begins later.")] = 60.0,
    seed: Annotated[
        int | None,
        typer.Option(
            help="Of the first lap (the others count on from it); by default the time of day."
        ),
    ] = None,
    rounds: Annotated[int, typer.Option(min=1, help="Mixes of a lap.")] = LAP_ROUNDS,
    laps: Annotated[int | None, typer.Option(min=1, help="No more laps than this.")] = None,
    out: Annotated[Path, typer.Option(help="Folder of the result files.")] = report.RESULTS,
    work: Annotated[
        Path | None, typer.Option(help="Folder of the engines' logs; default a new temporary one.")
    ] = None,
) -> None:
    """Play random mixes of requests to three engines, lap by lap, and compare every token. Exit
    code 1 if one differs.
    """
    folder = work or Path(tempfile.mkdtemp(prefix="specontext-bench-"))
    folder.mkdir(parents=True, exist_ok=True)
    on_gpu = bool(gpus())
    near_tie = NEAR_TIE_GPU if on_gpu else NEAR_TIE_CPU
    first = int(time.time()) if seed is None else seed
    result = report.Report(
        "fuzz", f"Demo model: random mixes of requests of 1 to {MAX_MODEL_LEN} tokens", TABLES
    )
    result.notes = [
        f"float32. A mix is 3 to 8 requests of up to {LONGEST_PROMPT} tokens that share "
        "beginnings, arrive, are aborted and are preempted at random, greedy or, "
        "on a CPU, sampled with a seed, some with n, stop tokens and log-probabilities, "
        f"{MAX_SEQS} at once over {PAGES} pages, with 16 to {STEP_TOKENS} tokens a step.",
        "Against stock vLLM every token must be the same, and log-probabilities within "
        f"{near_tie:g}; a near-tie is a greedy token that was less than that ahead. "
        f"Two tiers (budget {SMALL_BUDGET}) must give one tier's tokens and log-probabilities bit "
        "for bit.",
    ]
    totals: dict[str, Verdict] = {}
    preempted: Counter[str] = Counter()
    begin, lap, mixes = time.monotonic(), 0, 0
    while time.monotonic() - begin < 60 * minutes and lap != laps:
        name = str(first + lap)
        print(f"lap {lap}: --seed {name} --laps 1 --rounds {rounds}", flush=True)
        answers: dict[str, Any] = {}
        try:
            for engine in ("stock", "specontext", "two tiers"):
                log = folder / f"{engine.replace(' ', '-')}.log"
                ((_, (found, count)),) = run_child(
                    run_engine,
                    engine,
                    on_gpu,
                    name,
                    rounds,
                    log=log,
                    seconds=3600,
                    env=engine_env(on_gpu),
                )
                answers |= found
                preempted[engine] += count
        except ChildError as error:
            result.failures[f"seed {name}, {engine}"] = str(error)
            break
        for title, verdict in judge(name, answers, on_gpu).items():
            totals.setdefault(title, Verdict()).add(verdict)
            for said in verdict.wrong:
                print(said, flush=True)
        lap, mixes = lap + 1, mixes + rounds
        result.rows = [
            {
                "name": title,
                "mixes": mixes,
                "preemptions": preempted["two tiers" if title.startswith("two") else "stock"],
                **{
                    key.replace(" ", "_"): verdict.counts[key]
                    for key in ("requests", "tokens", "near ties", "wrong")
                },
            }
            for title, verdict in totals.items()
        ]
        result.details = {
            "first_seed": first,
            "laps": lap,
            "rounds": rounds,
            "minutes": (time.monotonic() - begin) / 60,
            "preemptions": dict(preempted),
        }
        result.failures |= {
            title: f"{verdict.counts['wrong']} wrong answers, such as {verdict.wrong[0]}"
            for title, verdict in totals.items()
            if verdict.wrong
        }
        result.write(out)
    result.write(out)
    result.show()
    raise typer.Exit(1 if result.failures else 0)
