"""One engine answers all prompts and counts the drafts that it accepts; runs in a child process."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from benchmarks.acceptance.chat import CHAT
from benchmarks.real.long import repeated
from benchmarks.real.prompts import Group
from specontext_vllm.config import CONFIG_KEY
from specontext_vllm.engine.draft_length import MAX_DRAFTS

LOSSLESS, EAGLE3 = "lossless", "eagle3"
EAGLE3_DRAFTS = 5
"""The most drafts of an EAGLE-3 head that are measured, as many as `specontext distill` measures.
"""


@dataclass(frozen=True)
class AcceptanceSpec:
    """What the engine's process runs: see the command's options.

    Attributes:
        head: folder of the retrieval head.
        drafter: folder of an EAGLE-3 head that drafts; None: lossless mode.
        groups: prompts of one task and context each.
    """

    model: str
    head: str
    drafter: str | None
    on_gpu: bool
    dtype: str
    budget: int
    answer_tokens: int
    groups: tuple[Group, ...]

    @property
    def most_drafts(self) -> int:
        """Drafts of a step, at the most."""
        return EAGLE3_DRAFTS if self.drafter else MAX_DRAFTS

    def arguments(self) -> dict[str, Any]:
        """Arguments of ``LLM``."""
        longest = max(len(prompt.tokens) for group in self.groups for prompt in group.prompts)
        settings: dict[str, Any] = {"retrieval_head": self.head, "budget": self.budget}
        arguments: dict[str, Any] = {
            "model": self.model,
            "dtype": self.dtype,
            # Room for the drafts that the last step verifies, and for those that it makes: without
            # it vLLM's runner hands out zeros.
            "max_model_len": longest + self.answer_tokens + 2 * self.most_drafts + 1,
            "max_num_seqs": MAX_DRAFTS + 1,
            # On a CPU compilation takes minutes, and some again for each number of drafts; on a GPU
            # a drafter's graphs are captured for one number.
            "enforce_eager": self.drafter is not None or not self.on_gpu,
            "seed": 0,
            "attention_backend": "specontext",
            "additional_config": {CONFIG_KEY: settings},
        }
        if self.drafter is None:
            settings["mode"] = "lossless"
        else:
            arguments["speculative_config"] = {
                "method": EAGLE3,
                "model": self.drafter,
                "num_speculative_tokens": EAGLE3_DRAFTS,
            }
            arguments["disable_log_stats"] = False
        return arguments


class Verdicts(NamedTuple):
    """What became of a group's drafts.

    Attributes:
        reached: by the number of drafts of a round: the rounds that verified as many, then for each
            position those that accepted the draft there, and so all before it.
        tokens: of the answers.
        repeated: share of the answers' 4-grams that stood in the same answer before.
    """

    reached: dict[int, list[int]]
    tokens: int
    repeated: float


def run_engine(spec: AcceptanceSpec) -> Iterator[tuple[str, Verdicts]]:
    """Answer the groups' prompts.

    Yields:
        A group's index, and its verdicts.

    Raises:
        ValueError: the drafter has too few positions for the longest prompt.
    """
    from vllm import LLM

    llm = LLM(**spec.arguments())
    measure = _measure_lossless(llm) if spec.drafter is None else measure_eagle3(llm)
    for index, group in enumerate(spec.groups):
        yield str(index), measure(group, spec.answer_tokens)


Measure = Callable[[Group, int], Verdicts]


def _answer(llm: Any, prompt: Sequence[int], task: str, answer_tokens: int) -> Any:
    """vLLM's output for one prompt, greedily."""
    from vllm import SamplingParams

    params = SamplingParams(
        temperature=0,
        max_tokens=answer_tokens,
        # A text goes on, a chat's answer is over where the model says so.
        ignore_eos=task != CHAT,
        detokenize=False,
    )
    asked = [{"prompt_token_ids": list(prompt)}]
    (answer,) = llm.generate(asked, params, use_tqdm=False)[0].outputs
    return answer


