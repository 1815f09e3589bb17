"""`specontext distill`: from its options to a head in a folder."""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from specontext_vllm.config import CONFIG_KEY
from specontext_vllm.distillation.data import Documents, Sequences, Synthetic, with_copies
from specontext_vllm.distillation.draft import DraftModel
from specontext_vllm.distillation.draft_trainer import DraftDistiller
from specontext_vllm.distillation.head_model import HeadModel
from specontext_vllm.distillation.head_shape import HeadShape
from specontext_vllm.distillation.head_trainer import HeadDistiller
from specontext_vllm.distillation.options import OptionError, default_loaders, make_settings
from specontext_vllm.distillation.run_folder import check_folder, claim_folder, resume
from specontext_vllm.distillation.settings import Format, Settings
from specontext_vllm.distillation.shape import DraftShape
from specontext_vllm.distillation.teacher import (
    Teacher,
    TeacherError,
    load_teacher,
    read_config,
    read_tokenizer,
)
from specontext_vllm.distillation.text_files import DataError, Files
from specontext_vllm.distillation.trainer import Distiller
from specontext_vllm.model_config import num_full_layers
from specontext_vllm.retrieval.checkpoint import HeadError, check_fits, checkpoint_folder

Batches = Iterable[tuple[torch.Tensor, torch.Tensor]]
DRAFT_VOCABULARY = 32000
"""Largest draft vocabulary of a new head, as in published EAGLE-3 heads. With more, its LM head
would be larger than all the rest of it.
"""
COUNTED = 64
"""Batches in which the draft vocabulary's tokens are counted."""
DistillError = (DataError, HeadError, OptionError, TeacherError)
"""What a run is refused with; each message is one sentence."""


def most_frequent(batches: Batches, count: int) -> torch.Tensor:
    """The ``count`` commonest tokens of the batches, filled up with the lowest ids: ``[count]``
    int64, ascending.
    """
    seen: Counter[int] = Counter()
    for ids, _ in batches:
        seen.update(ids.flatten().tolist())
    chosen = {token for token, _ in seen.most_common(count)}
    chosen.update([token for token in range(count) if token not in chosen][: count - len(chosen)])
    return torch.tensor(sorted(chosen))


def make_draft(
    config: Any,
    settings: Settings,
    init: str | None,
    draft_vocabulary: int | None,
    batches: Batches,
) -> DraftModel:
    """A new head of the target's shape, or a published one to train further.

    Args:
        batches: in which the tokens of a reduced draft vocabulary are counted.
    Raises:
        HeadError: the published head does not fit.
        OptionError: a draft vocabulary out of range.
    """
    torch.manual_seed(settings.seed)
    if init is not None:
        if draft_vocabulary is not None:
            raise OptionError(
                "--draft-vocabulary: --init brings its own; leave one of the two out."
            )
        draft = DraftModel.load(
            checkpoint_folder(init),
            max_position=settings.context,
            num_layers=config.num_hidden_layers,
            vocabulary=config.vocab_size,
        )
        own = DraftShape.for_target(config, max_position=settings.context)
        try:
            check_fits(
                draft.shape.head_spec(),
                target_hidden_size=own.hidden,
                num_layers=config.num_hidden_layers,
                num_kv_heads=own.kv_heads,
                vocab_size=own.vocabulary,
            )
        except HeadError as error:
            raise HeadError(f"--init {init}: {error}") from None
        return draft
    if draft_vocabulary is not None and not 1 <= draft_vocabulary <= config.vocab_size:
        raise OptionError(
            f"--draft-vocabulary: found {draft_vocabulary}; give 1 to {config.vocab_size}, the "
            "model's own."
        )
    shape = DraftShape.for_target(
        config, max_position=settings.context, draft_vocabulary=draft_vocabulary or DRAFT_VOCABULARY
    )
    reduced = shape.draft_vocabulary < shape.vocabulary
    return DraftModel(shape, most_frequent(batches, shape.draft_vocabulary) if reduced else None)


def make_head(
    config: Any,
    settings: Settings,
    init: str | None,
    draft_vocabulary: int | None,
    groups: int = 1,
) -> HeadModel:
    """A new head for retrieval alone, or one to train further.

    Raises:
        HeadError: the head to start from cannot be read, or does not fit.
        OptionError: an option of draft models was given, or more groups than the target has layers.
    """
    torch.manual_seed(settings.seed)
    if draft_vocabulary is not None:
        raise OptionError(
            f"--draft-vocabulary: found {draft_vocabulary}, but a head for retrieval alone drafts "
            "nothing; leave it out, or give --format eagle3."
        )
    most = num_full_layers(config)
    if not 1 <= groups <= most:
        raise OptionError(
            f"--groups: found {groups}; give 1 to {most}, the model's layers of full attention."
        )
    shape = HeadShape.for_target(config, max_position=settings.context, groups=groups)
    return HeadModel(shape) if init is None else HeadModel.load(checkpoint_folder(init), shape)


