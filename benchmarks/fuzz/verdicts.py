"""What differs between two engines' answers."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

from benchmarks.fuzz.engines import Answer, Answers
from benchmarks.fuzz.mixes import Mix, Request
from benchmarks.near_tie import NEAR_TIE_CPU
from benchmarks.prompts import make_prompts
from benchmarks.shapes import DEMO_MODEL

NEAR_TIE_GPU = 0.1
"""As NEAR_TIE_CPU. vLLM's Triton attention multiplies float32 on tf32 units, our decode kernel does
not. Differences of up to 0.062 were measured.
"""


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
        near_tie: how much log-probabilities may differ between the engines; where the two likeliest
            tokens are closer than that, a greedy token may differ too. ``wanted`` must then have
            both tokens' log-probabilities. None: everything must be equal, bit for bit.
    """
    verdict = Verdict()
    for index, request in enumerate(mix.requests):
        verdict.counts["requests"] += 1
        if request.leaves_after == 0:
            continue
        whole = request.leaves_after is None
        if whole and not set(found[index]) == set(wanted[index]) == set(
            range(request.params.get("n", 1))
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
            said = _difference(request, ours, theirs, near_tie)
            if said == "near tie":
                verdict.counts["near ties"] += 1
            elif said:
                verdict.counts["wrong"] += 1
                verdict.wrong.append(
                    f"{name}, request {index} ({len(request.prompt)} tokens, "
                    f"{request.params}): {said}"
                )
    return verdict


def _difference(
    request: Request, ours: Answer, theirs: Answer, near_tie: float | None
) -> str | None:
    if near_tie is None:
        return None if ours == theirs else f"{ours} instead of {theirs}"
    if said := _logprob_difference("the prompt", ours.prompt, theirs.prompt, near_tie):
        return said
    # An aborted request may have got further in one engine than in the other.
    length = (
        min(len(ours.tokens), len(theirs.tokens))
        if ours.end is None or theirs.end is None
        else None
    )
    got, wanted = ours.tokens[:length], theirs.tokens[:length]
    parted = next((i for i, (a, b) in enumerate(zip(got, wanted)) if a != b), None)
    asked = request.params.get("logprobs")
    if asked is not None and (
        said := _logprob_difference(
            "the answer", ours.logprobs[:parted], theirs.logprobs[:parted], near_tie, asked
        )
    ):
        return said
    if parted is not None:
        if request.params["temperature"] == 0:
            best, second = sorted(theirs.logprobs[parted].values(), reverse=True)[:2]
            if best - second < near_tie:
                return "near tie"
        return f"{got} instead of {wanted}, apart from token {parted} on"
    if length is None and (len(got) != len(wanted) or ours.end != theirs.end):
        return f"{len(got)} tokens, {ours.end}, instead of {len(wanted)}, {theirs.end}"
    return None


def _logprob_difference(
    where: str,
    ours: Sequence[dict[int, float] | None],
    theirs: Sequence[dict[int, float] | None],
    near_tie: float,
    asked: int | None = None,
) -> str | None:
    """A sentence if two lists of log-probabilities differ by more than rounding; None if not.

    Args:
        asked: compare so many of the likeliest, where ``theirs`` has more.
    """
    for i, (a, b) in enumerate(zip(ours, theirs)):
        if a is None or b is None:
            if a is not b:
                return f"log-probabilities of {where}: {a} instead of {b} at token {i}"
            continue
        # A near-tie may change which tokens are among the likeliest, but not their
        # log-probabilities.
        best = [sorted(entry.values(), reverse=True)[:asked] for entry in (a, b)]
        chosen = [(a[token], b[token]) for token in a.keys() & b.keys()]
        if any(abs(x - y) > near_tie for x, y in [*zip(*best), *chosen]):
            return f"log-probabilities of {where}: {a} instead of {b} at token {i}"
    return None


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
