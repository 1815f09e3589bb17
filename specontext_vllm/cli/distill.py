"""`specontext distill`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from specontext_vllm.cli.refusals import refusals
from specontext_vllm.config import ConfigError
from specontext_vllm.extras import require_extra


def distill(
    model: Annotated[
        Path, typer.Option(help="Folder of the model to make a head for (Hugging Face format).")
    ],
    out: Annotated[
        Path, typer.Option(help="Folder of the head; a run that was stopped there is resumed.")
    ],
    data: Annotated[
        list[str],
        typer.Option(
            help="Text or JSON lines, repeatable, or `synthetic`; see docs/guides/distill.md."
        ),
    ],
    format: Annotated[
        Literal["specontext", "eagle3"],
        typer.Option(
            help="`specontext`: a head for retrieval alone; `eagle3`: a whole EAGLE-3 draft model, "
            "whose head finds less. Only the second can draft tokens."
        ),
    ] = "specontext",
    init: Annotated[
        str | None,
        typer.Option(help="Head of the same format to start from: a folder or a hub id."),
    ] = None,
    context: Annotated[
        int | None,
        typer.Option(help="Longest sequence, tokens; default 32768, or the model's limit if less."),
    ] = None,
    batch_tokens: Annotated[
        int | None, typer.Option(help="Tokens of a step and process; default the context.")
    ] = None,
    hours: Annotated[
        float,
        typer.Option(help="Training time in all, resumed runs included; measuring is not counted."),
    ] = 1.0,
    steps: Annotated[int | None, typer.Option(help="Steps in all, instead of --hours.")] = None,
    loss: Annotated[
        Literal["both", "draft", "align"] | None,
        typer.Option(help="With --format eagle3: what is minimised; default `both`."),
    ] = None,
    steps_ahead: Annotated[
        int | None,
        typer.Option(
            help="With --format eagle3: drafts in a row that it is trained for, on its own outputs "
            "after the first; default 7, 1 for a head that drafts one token at a time."
        ),
    ] = None,
    freeze_retrieval: Annotated[
        bool,
        typer.Option(
            "--freeze-retrieval",
            help="With --format eagle3 and --init: train what drafts alone, so that the head "
            "chooses the same pages as before.",
        ),
    ] = False,
    copies: Annotated[
        float | None,
        typer.Option(
            help="Share of plain documents in which passages are written again below; default 0.5, "
            "and 0 for --format eagle3."
        ),
    ] = None,
    groups: Annotated[
        int,
        typer.Option(
            help="Groups of neighbouring layers that each get queries and a selection of their own."
        ),
    ] = 1,
    learning_rate: Annotated[
        float | None, typer.Option(help="Peak; default by the model's width.")
    ] = None,
    draft_vocabulary: Annotated[
        int | None,
        typer.Option(
            help="With --format eagle3: tokens the draft part can propose; default the 32000 "
            "commonest."
        ),
    ] = None,
    budget: Annotated[
        int | None,
        typer.Option(help="Tokens of the recall figure; default a sixteenth of the context."),
    ] = None,
    loaders: Annotated[
        int | None,
        typer.Option(
            help="Processes that make batches; default by the cores; 0: the training process does."
        ),
    ] = None,
    seed: Annotated[int, typer.Option(help="Of weights, data and sampling.")] = 0,
) -> None:
    """Train a retrieval head for a model; see docs/guides/distill.md. A run that was stopped goes
    on from its last state when it is started again.

    Exit code 0: written; 2: the model, the data, the checkpoint or an option cannot be used.

    Several GPUs: `accelerate launch -m specontext_vllm.cli distill ...`.
    """
    from specontext_vllm.distillation.command import DistillError
    from specontext_vllm.distillation.command import distill as run

    with refusals(ConfigError, *DistillError):
        require_extra("accelerate", "distill", "specontext distill")
        run(
            model,
            data,
            out,
            format=format,
            init=init,
            draft_vocabulary=draft_vocabulary,
            context=context,
            batch_tokens=batch_tokens,
            hours=hours,
            steps=steps,
            loss=loss,
            steps_ahead=steps_ahead,
            freeze_retrieval=freeze_retrieval,
            copies=copies,
            groups=groups,
            learning_rate=learning_rate,
            budget=budget,
            loaders=loaders,
            seed=seed,
        )
