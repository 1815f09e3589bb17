"""Case `fuzz`: random mixes of requests against stock vLLM under a budget over the context, and two
tiers against one under a small one.
"""

from __future__ import annotations

import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Annotated, Any

import typer

from benchmarks import report
from benchmarks.children import ChildError, engine_env, run_child
from benchmarks.machine import gpus
from benchmarks.shapes import DEMO_MODEL
from benchmarks.soak import NEAR_TIE_CPU, make_prompts

MAX_MODEL_LEN, MAX_SEQS, STEP_TOKENS, PAGES = 704, 3, 704, 76
"""Three requests of the longest context need 126 pages: some are preempted and resumed."""
LONGEST_PROMPT, LONGEST_ANSWER = 600, 100
LAP_ROUNDS = 40
"""Mixes between two starts of the engines, at most."""
# One tier starts with a budget over the context, and keeps generated pages in its prefix cache
# under the small one too: so must two tiers.
SETTINGS = {
    "retrieval_head": str(DEMO_MODEL / "retrieval_head"),
    "budget": MAX_MODEL_LEN,
    "sink_tokens": 16,
    "recent_tokens": 16,
    "stickiness": 0,
    "cache_generated": True,
}
NEAR_TIE_GPU = 0.1
"""As NEAR_TIE_CPU. vLLM's Triton attention multiplies float32 on tf32 units, our decode kernel does
not: log-probabilities 0.062 apart were seen.
"""
SMALL_BUDGET = 64
TIERS = {"budget": SMALL_BUDGET, "host_kv_gib": 0.25, "gpu_kv_gib": 0.0036}


@dataclass(frozen=True)
class Ask:
    """One request.

    Attributes:
        prompt: token ids.
        arrives: step before which it is added.
        leaves_after: it is aborted once it has so many tokens (0: with its prompt under way); None:
            never.
        params: of ``SamplingParams``.
    """

    prompt: tuple[int, ...]
    arrives: int
    leaves_after: int | None
    params: dict[str, Any]


@dataclass(frozen=True)
class Mix:
    """Requests that meet in an engine.

    Attributes:
        step_tokens: the scheduler's token budget of a step.
        chunked: whether a prompt may be cut where the step's tokens end. On a CPU vLLM's engine
            dies of sampling with a seed behind a cut prompt ("CPU Generator does not use offset",
            vllm/v1/worker/gpu_model_runner.py): these mixes are greedy. All are on a GPU, where a
            sampled token hangs on digits that tf32 products in another order do not share.
        cold: whether the prefix cache is emptied before.
        storm: step after which all running requests are preempted and the prefix cache is emptied,
            if the mix lasts so long.
    """

    asks: tuple[Ask, ...]
    step_tokens: int
    chunked: bool
    cold: bool
    storm: int

    @classmethod
    def draw(cls, seed: str, bases: Sequence[Sequence[int]], on_gpu: bool) -> Mix:
        """The mix of a seed, of prompts that begin as some of ``bases`` do."""
        rng = Random(seed)
        few = rng.sample(range(len(bases)), rng.randint(1, 4))
        chunked = rng.random() < 0.6
        # Long ones run out of pages.
        drawn = {"sampled": not on_gpu and not chunked, "long": rng.random() < 0.4}
        asks = tuple(
            _draw_ask(rng, [bases[i] for i in few], **drawn) for _ in range(rng.randint(3, 8))
        )
        return cls(
            asks,
            rng.choice((16, 17, 33, 64, 100, 200, 256)) if chunked else STEP_TOKENS,
            chunked,
            rng.random() < 0.3,
            rng.choice((3, rng.randint(2, 60))),
        )


