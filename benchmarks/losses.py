"""Case `losses`: what a retrieval head should be trained on. Variants of the loss on the demo model, same batches, same steps."""

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
from benchmarks.intervals import bootstrap, wilson
from benchmarks.shapes import DEMO_MODEL
from specontext_vllm.distillation.data import Sequences, Synthetic, sample_positions
from specontext_vllm.distillation.draft import DraftModel, DraftShape, rows_at
from specontext_vllm.distillation.losses import AttentionTarget
from specontext_vllm.distillation.recall import RECENT_TOKENS, Recall, recall_of
from specontext_vllm.distillation.teacher import Lesson, Teacher, load_teacher, read_config, read_tokenizer
from specontext_vllm.distillation.trainer import Distiller, Settings

BUDGETS = (128, 256)
NEEDLES, FIRST_SEED, REPLY_TOKENS = 20, 9000, 14
DRAFT_POSITIONS, ASKED = 128, 64
BASE: dict[str, Any] = {"loss": "both", "over_layers": "max", "align_weight": 1.0, "window": 96, "seed": 0}
VARIANTS: dict[str, dict[str, Any]] = {
    "both, max, weight 1, window 96": {},
    "the same, other initial weights": {"seed": 1},
    "draft loss only": {"loss": "draft"},
    "alignment only": {"loss": "align"},
    "mean over layers": {"over_layers": "mean"},
    "alignment weight 0.3": {"align_weight": 0.3},
    "alignment weight 3": {"align_weight": 3.0},
    "window 32": {"window": 32},
    "window 256": {"window": 256},
}
DECODED = tuple(name for name, changes in VARIANTS.items() if not changes or {"loss", "over_layers"} & set(changes))
"""Variants whose answers are decoded as well, which costs as much as their training."""

TABLES = {
    "Held-out recall: share of the teacher's attention beyond the newest 64 tokens that the chosen pages hold": (
        report.Column("name", "variant"),
        *(column for budget in BUDGETS for column in (
            report.Column(f"max_{budget}", f"recall at {budget}", ".3f"), report.Column(f"max_{budget}_difference", "difference, 95 %"),
        )),
        report.Column(f"mean_{BUDGETS[0]}", f"of the layers' mean, at {BUDGETS[0]}", ".3f"),
        report.Column(f"mean_{BUDGETS[0]}_difference", "difference, 95 %"),
        report.Column("agreement", "first choice drafted", ".3f"),
        report.Column("needle", f"needles at {BUDGETS[0]}", ".3f"), report.Column("needle_interval", "95 %"),
    ),
}  # fmt: skip


@dataclass
class Collectors:
    """Several ``AttentionTarget``s that watch one forward pass."""

    kinds: Sequence[tuple[int, str]]
    each: dict[tuple[int, str], AttentionTarget] = field(init=False)

    def __post_init__(self) -> None:
        self.each = {kind: AttentionTarget(*kind) for kind in self.kinds}

    def watch(self, *arguments: Any) -> None:
        for collector in self.each.values():
            collector.watch(*arguments)

    def result(self) -> tuple[Tensor, Tensor]:
        return next(iter(self.each.values())).result()

    def lessons(self, lesson: Lesson) -> dict[tuple[int, str], Lesson]:
        """The lesson with each one's target."""
        results = {kind: collector.result() for kind, collector in self.each.items()}
        return {kind: replace(lesson, target=target, mass=mass) for kind, (target, mass) in results.items()}


def train(runs: dict[str, Distiller], teacher: Teacher, data: Sequences, steps: int) -> dict[str, dict[str, float]]:
    """All variants in lockstep, so that the teacher runs once a batch; their last losses."""
    kinds = sorted({(run.settings.window, run.settings.over_layers) for run in runs.values()})
    found: dict[str, dict[str, float]] = {}
    begin = time.monotonic()
    for number in range(steps):
        ids, weights = (t.to(teacher.device) for t in data[number])
        sampler = next(iter(runs.values()))
        at, _ = sample_positions(weights[:, 1:], sampler.settings.align_positions, sampler.generator(ids.device))
        collectors = Collectors(kinds)
        lessons = collectors.lessons(teacher(ids, at, collectors))
        for name, run in runs.items():
            generator = torch.Generator(device=ids.device).manual_seed(number)
            found[name] = run.learn(lessons[run.settings.window, run.settings.over_layers], at, weights, generator)
        if (number + 1) % 20 == 0:
            print(f"step {number + 1} of {steps}, {time.monotonic() - begin:.0f} s", flush=True)
    return found