def distill(
    model: Path,
    data: list[str],
    out: Path,
    *,
    format: Format = "specontext",
    init: str | None,
    draft_vocabulary: int | None,
    loaders: int | None = None,
    groups: int = 1,
    **options: Any,
) -> None:
    """Train a head for the model in a folder and write it to ``out``; resume a run that was stopped
    there.

    Args:
        format: a head for retrieval alone, or a whole EAGLE-3 draft model.
        loaders: processes that make batches; None: by the cores.
        groups: of layers that each have a selection of their own.
        options: of ``make_settings``.
    Raises:
        DistillError: the model, the data, the head to start from or an option cannot be used.
    """
    from accelerate import Accelerator

    # On a machine without GPUs, processes that torchrun starts find each other only with `cpu`.
    on_gpu = torch.cuda.is_available()
    accelerator = Accelerator(mixed_precision="bf16" if on_gpu else "no", cpu=not on_gpu)
    console = Console(soft_wrap=True, quiet=not accelerator.is_main_process)
    config = read_config(model)
    if format == "eagle3" and groups != 1:
        raise OptionError(
            f"--groups: found {groups}, but a draft model has one set of queries; leave it out, or "
            "give --format specontext."
        )
    if loaders is None:
        loaders = default_loaders(int(os.environ.get("LOCAL_WORLD_SIZE", 1)), on_gpu)
    settings = make_settings(config, loaders=loaders, format=format, new=init is None, **options)
    check_folder(out)
    tokenizer = read_tokenizer(model)
    cache = out / "training" / "tokens"
    documents: Documents = (
        Synthetic(tokenizer)
        if data == ["synthetic"]
        else Files([Path(name) for name in data], tokenizer, cache)
    )
    documents = with_copies(documents, settings.copies, tokenizer)
    first = Sequences(documents, settings.lengths, settings.batch_tokens, seed=settings.seed)
    head: HeadModel | DraftModel
    if format == "specontext":
        head, drafted = make_head(config, settings, init, draft_vocabulary, groups), 0
    else:
        counted = (first[i] for i in range(COUNTED))
        head = make_draft(config, settings, init, draft_vocabulary, counted)
        drafted = head.shape.draft_vocabulary
    facts = {
        "model": str(model),
        "data": data,
        "format": format,
        "init": init,
        "loss": settings.loss if format == "eagle3" else "page",
        **(
            {
                "steps_ahead": settings.steps_ahead,
                "freeze_retrieval": settings.freeze_retrieval,
            }
            if format == "eagle3"
            else {}
        ),
        "copies": settings.copies,
        "context": settings.context,
        "batch_tokens": settings.batch_tokens,
        "learning_rate": settings.learning_rate,
        "draft_vocabulary": drafted,
        "groups": groups,
        "seed": settings.seed,
        "processes": accelerator.num_processes,
    }
    check_folder(out, facts)
    target = load_teacher(
        model,
        accelerator.device,
        torch.bfloat16 if accelerator.device.type == "cuda" else torch.float32,
    )
    with accelerator.main_process_first():
        claim_folder(out, facts)
    parts = (
        Sequences(
            documents,
            settings.lengths,
            settings.batch_tokens,
            seed=settings.seed,
            shard=accelerator.process_index,
            shards=accelerator.num_processes,
        ),
        Sequences(
            documents, settings.lengths[:1], settings.context, seed=settings.seed, held_out=True
        ),
        settings,
        out,
        accelerator,
    )
    teacher = Teacher(target, head.aux_layers)
    run: Distiller[Any] = (
        HeadDistiller(teacher, head, *parts)
        if isinstance(head, HeadModel)
        else DraftDistiller(teacher, head, *parts)
    )
    if resume(run):
        console.print(
            f"Resuming {out} at step {run.progress.step}, after "
            f"{run.progress.seconds / 3600:.2f} h."
        )
    show_progress(run, console)
    served = json.dumps({CONFIG_KEY: {"retrieval_head": str(out)}})
    console.print(
        f"Wrote {out}; serve it with --attention-backend specontext --additional-config "
        f"'{served}'.",
        markup=False,
    )


def show_progress(run: Distiller[Any], console: Console) -> None:
    """Train to the end, with a progress bar on a terminal, else a line for each measurement."""
    columns = (
        BarColumn(20),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.description}"),
    )
    recall = ""
    with Progress(*columns, console=console, disable=not console.is_terminal) as bar:
        task = bar.add_task("reading", total=1.0)
        for figures in run.run():
            if "recall" in figures:
                recall = (
                    f", recall {figures['recall']:.3f} of {figures['recall_best']:.3f}, heaviest "
                    f"page {figures['heaviest']:.3f}"
                )
            if "accepted" in figures:
                one, _, three, _, five = figures["accepted"]
                recall += f", accepted {one:.2f} of 1, {three:.2f} of 3, {five:.2f} of 5 drafts"
            losses = "".join(
                f", {name} {figures[f'{name}_loss']:.3f}"
                for name in ("page", "draft", "ahead", "align")
                if f"{name}_loss" in figures
            )
            speed = f"{figures.get('tokens_per_s', 0):,} tokens/s"
            text = f"step {figures['step']}, {speed}{losses}{recall}"
            bar.update(task, completed=min(1.0, run.progress.share(run.settings)), description=text)
            if figures.get("measured") and not console.is_terminal:
                console.print(text)
