"""The command `losses`."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Annotated

import torch
import typer

from benchmarks import report
from benchmarks.intervals import of_scores, paired
from benchmarks.losses.measures import NEEDLES, SeenSequence, agreement, make_row, needle_scores
from benchmarks.losses.variants import (
    BUDGETS,
    DECODED,
    DRAFT_POSITIONS,
    VARIANTS,
    make_variants,
    train,
)
from benchmarks.plain_model import plain_model
from benchmarks.shapes import DEMO_MODEL
from benchmarks.teachers import read_full_config
from specontext_vllm.distillation.command import (
    COUNTED,
    DRAFT_VOCABULARY,
    DistillError,
    most_frequent,
)
from specontext_vllm.distillation.data import Sequences, Synthetic
from specontext_vllm.distillation.options import make_settings
from specontext_vllm.distillation.recall import Recall, Seen, recall_of
from specontext_vllm.distillation.shape import DraftShape
from specontext_vllm.distillation.teacher import (
    Teacher,
    load_teacher,
    read_tokenizer,
)

TABLES = {
    (
        "Held-out recall: share of the teacher's attention beyond the newest 64 tokens that the "
        "chosen pages hold"
    ): (
        report.Column("name", "variant"),
        *(
            column
            for budget in BUDGETS
            for column in (
                report.Column(f"max_{budget}", f"recall at {budget}", ".3f"),
                report.Column(f"max_{budget}_difference", "difference, 95 %"),
            )
        ),
        report.Column("heaviest", f"heaviest page, at {BUDGETS[0]}", ".3f"),
        report.Column("heaviest_difference", "difference, 95 %"),
        report.Column(f"mean_{BUDGETS[0]}", f"of the layers' mean, at {BUDGETS[0]}", ".3f"),
        report.Column(f"mean_{BUDGETS[0]}_difference", "difference, 95 %"),
        report.Column("agreement", "first choice drafted", ".3f"),
        report.Column("needle", f"needles at {BUDGETS[0]}", ".3f"),
        report.Column("needle_interval", "95 %"),
        report.Column("needle_difference", "difference, 95 %"),
    ),
}


def main(
    model: Annotated[
        Path,
        typer.Option(help="Model folder: the teacher. The heads of all variants are held at once."),
    ] = DEMO_MODEL,
    steps: Annotated[int, typer.Option(help="Steps of each variant.", min=1)] = 150,
    context: Annotated[
        int, typer.Option(help="Longest sequence, tokens; one is a step.", min=512)
    ] = 768,
    held_out: Annotated[
        int, typer.Option(help="Sequences that recall is measured on.", min=2)
    ] = 16,
    out: Annotated[Path, typer.Option(help="Folder of the result files.")] = report.RESULTS,
) -> None:
    """Variants of the distillation loss on one model."""
    from accelerate import Accelerator

    accelerator = Accelerator(mixed_precision="bf16" if torch.cuda.is_available() else "no")
    device = accelerator.device
    try:
        config, tokenizer = read_full_config(model), read_tokenizer(model)
        settings = make_settings(
            config,
            context=context,
            batch_tokens=None,
            hours=1.0,
            steps=steps,
            loss="both",
            learning_rate=None,
            budget=BUDGETS[0],
            seed=0,
        )
        documents = Synthetic(tokenizer)
        shape = DraftShape.for_target(
            config, max_position=2 * context, draft_vocabulary=DRAFT_VOCABULARY
        )
        teacher = Teacher(load_teacher(model, device, torch.float32), shape.aux_layers)
    except DistillError as error:
        typer.echo(str(error), err=True)
        raise typer.Exit(2) from None
    plain = replace(settings, draft_positions=DRAFT_POSITIONS)
    data = Sequences(documents, plain.lengths, context)
    reduced = shape.draft_vocabulary < shape.vocabulary
    draft_ids = (
        most_frequent((data[i] for i in range(COUNTED)), shape.draft_vocabulary)
        if reduced
        else None
    )
    variants = make_variants(teacher, shape, draft_ids, data, plain, out, accelerator)
    last = train(variants, teacher, data, steps)

    own = model.resolve() != DEMO_MODEL.resolve()
    teacher_name = model.resolve().name if own else "the demo model"
    title = f"Losses of a retrieval head: {steps} steps of {context} tokens on {teacher_name}"
    details = {"last_losses": last, "variants": VARIANTS, "recall": {}, "needles": {}}
    result = report.Report(
        f"losses-{model.resolve().name}" if own else "losses", title, TABLES, details=details
    )
    unseen = Sequences(documents, [context], context, held_out=True)
    sequences = [SeenSequence.seen(teacher, *unseen[i], seed=i) for i in range(held_out)]
    decoding = plain_model(teacher)
    base: dict[str, list[dict[int, Recall]]] = {}
    for name, variant in variants.items():
        draft = variant.run.head
        with torch.no_grad():
            recalls = {
                m: [recall_of(draft, Seen.of(s.lessons[m], s.at), BUDGETS) for s in sequences]
                for m in ("max", "mean")
            }
        base = base or recalls
        row = {**make_row(name, recalls, base), "agreement": agreement(teacher, draft, sequences)}
        result.details["recall"][name] = {
            m: [{b: r.found for b, r in s.items()} for s in found] for m, found in recalls.items()
        }
        if decoding is not None and name in DECODED:
            result.details["needles"][name] = scores = needle_scores(
                decoding, draft, tokenizer, context
            )
            low, high = of_scores(scores, right_or_wrong=True)
            row |= {
                "needle": sum(scores) / len(scores),
                "needle_interval": f"{low:.2f} to {high:.2f}",
            }
            first = next(iter(result.details["needles"].values()))
            if scores is not first:
                low, high = paired([a - b for a, b in zip(scores, first, strict=True)])
                row["needle_difference"] = f"{low:+.2f} to {high:+.2f}"
        result.rows.append(row)
        print(f"{name}: {row}", flush=True)
    best = {
        f"{m}_{b}": sum(s[b].best for s in found) / len(found)
        for m, found in base.items()
        for b in BUDGETS
    }
    result.rows.append({"name": "the best choice there is", **best})
    result.notes += [
        f"The same {steps} batches of {context} tokens for all (sequences of "
        f"{', '.join(map(str, plain.lengths))} tokens), the same "
        f"initial weights but in the second row; {plain.align_positions} positions aligned and "
        f"{DRAFT_POSITIONS} drafted a sequence, "
        f"peak rate {plain.learning_rate:g}.",
        f"Recall: mean over {held_out} held-out sequences of {context} tokens, of the attention of "
        f"all {len(teacher.layers)} layers "
        "whatever layers a head was aligned to; differences are paired with the first row by "
        "sequence, bootstrap. The second row shows "
        "what the initial weights alone change.",
        "Heaviest page: share of the positions and KV heads at which the page with the teacher's "
        f"largest weight is among those of a budget of {BUDGETS[0]}, "
        "weighted like recall.",
        f"Needles: {NEEDLES} questions in prompts of about {context} tokens, all layouts, decoded "
        f"with a budget of {BUDGETS[0]}; Wilson "
        "intervals, differences paired with the first row by question (Agresti and Min)."
        if decoding is not None
        else "Needles: not decoded; that takes a Llama without RoPE scaling.",
    ]
    result.write(out)
    result.show()
