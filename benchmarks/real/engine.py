"""One engine asks all prompts under each of its settings; runs in a child process."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from benchmarks.prefilled import Answers, EngineSpec, ask, kept_tokens, portions, prefill
from benchmarks.real.prompts import Group, Prompt, Task
from benchmarks.real.settings import DENSE, Setting, dense_setting
from benchmarks.real.tasks import Sources


@dataclass(frozen=True)
class Generation:
    """How long replies are made: greedy at temperature 0, else drawn from a seed, the same for all
    settings.
    """

    temperature: float = 0.0
    seed: int = 0


def run_engine(
    spec: EngineSpec,
    work: Sequence[tuple[Group, Sequence[Setting]]],
    sources: Sources,
    generation: Generation,
) -> Iterator[tuple[str, Any]]:
    """Ask each group's prompts once with each of its settings.

    A group's prompts are prefilled first, as many at a time as the KV cache keeps. Where dense
    cannot do the task, the group's other settings are left out.

    Yields:
        ``("ready", facts)``; then ``("prefilled", (group, seconds))`` a portion and
        ``("cell", (group, setting, result))`` or, for replies that cannot be scored,
        ``("failed", (group, setting, why))``, groups by their index. A result has the ``scores``,
        texts of free ``replies`` (of long ones the token ids), ``tokens`` emitted, ``seconds`` they
        took, share of the prompts' tokens that were ``cached``, and the engine's ``stats``.
    """
    begin = time.perf_counter()
    from vllm import LLM

    from benchmarks import forcing

    tasks, arguments = sources.tasks()[0], spec.arguments()
    llm = LLM(**arguments, **forcing.engine_arguments(spec.on_gpu))
    yield "ready", {"start_s": round(time.perf_counter() - begin, 1), "arguments": arguments}

    for index, (group, settings) in enumerate(work):
        task, answers = tasks[group.task], {setting: Answers() for setting in settings}
        parts = portions(
            [len(prompt.tokens) + prompt.reply_room for prompt in group.prompts],
            kept_tokens(llm),
        )
        for part in parts:
            prompts = [group.prompts[place] for place in part]
            once = [{"prompt_token_ids": prompt.tokens} for prompt in prompts]
            yield "prefilled", (index, round(prefill(llm, once), 2))
            asking = _Asking(llm, spec.on_gpu, task, generation)
            for setting in list(answers):
                collected = answers[setting]
                try:
                    asking.run(setting, prompts, collected)
                except RuntimeError as error:  # one task's trouble, not the others'
                    del answers[setting]
                    yield "failed", (index, setting, str(error))
                    continue
                if part is parts[-1]:
                    yield "cell", (index, setting, collected.result())
                if setting.variant.retriever == DENSE and task.says_nothing(collected.scores):
                    answers = {setting: collected}
                    break


@dataclass(frozen=True)
class _Asking:
    """One task's prompts, asked under a setting."""

    llm: Any
    on_gpu: bool
    task: Task
    generation: Generation

    def run(self, setting: Setting, prompts: Sequence[Prompt], into: Answers) -> None:
        """Add the replies and their scores.

        Raises:
            RuntimeError: a forced reply came out otherwise.
        """
        if self.task.kind == "long":
            self._run_long(setting, prompts, into)
            return
        requests = [(prompt, forced) for prompt in prompts for forced in _asked(prompt)]
        asked = [{"prompt_token_ids": prompt.tokens} for prompt, _ in requests]
        params = [self._params(prompt, forced) for prompt, forced in requests]
        outputs, seconds, stats = ask(self.llm, setting.changes(), asked, params)
        into.add(outputs, seconds, stats)
        replies = iter(
            self._reply(output.outputs[0], forced)
            for output, (_, forced) in zip(outputs, requests, strict=True)
        )
        grouped = [[next(replies) for _ in _asked(prompt)] for prompt in prompts]
        if not any(prompt.forced for prompt in prompts):
            into.replies += [reply for (reply,) in grouped]
        into.scores += [
            self.task.score(prompt, mine) for prompt, mine in zip(prompts, grouped, strict=True)
        ]

    def _run_long(self, setting: Setting, prompts: Sequence[Prompt], into: Answers) -> None:
        """What the setting writes, and what dense attention gives that."""
        from vllm import SamplingParams

        from benchmarks import forcing

        asked = [{"prompt_token_ids": prompt.tokens} for prompt in prompts]
        params = [
            SamplingParams(
                temperature=self.generation.temperature,
                seed=self.generation.seed + number if self.generation.temperature else None,
                max_tokens=prompt.reply_tokens,
                min_tokens=prompt.reply_tokens,
                ignore_eos=True,
                detokenize=False,
            )
            for number, prompt in enumerate(prompts, len(into.scores))
        ]
        outputs, seconds, stats = ask(self.llm, setting.changes(), asked, params)
        into.add(outputs, seconds, stats)
        written = [list(output.outputs[0].token_ids) for output in outputs]
        forced = [forcing.forced_params(tokens, self.on_gpu) for tokens in written]
        judged, _, _ = ask(self.llm, dense_setting().changes(), asked, forced)
        into.replies += written
        into.scores += [
            self.task.score(prompt, [forcing.log_probabilities(output.outputs[0], tokens)])
            for prompt, output, tokens in zip(prompts, judged, written, strict=True)
        ]

    def _params(self, prompt: Prompt, forced: list[int] | None) -> Any:
        from vllm import SamplingParams

        from benchmarks import forcing

        if forced is not None:
            return forcing.forced_params(forced, self.on_gpu)
        return SamplingParams(temperature=0, max_tokens=prompt.reply_tokens)

    def _reply(self, output: Any, forced: list[int] | None) -> Any:
        from benchmarks import forcing

        if forced is None:
            return output.text
        return forcing.log_probabilities(output, forced)


def _asked(prompt: Prompt) -> Sequence[list[int] | None]:
    """The replies to force, one request each; None: a free one."""
    return prompt.forced or [None]