def _draw_ask(rng: Random, bases: Sequence[Sequence[int]], sampled: bool, long: bool) -> Ask:
    base = rng.choice(bases)
    # Edges of pages and of chunks, beside any length.
    edges = (1, 2, 15, 16, 17, 32, 33, 255, 256, 257, len(base), len(base) // 16 * 16 + 1)
    cut = (
        len(base)
        if long
        else min(rng.choice((len(base), rng.choice(edges), rng.randint(1, len(base)))), len(base))
    )
    prompt = (*base[:cut], *rng.choice(bases)[: rng.choice((0, 0, 1, 15, 16, 40))])[:LONGEST_PROMPT]
    max_tokens = (
        rng.randint(LONGEST_ANSWER // 2, LONGEST_ANSWER)
        if long
        else rng.choice((1, 2, 15, 16, 17, rng.randint(3, LONGEST_ANSWER // 2)))
    )
    params: dict[str, Any] = {"max_tokens": max_tokens, "ignore_eos": long or rng.random() < 0.8}
    if rng.random() < 0.3 or not sampled:
        params |= {"temperature": 0.0}
    else:
        params |= {"temperature": rng.choice((0.3, 0.8, 1.0, 1.5)), "seed": rng.randrange(2**31)}
        params |= rng.choice(({}, {}, {"top_p": 0.9}, {"top_k": 20}, {"min_p": 0.05}))
        if rng.random() < 0.3:
            params["n"] = rng.randint(2, 3)
    if rng.random() < 0.3:
        params["logprobs"] = rng.choice((0, 1, 5))
    if rng.random() < 0.15:
        params["prompt_logprobs"] = rng.choice((0, 3))
    if not long and rng.random() < 0.3:
        params["stop_token_ids"] = rng.sample(sorted(set(base)), min(3, len(set(base))))
        params["min_tokens"] = min(rng.choice((0, 0, 5)), params["max_tokens"])
    arrives = rng.choice((0, 0, 0, rng.randint(1, 30)))
    leaves_after = rng.choice((0, 1, rng.randint(2, 20))) if rng.random() < 0.2 else None
    return Ask(prompt, arrives, leaves_after, params)


@dataclass
class Answer:
    """What came of one completion of a request.

    Attributes:
        tokens: token ids.
        logprobs: per token the log-probabilities by token id; empty where none were asked for.
        prompt: log-probabilities of the prompt's tokens, each None or by token id; empty where none
            were asked for.
        end: the reasons for its end; None where it was aborted.
    """

    tokens: list[int]
    logprobs: list[dict[int, float]]
    prompt: list[dict[int, float] | None]
    end: tuple[str | None, int | str | None] | None


Answers = list[dict[int, Answer]]
"""Of a mix: of each request its completions, by their index."""


def play(llm: Any, mix: Mix, gaps: bool = False) -> Answers:
    """What an engine answers to a mix.

    Args:
        llm: an engine in this process.
        gaps: take greedy tokens' two likeliest log-probabilities at least, whatever was asked for.
    """
    from vllm import SamplingParams

    engine = llm.llm_engine
    scheduler = engine.engine_core.engine_core.scheduler
    scheduler.max_num_scheduled_tokens, scheduler.scheduler_config.enable_chunked_prefill = (
        mix.step_tokens,
        mix.chunked,
    )
    if mix.cold:
        llm.reset_prefix_cache()
    answers: Answers = [{} for _ in mix.asks]
    waiting = sorted(range(len(mix.asks)), key=lambda index: mix.asks[index].arrives)
    step, prefilling = 0, set()
    while waiting or engine.has_unfinished_requests():
        while waiting and (
            mix.asks[waiting[0]].arrives <= step or not engine.has_unfinished_requests()
        ):
            index = waiting.pop(0)
            ask = mix.asks[index]
            params = {"detokenize": False, **ask.params}
            if gaps and params["temperature"] == 0:
                params["logprobs"] = max(2, params.get("logprobs") or 0)
            engine.add_request(
                str(index), {"prompt_token_ids": list(ask.prompt)}, SamplingParams(**params)
            )
            if ask.leaves_after == 0:
                prefilling.add(index)
        for output in engine.step():
            index = int(output.request_id)
            # Of several completions vLLM gives out one at a time.
            answers[index] |= {
                completion.index: _answer(output, completion) for completion in output.outputs
            }
            leaves_after = mix.asks[index].leaves_after
            if (
                leaves_after
                and not output.finished
                and len(output.outputs[0].token_ids) >= leaves_after
            ):
                engine.abort_request([output.request_id])
        # In the middle of their prompts, if these take several steps; their answers, if not, are as
        # good as none.
        engine.abort_request([str(index) for index in prefilling])
        prefilling.clear()
        step += 1
        if step == mix.storm:
            engine.reset_prefix_cache(reset_running_requests=True)
    return answers


def _answer(output: Any, completion: Any) -> Answer:
    def plain(entry: dict[int, Any] | None) -> dict[int, float] | None:
        return None if entry is None else {token: found.logprob for token, found in entry.items()}

    end = (completion.finish_reason, completion.stop_reason) if completion.finish_reason else None
    return Answer(
        list(completion.token_ids),
        [plain(entry) for entry in completion.logprobs or ()],
        [plain(entry) for entry in output.prompt_logprobs or ()],
        end,
    )


@dataclass
class Verdict:
    """What a comparison found; ``counts``: "requests", "tokens", "near ties" and "wrong";
    ``wrong``: each described.
    """

    counts: Counter[str] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)

    def add(self, other: Verdict) -> None:
        self.counts += other.counts
        self.wrong += other.wrong


def compare(
    name: str, mix: Mix, found: Answers, wanted: Answers, near_tie: float | None
) -> Verdict:
    """Hold one engine's answers to a mix against another's.

    Args:
        near_tie: how far the log-probabilities of two engines may be apart, and a greedy token's
            from the second likeliest's where the token may be another one; ``wanted`` then has
            gaps. None: everything must be equal, bit for bit.
    """
    verdict = Verdict()
    for index, ask in enumerate(mix.asks):
        verdict.counts["requests"] += 1
        if ask.leaves_after == 0:
            continue
        whole = ask.leaves_after is None
        if whole and not set(found[index]) == set(wanted[index]) == set(
            range(ask.params.get("n", 1))
        ):
            verdict.counts["wrong"] += 1
            verdict.wrong.append(
                f"{name}, request {index}: completions {sorted(found[index])} instead of "
                f"{sorted(wanted[index])}"
            )
        for ours, theirs in (
            (found[index][i], wanted[index][i]) for i in found[index].keys() & wanted[index].keys()
        ):
            verdict.counts["tokens"] += len(ours.tokens)
            said = _difference(ask, ours, theirs, near_tie)
            if said == "near tie":
                verdict.counts["near ties"] += 1
            elif said:
                verdict.counts["wrong"] += 1
                verdict.wrong.append(
                    f"{name}, request {index} ({len(ask.prompt)} tokens, {ask.params}): {said}"
                )
    return verdict


def _difference(ask: Ask, ours: Answer, theirs: Answer, near_tie: float | None) -> str | None:
    if near_tie is None:
        return None if ours == theirs else f"{ours} instead of {theirs}"
    if said := _apart("the prompt", ours.prompt, theirs.prompt, near_tie):
        return said
    # Where it was aborted, it may have come farther in one engine than in the other.
    length = (
        min(len(ours.tokens), len(theirs.tokens))
        if ours.end is None or theirs.end is None
        else None
    )
    got, wanted = ours.tokens[:length], theirs.tokens[:length]
    parted = next((i for i, (a, b) in enumerate(zip(got, wanted)) if a != b), None)
    asked = ask.params.get("logprobs")
    if asked is not None and (
        said := _apart(
            "the answer", ours.logprobs[:parted], theirs.logprobs[:parted], near_tie, asked
        )
    ):
        return said
    if parted is not None:
        if ask.params["temperature"] == 0:
            best, second = sorted(theirs.logprobs[parted].values(), reverse=True)[:2]
            if best - second < near_tie:
                return "near tie"
        return f"{got} instead of {wanted}, apart from token {parted} on"
    if length is None and (len(got) != len(wanted) or ours.end != theirs.end):
        return f"{len(got)} tokens, {ours.end}, instead of {len(wanted)}, {theirs.end}"
    return None


def _apart(
    where: str,
    ours: Sequence[dict[int, float] | None],
    theirs: Sequence[dict[int, float] | None],
    near_tie: float,
    asked: int | None = None,
) -> str | None:
    """A sentence where two lists of log-probabilities are further apart than rounding takes them;
    of the ``asked`` likeliest, if ``theirs`` has more.
    """
    for i, (a, b) in enumerate(zip(ours, theirs)):
        if a is None or b is None:
            if a is not b:
                return f"log-probabilities of {where}: {a} instead of {b} at token {i}"
            continue
        # Which tokens are among the likeliest may hang on a near-tie, their log-probabilities do
        # not.
        best = [sorted(entry.values(), reverse=True)[:asked] for entry in (a, b)]
        chosen = [(a[token], b[token]) for token in a.keys() & b.keys()]
        if any(abs(x - y) > near_tie for x, y in [*zip(*best), *chosen]):
            return f"log-probabilities of {where}: {a} instead of {b} at token {i}"
    return None


def engine_arguments(name: str, on_gpu: bool) -> dict[str, Any]:
    """Of ``LLM``: "stock", "specontext" or "two tiers"."""
    arguments: dict[str, Any] = {
        "model": str(DEMO_MODEL),
        "dtype": "float32",
        "max_model_len": MAX_MODEL_LEN,
        "max_num_seqs": MAX_SEQS,
        "max_num_batched_tokens": STEP_TOKENS,
        "enforce_eager": not on_gpu,
        "gpu_memory_utilization": 0.08 if on_gpu else 0.3,
        "kv_cache_memory_bytes": 2 << 30 if on_gpu else None,
        "seed": 0,
        "block_size": 16,
        "num_gpu_blocks_override": PAGES,
        "disable_log_stats": False,
        # A request is let in by its first chunk's pages, and not only when there are pages for all
        # of it: it is thrown out again more often.
        "scheduler_reserve_full_isl": False,
    }
    if name == "stock":
        # vLLM's own CPU attention takes blocks of 32 tokens; as many tokens in all.
        return (
            arguments
            if on_gpu
            else arguments | {"block_size": 32, "num_gpu_blocks_override": -(-PAGES // 2)}
        )
    settings = SETTINGS | TIERS if name == "two tiers" else SETTINGS
    return arguments | {
        "attention_backend": "specontext",
        "additional_config": {"specontext": settings},
    }


def play_all(llm: Any, name: str, seed: str, rounds: int, on_gpu: bool) -> dict[str, list[Answers]]:
    """Every mix's answers by what gave them: "stock", "specontext" and "one tier" (the same engine
    under the small budget), or "two tiers".
    """
    bases = make_prompts(DEMO_MODEL, 24)
    passes = {
        "stock": (("stock", None),),
        "specontext": (("specontext", MAX_MODEL_LEN), ("one tier", SMALL_BUDGET)),
        "two tiers": (("two tiers", None),),
    }[name]
    found: dict[str, list[Answers]] = {}
    for title, budget in passes:
        if budget:
            llm.collective_rpc("specontext_set", kwargs={"budget": budget})
        llm.reset_prefix_cache()
        found[title] = [
            play(llm, Mix.draw(f"{seed}/{number}", bases, on_gpu), gaps=name == "stock")
            for number in range(rounds)
        ]
    return found


def preemptions(llm: Any) -> int:
    return sum(
        metric.value for metric in llm.get_metrics() if metric.name == "vllm:num_preemptions"
    )


def judge(seed: str, answers: dict[str, list[Answers]], on_gpu: bool) -> dict[str, Verdict]:
    """Verdicts by comparison; a difference names the seed and the mix's number."""
    bases = make_prompts(DEMO_MODEL, 24)
    verdicts = {}
    for name, ours, theirs, tie in (
        (
            "budget over the context, against stock vLLM",
            "specontext",
            "stock",
            NEAR_TIE_GPU if on_gpu else NEAR_TIE_CPU,
        ),
        ("two tiers, against one under a small budget", "two tiers", "one tier", None),
    ):
        verdicts[name] = Verdict()
        for number, (found, wanted) in enumerate(zip(answers[ours], answers[theirs], strict=True)):
            verdicts[name].add(
                compare(
                    f"--seed {seed}, mix {number}",
                    Mix.draw(f"{seed}/{number}", bases, on_gpu),
                    found,
                    wanted,
                    tie,
                )
            )
    return verdicts


def run_engine(name: str, on_gpu: bool, seed: str, rounds: int) -> Iterator[tuple[str, Any]]:
    """Yields ``("answers", (answers by title, preemptions))``; runs in a child."""
    from vllm import LLM

    llm = LLM(**engine_arguments(name, on_gpu))
    yield "answers", (play_all(llm, name, seed, rounds, on_gpu), preemptions(llm))


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
