"""Prompts, model and heads, from the options."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.real.forced import TASKS
from benchmarks.real.settings import OptionError
from benchmarks.real.tasks import Sources, make_groups
from benchmarks.teachers import read_full_config
from specontext_vllm.distillation.teacher import load_teacher

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
KINDS = tuple(TASKS)


def make_prompts(
    model: Path,
    texts: Sequence[Path],
    kinds: Sequence[str],
    context: int,
    forced: int,
    pieces: int,
    seed: int,
) -> dict[str, Tensor]:
    """Of each kind ``[pieces, context]`` token ids on the CPU, the same as `real` asks with these
    options. The last ``forced`` are those to force.

    Raises:
        OptionError, PromptError, TeacherError, TextError: there are none.
    """
    reach = int(read_full_config(model).max_position_embeddings)
    if context > reach:
        raise OptionError(
            f"--context: found {context}, but the model reaches {reach}; use a shorter one."
        )
    sources = Sources(model, tuple(texts), forced_tokens=forced)
    return {
        group.task: torch.tensor([prompt.tokens + prompt.forced[0] for prompt in group.prompts])
        for group in make_groups(sources, kinds, [context], pieces, seed)
    }


def load_model(model: Path, dtype: str) -> Any:
    """The frozen model, on the GPU if there is one.

    Raises:
        TeacherError: it cannot be read.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return load_teacher(model, device, DTYPES[dtype])


def names(option: str, text: str, allowed: Iterable[str]) -> list[str]:
    """The names in ``text``, separated by commas; `none` is none.

    Raises:
        OptionError: one that is not ``allowed``.
    """
    known = list(allowed)
    found = [part.strip() for part in text.split(",")]
    if found == ["none"]:
        return []
    if wrong := [part for part in found if part not in known]:
        raise OptionError(f"{option}: found {wrong[0]!r}; use some of {', '.join(known)}.")
    return found


def numbers(option: str, text: str, kind: type[int] | type[float] = int) -> list[Any]:
    """The numbers from 0 on in ``text``, separated by commas.

    Raises:
        OptionError: one that is none.
    """
    try:
        found = [kind(part) for part in text.split(",")]
    except ValueError:
        found = [kind(-1)]
    if not min(found) >= 0:
        raise OptionError(f"{option}: found {text!r}; give numbers separated by commas.")
    return found
