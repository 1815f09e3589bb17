"""Case `choices`: what a model's head loses against the best pages that all layers could have in
common, and what those lose against dense attention.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from benchmarks import report
from benchmarks.intervals import of_scores, paired
from benchmarks.plain_model import plain_model
from benchmarks.questions import answer, questions
from benchmarks.shapes import DEMO_MODEL
from specontext_vllm.demo.decoder import Decoder
from specontext_vllm.distillation.command import DistillError
from specontext_vllm.distillation.draft import DraftModel
from specontext_vllm.distillation.recall import MIN_BUDGET
from specontext_vllm.distillation.shape import DraftShape
from specontext_vllm.distillation.teacher import Teacher, load_teacher, read_config, read_tokenizer

TABLES = {
    "Scores": (
        report.Column("name", "pages chosen by"),
        report.Column("budget", "budget, tokens", ",d"),
        report.Column("score", "score", ".3f"),
        report.Column("interval", "95 %"),
        report.Column("difference", "less dense, 95 %"),
    ),
}
TASKS = {"needle": "needle questions", "recitation": "recitations"}
NAMES = {
    "dense": "nobody: dense attention",
    "dlm": "the head",
    "common": "all layers' attention, in common",
}


def main(
    model: Annotated[Path, typer.Option(help="Folder of a Llama model.")] = DEMO_MODEL,
    head: Annotated[
        Path | None,
        typer.Option(
            help="Folder of its retrieval head. Default: retrieval_head inside the model's."
        ),
    ] = None,
    context: Annotated[int, typer.Option(help="Tokens of a prompt, about.", min=512)] = 4096,
    budgets: Annotated[
        str, typer.Option(help="Tokens per KV head that a decode step reads.")
    ] = "128,256",
    count: Annotated[int, typer.Option("--questions", help="Problems.", min=2)] = 24,
    task: Annotated[
        str, typer.Option(help="Of the demo's tasks: needle or recitation.")
    ] = "needle",
    out: Annotated[Path, typer.Option(help="Folder of the result files.")] = report.RESULTS,
) -> None:
    """Needle questions or recitations with the head's pages and with the best that all layers could
    have in common.
    """
    sizes = [int(part) if part.strip().isdigit() else 0 for part in budgets.split(",")]
    if min(sizes) < MIN_BUDGET:
        typer.echo(
            f"--budgets: found {budgets!r}; give numbers of at least {MIN_BUDGET}, separated by "
            "commas.",
            err=True,
        )
        raise typer.Exit(2)
    if task not in TASKS:
        typer.echo(f"--task: found {task!r}; use {' or '.join(TASKS)}.", err=True)
        raise typer.Exit(2)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        config, tokenizer = read_config(model), read_tokenizer(model)
        shape = DraftShape.for_target(config, max_position=0)
        plain = plain_model(Teacher(load_teacher(model, device, torch.float32), shape.aux_layers))
        draft = DraftModel.load(
            head or model / "retrieval_head",
            max_position=2 * context,
            num_layers=config.num_hidden_layers,
            vocabulary=shape.vocabulary,
        ).to(device)
    except DistillError as error:
        typer.echo(str(error), err=True)
        raise typer.Exit(2) from None
    if plain is None:
        typer.echo(
            f"--model: {model} is no plain Llama (biases, norms of queries and keys, scaled RoPE); "
            "this case computes no other.",
            err=True,
        )
        raise typer.Exit(2)
    decoder = Decoder(plain, draft)
    columns = [("dense", 0), *[(method, size) for size in sizes for method in ("dlm", "common")]]
    scores: dict[tuple[str, int], list[float]] = {column: [] for column in columns}
    name = model.resolve().name
    words = [
        *([] if task == "needle" else [task]),
        *([] if model.resolve() == DEMO_MODEL.resolve() else [name]),
        *(["head", head.resolve().name] if head else []),
    ]
    chooser = f" with the head {head.resolve().name}" if head else ""
    title = (
        f"{name}{chooser}: {count} {TASKS[task]} in about {context:,} tokens, by who chooses the "
        "pages"
    )
    details: dict[str, Any] = {"context": context, "task": task, "questions": count, "scores": {}}
    result = report.Report("-".join(["choices", *words]), title, TABLES, details=details)
    for number, (problem, prompt) in enumerate(questions(tokenizer, context, count, task), 1):
        state = decoder.prefill(prompt)
        for column in columns:
            scores[column].append(answer(decoder, tokenizer, problem, state, *column))
        means = (
            f"{method} {size} {sum(found) / len(found):.2f}"
            for (method, size), found in scores.items()
        )
        print(f"question {number} of {count}: {', '.join(means)}", flush=True)
    for (method, size), found in scores.items():
        low, high = of_scores(found, task == "needle")
        row = {
            "name": NAMES[method],
            "method": method,
            "budget": size or None,
            "score": sum(found) / count,
            "interval": f"{low:.2f} to {high:.2f}",
        }
        if method != "dense":
            low, high = paired([a - b for a, b in zip(found, scores["dense", 0], strict=True)])
            row["difference"] = f"{low:+.2f} to {high:+.2f}"
        result.rows.append(row)
        details["scores"][f"{method} {size}"] = found
    intervals = (
        "Wilson intervals"
        if task == "needle"
        else "Share right from the start; bootstrap intervals"
    )
    result.notes += [
        "Plain torch in float32, all layouts of the task. In common: the step is computed densely "
        "first, and the pages with the largest weight of any layer "
        "and query head are read by all layers; a head that chooses for all layers at once is "
        "hardly to do better. Page 0 and the five newest are always read.",
        f"{intervals}; differences by question (Agresti and Min).",
    ]
    result.write(out)
    result.show()
