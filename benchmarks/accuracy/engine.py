"""One engine answers the grid; runs in a child process."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from benchmarks.accuracy.cells import DENSE, Group, Setting
from benchmarks.accuracy.longbench import find_tasks
from benchmarks.accuracy.summary import says_nothing, score
from benchmarks.prefilled import Answers, EngineSpec, ask, kept_tokens, portions, prefill


def run_engine(
    spec: EngineSpec, work: Sequence[tuple[Group, Sequence[Setting]]], longbench: Path | None
) -> Iterator[tuple[str, Any]]:
    """Answer each group's prompts once with each of its settings.

    A group's prompts are prefilled first, as many at a time as the KV cache keeps. Where dense
    comes first and cannot do the task, the group's other settings are left out, and so are the
    task's later (longer) groups: they would say nothing.

    Yields:
        ``("ready", facts)``; then ``("prefilled", (group, seconds))`` a portion and
        ``("cell", (group, setting, result))`` or, for replies that cannot be scored,
        ``("failed", (group, setting, why))``, groups by their index. A result has ``replies``
        (texts, or lists of log-probabilities), their ``scores``, ``tokens`` emitted, ``seconds``
        they took, share of the prompts' tokens that were ``cached``, and the engine's ``stats``.
    """
    begin = time.perf_counter()
    from vllm import LLM, SamplingParams

    from benchmarks import forcing

    tasks, failed = find_tasks(longbench), set()
    arguments = spec.arguments()
    forces = any(example.forced for group, _ in work for example in group.examples)
    llm = LLM(**arguments, **(forcing.engine_arguments(spec.on_gpu) if forces else {}))
    yield "ready", {"start_s": round(time.perf_counter() - begin, 1), "arguments": arguments}

    for index, (group, settings) in enumerate(work):
        task = tasks[group.task]
        if task.name in failed:
            continue
        answers = {setting: Answers() for setting in settings}
        parts = portions(
            [len(e.prompt) + max(e.reply_tokens, len(e.forced or ())) for e in group.examples],
            kept_tokens(llm),
        )
        for part in parts:
            examples = [group.examples[place] for place in part]
            prompts = [{"prompt_token_ids": e.prompt} for e in examples]
            params = [
                SamplingParams(temperature=0, max_tokens=e.reply_tokens)
                if e.forced is None
                else forcing.forced_params(e.forced, spec.on_gpu)
                for e in examples
            ]
            yield "prefilled", (index, round(prefill(llm, prompts), 2))
            for setting in list(answers):
                collected = answers[setting]
                outputs, seconds, stats = ask(llm, setting.changes(), prompts, params)
                collected.add(outputs, seconds, stats)
                try:
                    replies = [
                        output.outputs[0].text
                        if e.forced is None
                        else forcing.log_probabilities(output.outputs[0], e.forced)
                        for output, e in zip(outputs, examples, strict=True)
                    ]
                except RuntimeError as error:  # one task's trouble, not the grid's
                    del answers[setting]
                    yield "failed", (index, setting, str(error))
                    continue
                collected.replies += replies
                collected.scores += [
                    score(task, e, reply) for e, reply in zip(examples, replies, strict=True)
                ]
                if part is parts[-1]:
                    yield "cell", (index, setting, collected.result())
                if setting.retriever == DENSE and says_nothing(task, collected.scores):
                    if part is parts[-1]:
                        failed.add(task.name)
                    answers = {setting: collected}
                    break