def _verdicts(reached: dict[int, list[int]], answers: Sequence[Sequence[int]]) -> Verdicts:
    tokens = sum(map(len, answers))
    again = sum(repeated(list(answer)) * len(answer) for answer in answers) / tokens
    return Verdicts(reached, tokens, again)


def _measure_lossless(llm: Any) -> Measure:
    """Every step drafts the most tokens there are, so each position is seen."""
    length = llm.llm_engine.engine_core.engine_core.scheduler.draft_length
    verdicts: list[int] = []

    def observe(drafted: int, accepted: int) -> None:
        if drafted == MAX_DRAFTS:
            verdicts.append(accepted)

    length.choose, length.observe = lambda contexts: MAX_DRAFTS, observe

    def measure(group: Group, answer_tokens: int) -> Verdicts:
        accepted: list[int] = []
        answers: list[Sequence[int]] = []
        for prompt in group.prompts:
            verdicts.clear()
            answer = _answer(llm, prompt.tokens, group.task, answer_tokens)
            answers.append(answer.token_ids)
            # Drafts of the last round may lie behind an answer that ended by itself.
            accepted += verdicts[:-1] if answer.finish_reason == "stop" else verdicts
        return _verdicts({MAX_DRAFTS: reached_by(accepted)}, answers)

    return measure


def reached_by(verdicts: Sequence[int]) -> list[int]:
    """The number of rounds of ``MAX_DRAFTS`` drafts, then for each position of those that accepted
    the draft there.
    """
    return [sum(accepted >= k for accepted in verdicts) for k in range(MAX_DRAFTS + 1)]


def measure_eagle3(llm: Any) -> Measure:
    """What answers a group's prompts with every number of drafts. A step's number is the
    scheduler's to say, so one engine measures all of them, and prompts stay in its prefix cache.

    Raises:
        ValueError: the drafter has too few positions.
        RuntimeError: in the function that is returned: rounds made another number of drafts.
    """
    config = llm.llm_engine.vllm_config
    room = config.speculative_config.draft_model_config.max_model_len
    needed = config.model_config.max_model_len
    if room < needed:
        raise ValueError(
            f"--drafter: it drafts up to position {room}, which is fewer than the {needed} that "
            "the longest prompt takes with its answer; use shorter --contexts, or a head that was "
            "trained on longer ones."
        )
    scheduler = llm.llm_engine.engine_core.engine_core.scheduler

    def measure(group: Group, answer_tokens: int) -> Verdicts:
        reached: dict[int, list[int]] = {}
        answers: list[Sequence[int]] = []
        for drafts in range(1, EAGLE3_DRAFTS + 1):
            # What vLLM makes of num_speculative_tokens_per_batch_size.
            scheduler.dynamic_sd_lookup = [drafts] * (config.scheduler_config.max_num_seqs + 1)
            before = _counters(llm)
            answers = [
                _answer(llm, prompt.tokens, group.task, answer_tokens).token_ids
                for prompt in group.prompts
            ]
            gained = [now - then for now, then in zip(_counters(llm), before, strict=True)]
            made, rounds, *accepted = gained
            if made != drafts * rounds:
                raise RuntimeError(
                    f"rounds of {drafts} drafts: {rounds} of them verified {made} drafts."
                )
            reached[drafts] = [rounds, *accepted[:drafts]]
        # The answers are those of the longest steps.
        return _verdicts(reached, answers)

    return measure


def _counters(llm: Any) -> list[int]:
    """vLLM's counts so far: drafts, rounds that verified some, and for each position the rounds
    that accepted the draft there.
    """
    prefix = "vllm:spec_decode_num_"
    found = {metric.name.removeprefix(prefix): metric for metric in llm.get_metrics()}
    rounds, drafts = found["drafts"].value, found["draft_tokens"].value
    return [drafts, rounds, *found["accepted_tokens_per_pos"].values]
