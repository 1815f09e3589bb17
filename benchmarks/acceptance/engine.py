"""One engine in lossless mode answers all prompts; runs in a child process."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

from benchmarks.acceptance.chat import CHAT
from benchmarks.real.long import repeated
from benchmarks.real.prompts import Group
from specontext_vllm.config import CONFIG_KEY
from specontext_vllm.engine.draft_length import MAX_DRAFTS


@dataclass(frozen=True)
class AcceptanceSpec:
    """What the engine's process runs: see the command's options.

    Attributes:
        groups: prompts of one task and context each.
    """

    model: str
    head: str
    on_gpu: bool
    dtype: str
    budget: int
    answer_tokens: int
    groups: tuple[Group, ...]

    def arguments(self) -> dict[str, Any]:
        """Arguments of ``LLM``."""
        longest = max(len(prompt.tokens) for group in self.groups for prompt in group.prompts)
        return {
            "model": self.model,
            "dtype": self.dtype,
            # Room for what is drafted behind an answer's end.
            "max_model_len": longest + self.answer_tokens + MAX_DRAFTS + 1,
            "max_num_seqs": MAX_DRAFTS + 1,
            "seed": 0,
            "attention_backend": "specontext",
            "additional_config": {
                CONFIG_KEY: {
                    "retrieval_head": self.head,
                    "budget": self.budget,
                    "mode": "lossless",
                }
            },
        }


class Verdicts(NamedTuple):
    """What became of a group's drafts.

    Attributes:
        accepted: of each round in which all drafts were made, how many were accepted.
        tokens: of the answers.
        repeated: share of the answers' 4-grams that stood in the same answer before.
    """

    accepted: list[int]
    tokens: int
    repeated: float


def run_engine(spec: AcceptanceSpec) -> Iterator[tuple[str, Verdicts]]:
    """Answer the groups' prompts.

    Yields:
        A group's index, and its verdicts.
    """
    from vllm import LLM, SamplingParams

    llm = LLM(**spec.arguments())
    scheduler = llm.llm_engine.engine_core.engine_core.scheduler
    length, verdicts = scheduler.draft_length, []

    def observe(drafted: int, accepted: int) -> None:
        if drafted == MAX_DRAFTS:
            verdicts.append(accepted)

    length.choose, length.observe = lambda contexts: MAX_DRAFTS, observe
    for index, group in enumerate(spec.groups):
        accepted: list[int] = []
        answers: list[list[int]] = []
        params = SamplingParams(
            temperature=0,
            max_tokens=spec.answer_tokens,
            # A text goes on, a chat's answer is over where the model says so.
            ignore_eos=group.task != CHAT,
            detokenize=False,
        )
        for prompt in group.prompts:
            verdicts.clear()
            asked = [{"prompt_token_ids": prompt.tokens}]
            (answer,) = llm.generate(asked, params, use_tqdm=False)[0].outputs
            answers.append(list(answer.token_ids))
            # Drafts of the last round may lie behind an answer that ended by itself.
            accepted += verdicts[:-1] if answer.finish_reason == "stop" else verdicts
        tokens = sum(map(len, answers))
        again = sum(repeated(answer) * len(answer) for answer in answers) / tokens
        yield str(index), Verdicts(accepted, tokens, again)
