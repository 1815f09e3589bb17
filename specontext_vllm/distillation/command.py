"""What `specontext distill` does with its options."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from specontext_vllm.distillation.data import DataError, Documents, Files, Sequences, Synthetic
from specontext_vllm.distillation.draft import DraftModel, DraftShape
from specontext_vllm.distillation.teacher import Teacher, TeacherError, load_teacher
from specontext_vllm.distillation.trainer import Distiller, Settings
from specontext_vllm.retrieval.checkpoint import HeadError, check_fits, resolve_checkpoint

DistillError = (DataError, HeadError, TeacherError)
"""What a run may refuse with: one sentence each."""


def most_frequent(sequences: Sequences, count: int, batches: int = 64) -> torch.Tensor:
    """The ``count`` tokens that occur most in the first batches, filled up with the lowest ids; ascending."""
    seen: Counter[int] = Counter()
    for index in range(batches):
        seen.update(sequences[index][0].flatten().tolist())
    ids = [token for token, _ in seen.most_common(count)]
    rest = iter(range(count))
    chosen = set(ids)
    while len(chosen) < count:
        chosen.add(next(rest))
    return torch.tensor(sorted(chosen))


def make_draft(config: Any, settings: Settings, init: str | None, draft_vocabulary: int | None, data: Sequences) -> DraftModel:
    """A new head of the target's shape, or a published one to go on from.

    Raises:
        HeadError: the published one does not fit.
    """
    if init is not None:
        draft = DraftModel.load(resolve_checkpoint(init), max_position=settings.context, num_layers=config.num_hidden_layers)
        own = DraftShape.for_target(config, max_position=settings.context)
        check_fits(
            draft.shape.head_spec(), target_hidden_size=own.hidden, num_layers=config.num_hidden_layers, num_kv_heads=own.kv_heads,
            vocab_size=own.vocabulary,
        )  # fmt: skip
        return draft
    shape = DraftShape.for_target(config, max_position=settings.context, draft_vocabulary=draft_vocabulary)
    torch.manual_seed(settings.seed)
    return DraftModel(shape, most_frequent(data, shape.draft_vocabulary) if shape.draft_vocabulary < shape.vocabulary else None)


def distill(model: Path, data: list[str], out: Path, settings: Settings, init: str | None, draft_vocabulary: int | None) -> None:
    """Train a head for the model in a folder and write it to ``out``; goes on where an earlier run there stopped.

    Raises:
        DistillError: the model, the data or the head to start from cannot be used.
    """
    from accelerate import Accelerator
    from transformers import AutoTokenizer

    accelerator = Accelerator(mixed_precision="bf16" if torch.cuda.is_available() else "no")
    console = Console(soft_wrap=True, quiet=not accelerator.is_main_process)
    if not (model / "config.json").is_file():
        raise TeacherError(f"--model: {model} has no config.json; give the folder of a Hugging Face model.")
    tokenizer = AutoTokenizer.from_pretrained(model)
    documents: Documents = Synthetic(tokenizer) if data == ["synthetic"] else Files([Path(name) for name in data], tokenizer)
    target = load_teacher(model, accelerator.device, torch.bfloat16 if accelerator.device.type == "cuda" else torch.float32)
    own = Sequences(documents, tokenizer, settings.lengths, settings.batch_tokens, seed=settings.seed)
    draft = make_draft(target.config, settings, init, draft_vocabulary, own)
    teacher = Teacher(target, draft.shape.aux_layers)
    run = Distiller(teacher, draft, documents, tokenizer, settings, out, accelerator)
    check_same_run(out, run, {"model": str(model), "data": data, "init": init, "loss": settings.loss, "context": settings.context})
    if run.resume():
        console.print(f"Going on from {out}: step {run.progress.step}, {run.progress.seconds / 3600:.2f} of {settings.hours:g} hours done.")
    columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console) as bar:
        task = bar.add_task("distilling", total=3600 * settings.hours)

        def tell(figures: dict[str, Any]) -> None:
            text = ", ".join(f"{name} {value}" for name, value in figures.items() if value is not None and name != "seconds")
            bar.update(task, completed=figures["seconds"], description=text)
            if not console.is_terminal:
                console.print(text)

        run.run(tell)
    console.print(f"Wrote {out}; serve it with --additional-config '{json.dumps({'specontext': {'retrieval_head': str(out)}})}'.", markup=False)


def check_same_run(out: Path, run: Distiller, facts: dict[str, Any]) -> None:
    """Note what the run in ``out`` is, or see that it is the one that began there.

    Raises:
        DataError: another run's state lies there.
    """
    note = out / "run.json"
    if note.is_file() and (found := json.loads(note.read_text())) != facts:
        differ = ", ".join(f"{key} {found.get(key)!r} (now {facts[key]!r})" for key in facts if found.get(key) != facts[key])
        raise DataError(f"--out: {out} holds a run with {differ}; give another folder, or the same options to go on.")
    if run.accelerator.is_main_process:
        out.mkdir(parents=True, exist_ok=True)
        note.write_text(json.dumps(facts, indent=1) + "\n")
