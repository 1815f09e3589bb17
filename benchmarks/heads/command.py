"""The command `heads`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from benchmarks import report
from benchmarks.heads.held_out import HeldOut, Prompts, draw
from benchmarks.heads.lockstep import Trained, all_layers, make_classrooms, make_pupil, train
from benchmarks.heads.results import Results
from benchmarks.heads.variants import DEFAULT, VARIANTS, picked
from benchmarks.marks.heads import SERVINGS, load_head
from benchmarks.marks.inputs import KINDS, numbers
from benchmarks.marks.measuring import DENSE, Choosers, Size, measure
from benchmarks.real.prompts import PromptError
from benchmarks.real.settings import OptionError
from benchmarks.real.texts import TextError
from benchmarks.teachers import read_full_config
from specontext_vllm.config import ConfigError
from specontext_vllm.distillation.command import DistillError
from specontext_vllm.distillation.head_model import HeadModel
from specontext_vllm.distillation.head_shape import HeadShape
from specontext_vllm.distillation.options import default_loaders, make_settings
from specontext_vllm.distillation.recall import RECENT_TOKENS
from specontext_vllm.distillation.teacher import (
    Teacher,
    load_teacher,
    read_tokenizer,
)
from specontext_vllm.distillation.text_files import Files

REFUSALS = (*DistillError, ConfigError, OptionError, PromptError, TextError)
OWN = SERVINGS["own"]


def main(
    model: Annotated[Path, typer.Option(help="Model folder: the teacher.")],
    data: Annotated[
        list[Path], typer.Option(help="Training text, as `specontext distill` takes it.")
    ],
    test_data: Annotated[
        list[Path],
        typer.Option(help="Plain text file, or folder of such, that `--data` does not hold."),
    ],
    work: Annotated[Path, typer.Option(help="Folder for the heads and the tokens of --data.")],
    variants: Annotated[
        str, typer.Option(help=f"Names or patterns of {', '.join(VARIANTS)}.")
    ] = "*",
    minutes: Annotated[
        float | None, typer.Option(help="Of training, of all together; or --steps or --tokens.")
    ] = None,
    steps: Annotated[int | None, typer.Option(help="Of training.")] = None,
    tokens: Annotated[int | None, typer.Option(help="Of training.", min=1)] = None,
    context: Annotated[int | None, typer.Option(help="Longest training sequence, tokens.")] = None,
    batch_tokens: Annotated[int | None, typer.Option(help="Tokens of a step.")] = None,
    learning_rate: Annotated[float | None, typer.Option(help="Peak, of the default.")] = None,
    contexts: Annotated[
        str | None, typer.Option(help="Of the test prompts. Default: --context and half of it.")
    ] = None,
    prompts: Annotated[int, typer.Option(help="Of each kind and context.", min=2)] = 16,
    forced: Annotated[int, typer.Option(help="Tokens of a forced passage.", min=2)] = 32,
    budgets: Annotated[str, typer.Option(help="Tokens per KV head.")] = "128,256,512",
    forced_budgets: Annotated[
        str | None,
        typer.Option(help="Of the forced passages, some of --budgets. Default: the smallest."),
    ] = None,
    points: Annotated[int, typer.Option(help="Measurements, the last at the end.", min=1)] = 4,
    loaders: Annotated[
        int | None, typer.Option(help="Processes that make batches. Default: by the cores.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Of weights, data and prompts.", min=0)] = 0,
    label: Annotated[str, typer.Option(help="Word that joins the result's name.")] = "",
    out: Annotated[Path, typer.Option(help="Folder of the result files.")] = report.RESULTS,
) -> None:
    """Variants of a head for retrieval alone, trained on the same batches and compared on texts
    that none has seen. Every figure is a line of a .jsonl file as soon as it is there.
    """
    from accelerate import Accelerator

    accelerator = Accelerator(mixed_precision="bf16" if torch.cuda.is_available() else "no")
    on_gpu = accelerator.device.type == "cuda"
    try:
        if sum(given is not None for given in (minutes, steps, tokens)) != 1:
            raise OptionError("--minutes, --steps, --tokens: give one of the three.")
        config, tokenizer = read_full_config(model), read_tokenizer(model)
        settings = make_settings(
            config,
            context=context,
            batch_tokens=batch_tokens,
            hours=1.0 if minutes is None else minutes / 60,
            steps=steps,
            loss=None,
            learning_rate=learning_rate,
            budget=None,
            seed=seed,
            loaders=default_loaders(1, on_gpu) if loaders is None else loaders,
            format="specontext",
        )
        if tokens is not None:
            settings = replace(settings, steps=max(1, tokens // settings.batch_tokens))
        shape = HeadShape.for_target(config, max_position=settings.context)
        chosen = picked(variants, shape, settings, config)
        lengths = (
            [settings.context, settings.context // 2]
            if contexts is None
            else numbers("--contexts", contexts)
        )
        if max(lengths) > settings.context:
            raise OptionError(
                f"--contexts: found {max(lengths)}, but heads are trained up to "
                f"{settings.context}; use shorter ones."
            )
        wanted = sorted(numbers("--budgets", budgets))
        sizes = [
            Size(budget, RECENT_TOKENS)
            for budget in (
                wanted[:1]
                if forced_budgets is None
                else numbers("--forced-budgets", forced_budgets)
            )
        ]
        for size in [*sizes, Size(wanted[0], RECENT_TOKENS)]:
            size.check()
        if beyond := [size.budget for size in sizes if size.budget not in wanted]:
            raise OptionError(
                f"--forced-budgets: found {beyond[0]}; give some of --budgets ({budgets})."
            )
        held = draw(model, test_data, lengths, forced, prompts, seed)
        documents = Files(list(data), tokenizer, work / "tokens")
        teacher = load_teacher(
            model, accelerator.device, torch.bfloat16 if on_gpu else torch.float32
        )
    except REFUSALS as error:
        typer.echo(str(error), err=True)
        raise typer.Exit(2) from None
    pupils = {
        name: make_pupil(variant, teacher, shape, settings, work / name, accelerator)
        for name, variant in chosen.items()
    }
    rooms = make_classrooms(teacher, pupils, documents, tokenizer)
    heads = {name: pupil.run.head for name, pupil in pupils.items()}
    groups = (head.groups for head in heads.values())
    seen = HeldOut(Teacher(teacher, all_layers(pupils.values())), held, groups)

    result = report.Report(
        "-".join(["heads", model.resolve().name, *([label] if label else [])]),
        f"Heads for retrieval alone on {model.resolve().name}",
        {},
        details={
            "model": str(model),
            "data": [str(path) for path in data],
            "test_data": [str(path) for path in test_data],
            "variants": {name: facts(pupil) for name, pupil in pupils.items()},
            "contexts": lengths,
            "prompts": prompts,
            "forced": forced,
            "seed": seed,
        },
    )
    out.mkdir(parents=True, exist_ok=True)
    with (out / f"{result.stem}.jsonl").open("w") as lines:
        figures = Results(lines, lengths, KINDS, wanted)
        progress = pupils[DEFAULT].run.progress
        for losses in train(rooms, settings, points, typer.echo):
            measured = seen.measure(heads, figures.budgets)
            figures.add_points(progress.step, progress.tokens, progress.seconds, measured)
            result.details["last_losses"] = losses
            typer.echo(figures.told())
        result.title += f", {progress.step:,} steps, {progress.tokens:,} tokens"
        for name, head in heads.items():
            head.save(work / name)
        result.notes += notes_on(prompts, forced, progress.seconds)
        figures.draw(list(heads), result.title, out / f"{result.stem}.png")

        def keep() -> None:
            result.tables = figures.tables()
            result.rows = [
                {**figures.row(name), "parameters": parameters(head) / 1e6}
                for name, head in heads.items()
            ]
            result.write(out)

        # The forced passages take long; what is known by then is kept.
        keep()
        for part in held:
            if part.context == max(lengths):
                mark(teacher, {name: work / name for name in heads}, part, sizes, figures)
                keep()
    result.show()


def mark(
    teacher: Any, folders: dict[str, Path], part: Prompts, sizes: Sequence[Size], figures: Results
) -> None:
    """Log-probabilities of the forced tokens, with the pages that each head in a folder chooses."""
    heads = {name: load_head(path, teacher, part.context) for name, path in folders.items()}
    named = {f"{name}, {OWN.name}": name for name in heads} | {DENSE: DENSE}
    pieces, choosers = part.ids.to(teacher.device), Choosers([], heads, [OWN])
    for found in measure(teacher, pieces, part.forced, choosers, sizes):
        figures.add_mark(named[found.by], part.kind, part.context, found)
    typer.echo(f"forced: {part.kind}, {part.context:,} tokens")


def notes_on(prompts: int, forced: int, seconds: float) -> list[str]:
    """What the tables do not say."""
    return [
        "All variants learn from the same batches at the same positions of the same pass of the "
        "teacher; with another share of copies, from the same documents. Each changes one thing of "
        f"the first row; M: million parameters. Training took {seconds:,.0f} s for all together.",
        f"Prompts: {prompts} of each kind and context, the same as of `marks`, from texts that "
        "--data should not hold. Recall is measured where copied tokens are made, or in `text` at "
        "as many tokens of the second half.",
        "Differences to the first row are paired by prompt, with 95 % intervals (Student's t).",
        f"By force: the last {forced} tokens one by one, all layers with the pages that the "
        "variant chose and hidden states of its own sparse run.",
    ]


def facts(pupil: Trained) -> dict[str, Any]:
    """Everything that a variant is made with."""
    return {
        "shape": asdict(pupil.run.head.shape),
        "settings": asdict(pupil.run.settings),
        "trainer": pupil.variant.trainer.__name__,
    }


def parameters(head: HeadModel) -> int:
    """How many there are."""
    return sum(parameter.numel() for parameter in head.parameters())
