"""Case `losses`: what a retrieval head should be trained on. Variants of the loss on one model,
same batches, same steps.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch import Tensor

from benchmarks import report
from benchmarks.intervals import bootstrap, of_scores, paired
from benchmarks.questions import answer, questions
from benchmarks.shapes import DEMO_MODEL
from specontext_vllm.demo.train import Decoder, Model, Size
from specontext_vllm.distillation.command import (
    COUNTED,
    DRAFT_VOCABULARY,
    DistillError,
    make_settings,
    most_frequent,
)
from specontext_vllm.distillation.data import Sequences, Synthetic, sample_positions
from specontext_vllm.distillation.draft import DraftModel, DraftShape, rows_at
from specontext_vllm.distillation.losses import AttentionTarget
from specontext_vllm.distillation.recall import RECENT_TOKENS, Recall, Seen, recall_of
from specontext_vllm.distillation.teacher import (
    Lesson,
    Teacher,
    load_teacher,
    read_config,
    read_tokenizer,
)
from specontext_vllm.distillation.trainer import Distiller, Settings

BUDGETS = (128, 256)
NEEDLES = 80
DRAFT_POSITIONS, ASKED = 128, 64
VARIANTS: dict[str, dict[str, Any]] = {
    "as `specontext distill` does": {},
    "the same, other initial weights": {"seed": 1},
    "draft loss only": {"loss": "draft"},
    "alignment only": {"loss": "align"},
    "weights not squared": {"align_sharpness": 1.0},
    "weights to the fourth": {"align_sharpness": 4.0},
    "one query head for all tokens": {"align_each_token": False},
    "not squared, one head for all": {"align_sharpness": 1.0, "align_each_token": False},
    "mean over layers": {"over_layers": "mean"},
    "first half of the layers": {"layers": "first half"},
    "last half of the layers": {"layers": "last half"},
    "every second layer": {"layers": "every second"},
    "alignment weight 1": {"align_weight": 1.0},
    "alignment weight 10": {"align_weight": 10.0},
    "no window": {"window": 0},
    "window 64": {"window": 64},
    "window 96": {"window": 96},
    "window 256": {"window": 256},
}
"""What is changed of `specontext distill`'s own settings; `layers`: those that teach."""
DECODED = tuple(
    name
    for name, changes in VARIANTS.items()
    if not changes or {"loss", "align_sharpness", "align_each_token"} & set(changes)
)
"""Variants whose answers are decoded as well, which costs as much as their training."""