@dataclass(frozen=True)
class HeldOut:
    """A held-out sequence that the teacher has seen: where it was watched, and the lesson by how the layers are put together."""

    at: Tensor
    lessons: dict[str, Lesson]

    @classmethod
    def seen(cls, teacher: Teacher, ids: Tensor, weights: Tensor, seed: int) -> HeldOut:
        ids, weights = ids.to(teacher.device), weights.to(teacher.device)
        at, _ = sample_positions(weights[:, 1:], ASKED, torch.Generator(device=ids.device).manual_seed(seed), first=max(BUDGETS))
        collectors = Collectors([(RECENT_TOKENS, "max"), (RECENT_TOKENS, "mean")])
        return cls(at, {kind[1]: lesson for kind, lesson in collectors.lessons(teacher(ids, at, collectors)).items()})


@torch.no_grad()
def agreement(teacher: Teacher, draft: DraftModel, held_out: Sequence[HeldOut]) -> float:
    """Share of the held-out positions at which the draft's first choice is the teacher's."""
    right = []
    for sequence in held_out:
        lesson, at = sequence.lessons["max"], sequence.at
        place = torch.arange(1, lesson.embeds.shape[1], device=at.device)
        drafted = draft.lm_head(draft.states(*draft.queries_keys(lesson.embeds[:, 1:], lesson.aux[:, :-1], place), at))
        right.append((drafted.argmax(-1) == teacher.logits(rows_at(lesson.hidden[:, 1:], at)).argmax(-1)).float().mean())
    return float(torch.stack(right).mean())


def needles(model: Any, draft: DraftModel, tokenizer: Any, tokens: int) -> list[float]:
    """Scores of held-out needle questions, decoded in plain torch with the head's choice of pages."""
    from specontext_vllm.demo.tasks import LAYOUTS, make_problem, score
    from specontext_vllm.demo.train import Decoder

    decoder, generator = Decoder(model, draft), torch.Generator(device=model.norm.device)
    scores = []
    for i in range(NEEDLES):
        problem = make_problem("needle", seed=FIRST_SEED + i, approx_tokens=tokens, layout=LAYOUTS[i % len(LAYOUTS)])
        prompt = tokenizer.apply_chat_template(problem.messages, add_generation_prompt=True, return_dict=False)
        reply = decoder.decode(decoder.prefill(prompt), "dlm", BUDGETS[0], REPLY_TOKENS, tokenizer.eos_token_id, generator)
        scores.append(score(problem, tokenizer.decode(reply, skip_special_tokens=True)))
    return scores


def demo_model(device: torch.device) -> Any:
    """The bundled model as the plain-torch one of demo/train.py."""
    from safetensors.torch import load_file

    from specontext_vllm.demo.train import Model, Size

    tensors = load_file(DEMO_MODEL / "model.safetensors")
    model = Model(Size(), tensors["lm_head.weight"].shape[0]).requires_grad_(False)
    for name, parameter in model.checkpoint().items():
        parameter.copy_(tensors[name])
    return model.to(device)


def make_row(name: str, recalls: dict[str, list[dict[int, Recall]]], base: dict[str, list[dict[int, Recall]]]) -> dict[str, Any]:
    """Recalls under each measure (`max`, `mean` over layers), and their paired differences from the first variant's."""
    row: dict[str, Any] = {"name": name}
    for measure, budget in [("max", budget) for budget in BUDGETS] + [("mean", BUDGETS[0])]:
        mine, theirs = ([sequence[budget].found for sequence in found[measure]] for found in (recalls, base))
        row[f"{measure}_{budget}"] = sum(mine) / len(mine)
        if recalls is not base:
            low, high = bootstrap([a - b for a, b in zip(mine, theirs, strict=True)])
            row[f"{measure}_{budget}_difference"] = f"{low:+.3f} to {high:+.3f}"
    return row


