"""What `specontext distill` does with its options."""

from __future__ import annotations

import json
import math
import os
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from specontext_vllm.config import CONFIG_KEY
from specontext_vllm.distillation.data import DataError, Documents, Files, Sequences, Synthetic
from specontext_vllm.distillation.draft import DraftModel, DraftShape
from specontext_vllm.distillation.files import whole_file
from specontext_vllm.distillation.recall import LEAST_BUDGET
from specontext_vllm.distillation.teacher import (
    Teacher,
    TeacherError,
    load_teacher,
    read_config,
    read_tokenizer,
)
from specontext_vllm.distillation.trainer import Distiller, Loss, Settings
from specontext_vllm.retrieval.checkpoint import HeadError, check_fits, resolve_checkpoint

Batches = Iterable[tuple[torch.Tensor, torch.Tensor]]
CONTEXT, LEAST_CONTEXT = 32768, 256
DRAFT_VOCABULARY = 32000
"""Of a new head, at most: the LM head would else be larger than all the rest of it. Published
EAGLE-3 heads have as many.
"""
COUNTED = 64
"""Batches in which its tokens are counted."""
MOST_LOADERS = 4
"""Loader processes by default, where there are cores for so many; they keep up with half a million
tokens a second.
"""
MOST_SEED = 2**32
DEMO_WIDTH, DEMO_RATE = 256, 1e-3
"""Hidden size and peak learning rate of the demo's head."""


class OptionError(ValueError):
    """An option that cannot be used; the message is one sentence."""


DistillError = (DataError, HeadError, OptionError, TeacherError)
"""What a run may refuse with: one sentence each."""