TABLES = {
    "Held-out recall: share of the teacher's attention beyond the newest 64 tokens that the chosen pages hold": (
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


@dataclass(frozen=True)
class Target:
    """An alignment target: newest tokens that it leaves out, "max" or "mean" over layers, and which
    layers.
    """

    window: int
    over_layers: str
    layers: range

    @classmethod
    def of(cls, window: int, over_layers: str, layers: str, count: int) -> Target:
        """Of a model of ``count`` layers."""
        half = count // 2
        ranges = {
            "all": range(count),
            "first half": range(half),
            "last half": range(half, count),
            "every second": range(1, count, 2),
        }
        return cls(window, over_layers, ranges[layers])


@dataclass
class Collectors:
    """Several ``AttentionTarget``s that watch one forward pass, each its own layers."""

    targets: Sequence[Target]
    each: dict[Target, AttentionTarget] = field(init=False)
    layer: int = field(init=False, default=0)

    def __post_init__(self) -> None:
        self.each = {
            target: AttentionTarget(target.window, target.over_layers) for target in self.targets
        }

    def watch(self, *arguments: Any) -> None:
        """The next layer's; see ``AttentionTarget.watch``."""
        for target, collector in self.each.items():
            if self.layer in target.layers:
                collector.watch(*arguments)
        self.layer += 1

    def result(self) -> tuple[Tensor, Tensor]:
        return next(iter(self.each.values())).result()

    def lessons(self, lesson: Lesson) -> dict[Target, Lesson]:
        """The lesson with each one's target."""
        results = {target: collector.result() for target, collector in self.each.items()}
        return {
            target: replace(lesson, target=found, mass=mass)
            for target, (found, mass) in results.items()
        }


@dataclass(frozen=True)
class Variant:
    """A head in training and what it is aligned to."""

    run: Distiller
    target: Target


def train(
    variants: dict[str, Variant], teacher: Teacher, data: Sequences, steps: int
) -> dict[str, dict[str, float]]:
    """All variants in lockstep, so that the teacher runs once a batch; their last losses."""
    targets = list(dict.fromkeys(variant.target for variant in variants.values()))
    found: dict[str, dict[str, float]] = {}
    begin = time.monotonic()
    for number in range(steps):
        ids, weights = (t.to(teacher.device) for t in data[number])
        sampler = next(iter(variants.values())).run
        at, _ = sample_positions(
            weights[:, 1:], sampler.settings.align_positions, sampler.generator(ids.device)
        )
        collectors = Collectors(targets)
        lessons = collectors.lessons(teacher(ids, at, collectors))
        for name, variant in variants.items():
            generator = torch.Generator(device=ids.device).manual_seed(number)
            found[name] = variant.run.learn(lessons[variant.target], at, weights, generator)
        if (number + 1) % 20 == 0:
            print(f"step {number + 1} of {steps}, {time.monotonic() - begin:.0f} s", flush=True)
    return found


@dataclass(frozen=True)
class SeenSequence:
    """A held-out sequence that the teacher has seen: where it was watched, and the lesson by how
    the layers are put together.
    """

    at: Tensor
    lessons: dict[str, Lesson]

    @classmethod
    def seen(cls, teacher: Teacher, ids: Tensor, weights: Tensor, seed: int) -> SeenSequence:
        ids, weights = ids.to(teacher.device), weights.to(teacher.device)
        at, _ = sample_positions(
            weights[:, 1:],
            ASKED,
            torch.Generator(device=ids.device).manual_seed(seed),
            first=max(BUDGETS),
        )
        collectors = Collectors(
            [Target.of(RECENT_TOKENS, over, "all", len(teacher.layers)) for over in ("max", "mean")]
        )
        return cls(
            at,
            {
                target.over_layers: lesson
                for target, lesson in collectors.lessons(teacher(ids, at, collectors)).items()
            },
        )


@torch.no_grad()
def agreement(teacher: Teacher, draft: DraftModel, held_out: Sequence[SeenSequence]) -> float:
    """Share of the held-out positions at which the draft's first choice is the teacher's."""
    right = []
    for sequence in held_out:
        lesson, at = sequence.lessons["max"], sequence.at
        place = torch.arange(1, lesson.embeds.shape[1], device=at.device)
        drafted = draft.lm_head(
            draft.states(*draft.queries_keys(lesson.embeds[:, 1:], lesson.aux[:, :-1], place), at)
        ).argmax(-1)
        first = drafted if draft.draft_ids is None else draft.draft_ids[drafted]
        right.append(
            (first == teacher.logits(rows_at(lesson.hidden[:, 1:], at)).argmax(-1)).float().mean()
        )
    return float(torch.stack(right).mean())


def needle_scores(model: Any, draft: DraftModel, tokenizer: Any, tokens: int) -> list[float]:
    """Scores of held-out needle questions, decoded in plain torch with the head's choice of pages."""
    decoder = Decoder(model, draft)
    return [
        answer(decoder, tokenizer, problem, decoder.prefill(prompt), "dlm", BUDGETS[0])
        for problem, prompt in questions(tokenizer, tokens, NEEDLES)
    ]


def plain_model(teacher: Teacher) -> Any | None:
    """The teacher as the plain-torch model of demo/train.py, which decodes with a head; None where
    that cannot compute it.
    """
    config, state = teacher.model.config, teacher.model.state_dict()
    shape = DraftShape.for_target(config, max_position=0)
    size = Size(
        hidden=shape.hidden,
        ffn=shape.ffn,
        layers=config.num_hidden_layers,
        heads=shape.heads,
        kv_heads=shape.kv_heads,
        head_dim=shape.head_dim,
        aux_layers=teacher.aux_layers,
        theta=shape.rope_theta,
        eps=shape.eps,
    )
    with torch.device("meta"):
        model = Model(size, shape.vocabulary).requires_grad_(False)
    stretched = (getattr(config, "rope_parameters", None) or {}).get(
        "rope_type", "default"
    ) != "default"
    # A bias, or norms of queries and keys, are tensors that it does not have.
    if config.model_type != "llama" or stretched or set(model.checkpoint()) != set(state):
        return None
    model.to_empty(device=teacher.device)
    for name, parameter in model.checkpoint().items():
        parameter.copy_(state[name])
    return model


def make_row(
    name: str, recalls: dict[str, list[dict[int, Recall]]], base: dict[str, list[dict[int, Recall]]]
) -> dict[str, Any]:
    """Recalls under each measure (`max`, `mean` over layers), and their paired differences from the
    first variant's.
    """
    row: dict[str, Any] = {"name": name}
    measures = {f"max_{budget}": ("max", budget, "found") for budget in BUDGETS}
    measures |= {
        f"mean_{BUDGETS[0]}": ("mean", BUDGETS[0], "found"),
        "heaviest": ("max", BUDGETS[0], "heaviest"),
    }
    for key, (measure, budget, figure) in measures.items():
        mine, theirs = (
            [getattr(sequence[budget], figure) for sequence in found[measure]]
            for found in (recalls, base)
        )
        row[key] = sum(mine) / len(mine)
        if recalls is not base:
            low, high = bootstrap([a - b for a, b in zip(mine, theirs, strict=True)])
            row[f"{key}_difference"] = f"{low:+.3f} to {high:+.3f}"
    return row


def make_variants(
    teacher: Teacher,
    shape: DraftShape,
    draft_ids: Tensor | None,
    data: Sequences,
    plain: Settings,
    out: Path,
    accelerator: Any,
) -> dict[str, Variant]:
    """Every variant before its first step.

    Args:
        plain: the settings that they change.
    """
    variants = {}
    for name, changes in VARIANTS.items():
        settings = replace(
            plain, **{name: value for name, value in changes.items() if name != "layers"}
        )
        target = Target.of(
            settings.window, settings.over_layers, changes.get("layers", "all"), len(teacher.layers)
        )
        torch.manual_seed(settings.seed)
        variants[name] = Variant(
            Distiller(
                teacher, DraftModel(shape, draft_ids), data, data, settings, out, accelerator
            ),
            target,
        )
    return variants


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
        config, tokenizer = read_config(model), read_tokenizer(model)
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
    title = f"Losses of a retrieval head: {steps} steps of {context} tokens on {model.resolve().name if own else 'the demo model'}"
    details = {"last_losses": last, "variants": VARIANTS, "recall": {}, "needles": {}}
    result = report.Report(
        f"losses-{model.resolve().name}" if own else "losses", title, TABLES, details=details
    )
    unseen = Sequences(documents, [context], context, held_out=True)
    sequences = [SeenSequence.seen(teacher, *unseen[i], seed=i) for i in range(held_out)]
    decoding = plain_model(teacher)
    base: dict[str, list[dict[int, Recall]]] = {}
    for name, variant in variants.items():
        draft = variant.run.draft
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