def main(
    steps: Annotated[int, typer.Option(help="Steps of each variant.", min=1)] = 150,
    context: Annotated[int, typer.Option(help="Longest sequence, tokens; one is a step.", min=512)] = 768,
    held_out: Annotated[int, typer.Option(help="Sequences that recall is measured on.", min=2)] = 16,
    out: Annotated[Path, typer.Option(help="Folder of the result files.")] = report.RESULTS,
) -> None:
    """Variants of the distillation loss on the demo model."""
    from accelerate import Accelerator

    accelerator = Accelerator(mixed_precision="bf16" if torch.cuda.is_available() else "no")
    device = accelerator.device
    config, tokenizer = read_config(DEMO_MODEL), read_tokenizer(DEMO_MODEL)
    shape = DraftShape.for_target(config, max_position=2 * context)
    teacher = Teacher(load_teacher(DEMO_MODEL, device, torch.float32), shape.aux_layers)
    plain = Settings(context=context, batch_tokens=context, budget=BUDGETS[0], steps=steps, draft_positions=DRAFT_POSITIONS)
    documents = Synthetic(tokenizer)
    data = Sequences(documents, tokenizer, plain.lengths, context)
    runs = {}
    for name, changes in VARIANTS.items():
        settings = replace(plain, **{**BASE, **changes})
        torch.manual_seed(settings.seed)
        runs[name] = Distiller(teacher, DraftModel(shape), data, data, settings, out, accelerator)
    last = train(runs, teacher, data, steps)

    title = f"Losses of a retrieval head: {steps} steps of {context} tokens on the demo model"
    result = report.Report("losses", title, TABLES, details={"last_losses": last, "variants": VARIANTS, "recall": {}, "needles": {}})
    unseen = Sequences(documents, tokenizer, [context], context, held_out=True)
    sequences = [HeldOut.seen(teacher, *unseen[i], seed=i) for i in range(held_out)]
    model = demo_model(device)
    base: dict[str, list[dict[int, Recall]]] = {}
    for name, run in runs.items():
        with torch.no_grad():
            recalls = {m: [recall_of(run.draft, s.lessons[m], s.at, BUDGETS) for s in sequences] for m in ("max", "mean")}
        base = base or recalls
        row = {**make_row(name, recalls, base), "agreement": agreement(teacher, run.draft, sequences)}
        result.details["recall"][name] = {m: [{b: r.found for b, r in s.items()} for s in found] for m, found in recalls.items()}
        if name in DECODED:
            result.details["needles"][name] = scores = needles(model, run.draft, tokenizer, context)
            low, high = wilson(int(sum(scores)), len(scores))
            row |= {"needle": sum(scores) / len(scores), "needle_interval": f"{low:.2f} to {high:.2f}"}
        result.rows.append(row)
        print(f"{name}: {row}", flush=True)
    best = {f"{m}_{b}": sum(s[b].best for s in found) / len(found) for m, found in base.items() for b in BUDGETS}
    result.rows.append({"name": "the best choice there is", **best})
    result.notes += [
        f"The same {steps} batches of {context} tokens for all (sequences of {', '.join(map(str, plain.lengths))} tokens), the same "
        f"initial weights but in the second row; {plain.align_positions} positions aligned and {DRAFT_POSITIONS} drafted a sequence, "
        f"peak rate {plain.learning_rate:g}.",
        f"Recall: mean over {held_out} held-out sequences of {context} tokens; differences are paired with the first row by sequence, "
        "bootstrap. The second row shows what the initial weights alone change.",
        f"Needles: {NEEDLES} questions in prompts of about {context} tokens, all layouts, decoded with a budget of {BUDGETS[0]}; Wilson "
        "intervals.",
    ]
    result.write(out)
    result.show()