def default_loaders(processes: int, on_gpu: bool) -> int:
    """Loader processes of each training process: a core of those that this one may run on for each,
    up to ``MOST_LOADERS``; without a GPU half of the cores are left to the training.

    Args:
        processes: that train on this machine.
    """
    cores = len(os.sched_getaffinity(0)) // processes
    return min(MOST_LOADERS, cores - 1 if on_gpu else cores // 2)


def make_settings(
    config: Any,
    *,
    context: int | None,
    batch_tokens: int | None,
    hours: float,
    steps: int | None,
    loss: Loss,
    learning_rate: float | None,
    budget: int | None,
    seed: int,
    loaders: int = 0,
) -> Settings:
    """Settings for a target, with defaults for what was not given: the longest context up to 32768,
    a budget of a sixteenth of it (2048 of 32768), a learning rate that falls with the width from
    the demo's (muP's rule for Adam).

    Args:
        config: the target's transformers config. The others: the command's options.
    Raises:
        OptionError: a value out of range.
    """
    longest = config.max_position_embeddings
    context = min(CONTEXT, longest) if context is None else context
    if not LEAST_CONTEXT <= context <= longest:
        raise OptionError(
            f"--context: found {context}; give {LEAST_CONTEXT} to {longest} tokens, the model's "
            "own max_position_embeddings."
        )
    if batch_tokens is not None and batch_tokens < context:
        raise OptionError(
            f"--batch-tokens: found {batch_tokens}, less than one sequence of {context} tokens; "
            "raise it, or leave it out."
        )
    if not 0 < hours < math.inf:
        raise OptionError(f"--hours: found {hours:g}; give more than 0.")
    if steps is not None and steps < 1:
        raise OptionError(f"--steps: found {steps}; give 1 or more, or leave it out.")
    if learning_rate is not None and not 0 < learning_rate < math.inf:
        raise OptionError(
            f"--learning-rate: found {learning_rate:g}; give more than 0, or leave it out."
        )
    if budget is not None and not LEAST_BUDGET <= budget < context:
        raise OptionError(
            f"--budget: found {budget}; give {LEAST_BUDGET} tokens, which sinks, recents and one "
            "page to choose need, or more, and less than the "
            f"context ({context})."
        )
    if loaders < 0:
        raise OptionError(f"--loaders: found {loaders}; give 0 or more processes, or leave it out.")
    if not 0 <= seed < MOST_SEED:
        raise OptionError(f"--seed: found {seed}; give 0 to {MOST_SEED - 1}.")
    return Settings(
        context=context,
        batch_tokens=batch_tokens or context,
        budget=budget or max(LEAST_BUDGET, context // 16),
        hours=hours,
        steps=steps,
        loss=loss,
        learning_rate=learning_rate or DEMO_RATE * min(1.0, DEMO_WIDTH / config.hidden_size),
        seed=seed,
        loaders=loaders,
    )


def most_frequent(batches: Batches, count: int) -> torch.Tensor:
    """The ``count`` tokens that occur most in the batches, filled up with the lowest ids:
    ``[count]`` int64, ascending.
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
    """A new head of the target's shape, or a published one to go on from.

    Args:
        batches: what the tokens of a reduced draft vocabulary are counted in.
    Raises:
        HeadError: the published one does not fit.
        OptionError: a draft vocabulary out of range.
    """
    torch.manual_seed(settings.seed)
    if init is not None:
        if draft_vocabulary is not None:
            raise OptionError(
                "--draft-vocabulary: --init brings its own; leave one of the two out."
            )
        draft = DraftModel.load(
            resolve_checkpoint(init),
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


def check_folder(out: Path, facts: dict[str, Any] | None = None) -> None:
    """See, before anything is made, that ``out`` can be written to, and is free or holds the run
    that these options began.

    Args:
        facts: what makes it another run: model, data, loss, shape; not how long it goes. None: not
            known yet.
    Raises:
        OptionError: it cannot, or something else lies there.
    """
    there = next(path for path in (out, *out.absolute().parents) if os.path.lexists(path))
    if not there.is_dir():
        raise OptionError(f"--out: {there} is a file; give a folder.")
    if not os.access(there, os.W_OK | os.X_OK):
        raise OptionError(f"--out: {there} cannot be written to; give a folder that can.")
    note = out / "training" / "run.json"
    if not note.is_file():
        if (out / "config.json").exists():
            raise OptionError(
                f"--out: {out} holds a model or a head that `specontext distill` did not make; "
                "give another folder."
            )
        return
    try:
        found = dict(json.loads(note.read_text()))
    except (ValueError, TypeError) as error:
        raise OptionError(
            f"--out: {note} cannot be read ({error}); give another folder, or remove that file to "
            "begin anew."
        ) from None
    if differ := [
        f"{key} {found.get(key)!r} (now {value!r})"
        for key, value in (facts or {}).items()
        if found.get(key) != value
    ]:
        raise OptionError(
            f"--out: {out} holds a run with {', '.join(differ)}; give another folder, or the same "
            "options to go on."
        )


def claim_folder(out: Path, facts: dict[str, Any]) -> None:
    """``check_folder``, and note there whose it is."""
    check_folder(out, facts)
    note = out / "training" / "run.json"
    if not note.is_file():
        note.parent.mkdir(parents=True, exist_ok=True)
        with whole_file(note) as part:
            part.write_text(json.dumps(facts, indent=1) + "\n")


def resume(run: Distiller) -> bool:
    """``Distiller.resume``.

    Raises:
        OptionError: the state cannot be read, or is another head's.
    """
    try:
        return run.resume()
    except Exception as error:  # whatever torch.load and pickle raise on a damaged file
        reason = str(error).strip().split("\n")[0]
        raise OptionError(
            f"--out: {run.state_file} cannot be gone on from ({type(error).__name__}: {reason}); "
            f"give another folder, or remove {run.state_file.parent} "
            "to begin anew."
        ) from None


def distill(
    model: Path,
    data: list[str],
    out: Path,
    *,
    init: str | None,
    draft_vocabulary: int | None,
    loaders: int | None = None,
    **options: Any,
) -> None:
    """Train a head for the model in a folder and write it to ``out``; goes on where an earlier run
    there stopped.

    Args:
        loaders: processes that make batches; None: by the cores.
        options: of ``make_settings``.
    Raises:
        DistillError: the model, the data, the head to start from or an option cannot be used.
    """
    from accelerate import Accelerator

    # Without `cpu`, processes that torchrun starts on a machine without GPUs would not know of each
    # other.
    on_gpu = torch.cuda.is_available()
    accelerator = Accelerator(mixed_precision="bf16" if on_gpu else "no", cpu=not on_gpu)
    console = Console(soft_wrap=True, quiet=not accelerator.is_main_process)
    config = read_config(model)
    if loaders is None:
        loaders = default_loaders(int(os.environ.get("LOCAL_WORLD_SIZE", 1)), on_gpu)
    settings = make_settings(config, loaders=loaders, **options)
    check_folder(out)
    tokenizer = read_tokenizer(model)
    cache = out / "training" / "tokens"
    documents: Documents = (
        Synthetic(tokenizer)
        if data == ["synthetic"]
        else Files([Path(name) for name in data], tokenizer, cache)
    )
    kind = {
        "lengths": settings.lengths,
        "batch_tokens": settings.batch_tokens,
        "seed": settings.seed,
    }
    first = Sequences(documents, **kind)
    draft = make_draft(config, settings, init, draft_vocabulary, (first[i] for i in range(COUNTED)))
    facts = {
        "model": str(model),
        "data": data,
        "init": init,
        "loss": settings.loss,
        "context": settings.context,
        "batch_tokens": settings.batch_tokens,
        "learning_rate": settings.learning_rate,
        "draft_vocabulary": draft.shape.draft_vocabulary,
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
    run = Distiller(
        Teacher(target, draft.shape.aux_layers),
        draft,
        Sequences(
            documents, **kind, shard=accelerator.process_index, shards=accelerator.num_processes
        ),
        Sequences(
            documents, settings.lengths[:1], settings.context, seed=settings.seed, held_out=True
        ),
        settings,
        out,
        accelerator,
    )
    if resume(run):
        console.print(
            f"Going on from {out}: step {run.progress.step}, {run.progress.seconds / 3600:.2f} h."
        )
    follow(run, console)
    served = json.dumps({CONFIG_KEY: {"retrieval_head": str(out)}})
    console.print(
        f"Wrote {out}; serve it with --attention-backend specontext --additional-config "
        f"'{served}'.",
        markup=False,
    )


def follow(run: Distiller, console: Console) -> None:
    """Drive a run: a progress bar on a terminal, else a line for each measurement."""
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
                recall = f", recall {figures['recall']:.3f} of {figures['recall_best']:.3f}, heaviest page {figures['heaviest']:.3f}"
            losses = "".join(
                f", {name} {figures[f'{name}_loss']:.3f}"
                for name in ("draft", "align")
                if f"{name}_loss" in figures
            )
            text = f"step {figures['step']}, {figures.get('tokens_per_s', 0):,} tokens/s{losses}{recall}"
            bar.update(task, completed=min(1.0, run.progress.share(run.settings)), description=text)
            if figures.get("measured") and not console.is_terminal:
                console.print(text)
