"""LongBench (Bai et al. 2024, arXiv 2308.14508) from the user's own JSONL files: one file a
dataset, as it is published.

The metrics are LongBench's. Its prompt templates are not ours to copy: the plain prompts here are
our own, so figures compare between the rows of one table, not with published ones. Contexts that
are too long lose their middle, as in LongBench.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.accuracy import metrics
from benchmarks.accuracy.tasks import TASKS, Task
from benchmarks.accuracy.writer import Example, Writer

Metric = Callable[[str, Sequence[str]], float]


class LongBenchError(ValueError):
    """Unusable files; the message is one sentence."""


@dataclass(frozen=True)
class Dataset:
    """How a dataset is asked and scored.

    Attributes:
        before, after: text around the context; ``{input}`` in it is the record's question.
        reply_tokens: LongBench's limit of the reply.
        chat: whether the prompt is a chat message; few-shot and code prompts are to be gone on
            with.
    """

    metric: Callable[..., float]
    reply_tokens: int
    before: str
    after: str
    chat: bool = True


_READ, _ANSWER = (
    "Read the text and answer the question in a few words.\n\n",
    "\n\nQuestion: {input}\nAnswer in a few words:",
)
_SHOTS = "\n{input}"


def _of_first_line(metric: Metric) -> Metric:
    return lambda reply, answers: metric(metrics.first_line(reply), answers)


DATASETS = {
    "narrativeqa": Dataset(metrics.qa_f1, 128, _READ, _ANSWER),
    "qasper": Dataset(
        metrics.qa_f1,
        128,
        _READ,
        _ANSWER.replace("few words:", 'few words, with yes or no, or with "unanswerable":'),
    ),
    "multifieldqa_en": Dataset(metrics.qa_f1, 64, _READ, _ANSWER),
    "hotpotqa": Dataset(metrics.qa_f1, 32, _READ, _ANSWER),
    "2wikimqa": Dataset(metrics.qa_f1, 32, _READ, _ANSWER),
    "musique": Dataset(metrics.qa_f1, 32, _READ, _ANSWER),
    "gov_report": Dataset(
        metrics.rouge_l, 512, "Summarise this report in one page.\n\n", "\n\nSummary:"
    ),
    "qmsum": Dataset(
        metrics.rouge_l,
        512,
        "Read this transcript of a meeting.\n\n",
        "\n\nIn one or more sentences: {input}\nAnswer:",
    ),
    "multi_news": Dataset(
        metrics.rouge_l, 512, "Summarise these news articles in one page.\n\n", "\n\nSummary:"
    ),
    "trec": Dataset(metrics.classification, 64, "", _SHOTS, chat=False),
    "triviaqa": Dataset(_of_first_line(metrics.qa_f1), 32, "", _SHOTS, chat=False),
    "samsum": Dataset(_of_first_line(metrics.rouge_l), 128, "", _SHOTS, chat=False),
    "passage_count": Dataset(
        metrics.number_share,
        32,
        "Some of these paragraphs are repeated.\n\n",
        "\n\nHow many different paragraphs are there? Answer with the number only:",
    ),
    "passage_retrieval_en": Dataset(
        metrics.number_share,
        32,
        "",
        "\n\nWhich paragraph is this the summary of?\n{input}\n"
        'Answer with its name only, like "Paragraph 1":',
    ),
    "lcc": Dataset(metrics.code_similarity, 64, "", "{input}", chat=False),
    "repobench-p": Dataset(metrics.code_similarity, 64, "", "{input}", chat=False),
}
"""The English and code sets. The Chinese ones need a word segmenter for their metrics and are not
served.
"""


def find_tasks(folder: Path | None) -> dict[str, Task]:
    """All tasks by name: the made-up ones, and those of LongBench's files where a folder of them is
    given; see ``read_folder``.
    """
    return TASKS if folder is None else {**TASKS, **read_folder(folder)[0]}


def read_folder(folder: Path) -> tuple[dict[str, Task], list[str]]:
    """A task ``longbench/<dataset>`` for each known file in the folder, and the names of the files
    that are left out.

    Raises:
        LongBenchError: no known file, or a line of another form.
    """
    files = sorted(folder.glob("*.jsonl"))
    known = [file for file in files if file.stem in DATASETS]
    if not known:
        raise LongBenchError(
            f"--longbench: {folder} holds none of LongBench's files "
            f"({', '.join(f'{name}.jsonl' for name in DATASETS)})."
        )
    tasks = (_task(file.stem, _records(file)) for file in known)
    return {task.name: task for task in tasks}, [file.name for file in files if file not in known]


def _records(file: Path) -> list[dict[str, Any]]:
    records = []
    # Not splitlines: it also splits at the line separators of Unicode, which JSON strings may hold.
    for number, line in enumerate(file.read_text(encoding="utf-8").split("\n"), 1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
            if not (
                isinstance(record["context"], str)
                and isinstance(record["input"], str)
                and record["answers"]
            ):
                raise KeyError("answers")
        except (ValueError, KeyError, TypeError) as error:
            raise LongBenchError(
                f"--longbench: line {number} of {file} lacks a readable context, input or answers "
                f"({error})."
            ) from None
        records.append(record)
    if not records:
        raise LongBenchError(f"--longbench: {file} is empty.")
    return records


def _task(name: str, records: list[dict[str, Any]]) -> Task:
    dataset = DATASETS[name]
    metric = dataset.metric
    if metric is metrics.classification:
        metric = _of_first_line(
            partial(metrics.classification, classes=records[0].get("all_classes") or ())
        )

    def make(writer: Writer, seed: int, context: int) -> Example:
        record = records[seed]
        prompt = _prompt(writer, dataset, record["context"], record["input"], context)
        return Example(prompt, tuple(record["answers"]), dataset.reply_tokens)

    about = f"LongBench {name}, {len(records)} records, prompts of our own"
    return Task(f"longbench/{name}", "score", metric, make, about, count=len(records), floor=0.05)


def _prompt(writer: Writer, dataset: Dataset, text: str, question: str, context: int) -> list[int]:
    """Token ids of at most ``context``; the middle of the text is left out where it is longer."""
    before, after = (part.replace("{input}", question) for part in (dataset.before, dataset.after))

    def whole(body: str) -> list[int]:
        content = before + body + after
        return (
            writer.prompt([{"role": "user", "content": content}])
            if dataset.chat
            else writer.text(content)
        )

    prompt = whole(text)
    tokens = writer.encode(text)
    keep = context - (len(prompt) - len(tokens))
    while len(prompt) > context and keep > 1:
        half = keep // 2
        prompt = whole(
            writer.tokenizer.decode(tokens[:half]) + writer.tokenizer.decode(tokens[-half:])
        )
        # Text that is cut and encoded anew may have a few tokens more.
        keep -= max(1, len(prompt) - context)
    if len(prompt) > context:
        raise LongBenchError(
            f"--contexts: found {context}, too few tokens for the question alone; use a longer one."
        )
    return prompt
