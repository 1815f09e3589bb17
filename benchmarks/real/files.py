"""Tasks from the user's own files: RULER's questions over SQuAD and HotpotQA, LongBench's sets."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from random import Random
from typing import Any

from benchmarks.accuracy import longbench
from benchmarks.accuracy.writer import Writer as ChatWriter
from benchmarks.real.prompts import Prompt, PromptError, Task, Writer
from benchmarks.real.ruler import fit, match_part
from benchmarks.real.settings import OptionError

QA_FILES = {
    "qa_1": ("squad.json", "dev-v2.0.json"),
    "qa_2": ("hotpotqa.json", "hotpot_dev_distractor_v1.json"),
}
"""Names of SQuAD 2.0's and HotpotQA's files, as RULER saves them or as they are published."""

QA_REPLY_TOKENS = 32


@dataclass(frozen=True)
class Question:
    """One question: its answers, its documents, and others that are closer to it than the rest."""

    text: str
    answers: list[str]
    own: list[int]
    near: list[int]


@dataclass(frozen=True)
class Questions:
    """A data set: all documents, and questions over them."""

    documents: list[str]
    questions: list[Question]


def _squad(content: Any) -> Questions:
    articles = content["data"]
    documents = sorted({p["context"] for article in articles for p in article["paragraphs"]})
    place = {document: number for number, document in enumerate(documents)}
    questions = []
    for article in articles:
        here = [place[p["context"]] for p in article["paragraphs"]]
        for paragraph in article["paragraphs"]:
            own = place[paragraph["context"]]
            near = [number for number in here if number != own]
            questions += [
                Question(q["question"], [a["text"] for a in q["answers"]], [own], near)
                for q in paragraph["qas"]
                if not q.get("is_impossible")
            ]
    return Questions(documents, questions)


def _hotpotqa(content: Any) -> Questions:
    def document(title: str, sentences: list[str]) -> str:
        return f"{title}\n{''.join(sentences)}"

    documents = sorted({document(*part) for record in content for part in record["context"]})
    place = {text: number for number, text in enumerate(documents)}
    questions = [
        Question(
            record["question"],
            [record["answer"]],
            [place[document(*part)] for part in record["context"]],
            [],
        )
        for record in content
    ]
    return Questions(documents, questions)


def _read(path: Path, name: str) -> Questions:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        found = _squad(content) if name == "qa_1" else _hotpotqa(content)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise OptionError(
            f"--qa: {path} is not of its data set's form ({type(error).__name__}: {error})."
        ) from None
    if not found.questions:
        raise OptionError(f"--qa: {path} has no question with an answer.")
    return found


def _draft(
    writer: Writer, data: Questions, question: Question, rng: Random, size: int
) -> tuple[list[int], list[str]]:
    """The question among ``size`` documents more than its own."""
    shown = [*question.own, *rng.sample(question.near, min(size, len(question.near)))]
    more = size - len(shown) + len(question.own)
    if more > 0:
        taken = {*shown, *question.near}
        others = [number for number in range(len(data.documents)) if number not in taken]
        shown += rng.sample(others, min(more, len(others)))
    rng.shuffle(shown)
    text = "\n\n".join(
        f"Document {number}:\n{data.documents[place]}" for number, place in enumerate(shown, 1)
    )
    order = (
        "Answer the question based on the given documents. Only give me the answer and do not "
        "output any other words."
    )
    content = (
        f"{order}\n\nThe following are given documents.\n\n{text}\n\n{order}\n\n"
        f"Question: {question.text}"
    )
    return writer.question(content, "Answer:"), question.answers


def _make_qa(
    name: str, data: Questions, writer: Writer, rng: Random, context: int, number: int
) -> Prompt:
    question = rng.choice(data.questions)
    draft = partial(_draft, writer, data, question)
    made = fit(writer, name, draft, rng, context - QA_REPLY_TOKENS)
    return Prompt(made.tokens, answers=made.answers, reply_tokens=QA_REPLY_TOKENS)


def qa_tasks(folder: Path | None) -> tuple[dict[str, Task], list[str]]:
    """RULER's two tasks whose files are in the folder, and the names of those that are not.

    Raises:
        OptionError: a file of another form.
    """
    out, absent = {}, []
    for name, files in QA_FILES.items():
        paths = [folder / file for file in files if folder and (folder / file).exists()]
        if not paths:
            absent.append(name)
            continue
        make = partial(_make_qa, name, _read(paths[0], name))
        about = f"RULER: a question over documents of {paths[0].name}"
        out[name] = Task(name, "right", make, match_part, about)
    return out, absent


def longbench_tasks(folder: Path | None) -> tuple[dict[str, Task], list[str]]:
    """A task ``longbench/DATASET`` for each known file, and the names of the others; see
    benchmarks/accuracy/longbench.py.
    """
    if folder is None:
        return {}, []
    found, left_out = longbench.read_folder(folder)

    def adapt(name: str) -> Task:
        task = found[name]
        reply = longbench.DATASETS[name.removeprefix("longbench/")].reply_tokens

        def make(writer: Writer, rng: Random, context: int, number: int) -> Prompt:
            if context <= reply:
                raise PromptError(f"--contexts: found {context}, too few tokens for {name}.")
            example = task.make(ChatWriter(writer.tokenizer), number, context - reply)
            return Prompt(
                example.prompt, answers=list(example.answers), reply_tokens=example.reply_tokens
            )

        def score(prompt: Prompt, replies: list[Any]) -> float:
            assert task.metric is not None
            return task.metric(replies[0], prompt.answers)

        return Task(name, "share", make, score, task.about, task.floor, task.count)

    return {name: adapt(name) for name in found}, left_out
