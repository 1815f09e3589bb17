"""Options of `specontext distill`: defaults and ranges."""

from __future__ import annotations

import math
import os
from typing import Any

from specontext_vllm.distillation.recall import MIN_BUDGET
from specontext_vllm.distillation.settings import Format, Loss, Settings

CONTEXT, MIN_CONTEXT = 32768, 256
MAX_LOADERS = 4
"""Default number of loader processes, if there are cores for them. Where texts have been made into
tokens before, one makes millions of tokens a second; the first time four make about one million.
"""
MAX_SEED = 2**32
MAX_STEPS_AHEAD = 16
DEMO_WIDTH, DEMO_RATE = 256, 1e-3
"""Hidden size and peak learning rate of the demo's head."""
HEAD_WIDTH, HEAD_RATE = 576, 3e-3
"""Hidden size of the target and peak learning rate, with Muon, of the head for SmolLM2."""


class OptionError(ValueError):
    """An option that cannot be used; the message is one sentence."""


def default_loaders(processes: int, on_gpu: bool) -> int:
    """Loader processes of each training process: as many as it has cores for, up to
    ``MAX_LOADERS``; without a GPU half of the cores are left to training.

    Args:
        processes: training processes on this machine.
    """
    cores = len(os.sched_getaffinity(0)) // processes
    return min(MAX_LOADERS, cores - 1 if on_gpu else cores // 2)


def make_settings(
    config: Any,
    *,
    context: int | None,
    batch_tokens: int | None,
    hours: float,
    steps: int | None,
    loss: Loss | None,
    learning_rate: float | None,
    budget: int | None,
    seed: int,
    loaders: int = 0,
    format: Format = "eagle3",
    copies: float | None = None,
    steps_ahead: int | None = None,
    freeze_retrieval: bool = False,
    new: bool = True,
) -> Settings:
    """Settings for a target. Defaults: the target's longest context up to 32768, a budget of a
    sixteenth of it, and the learning rate of the format's first head scaled down with the width
    (muP's rule for Adam).

    Args:
        config: the target's transformers config.
        new: the head starts from nothing.
        The others: the command's options.
    Raises:
        OptionError: a value out of range.
    """
    longest = config.max_position_embeddings
    context = min(CONTEXT, longest) if context is None else context
    if not MIN_CONTEXT <= context <= longest:
        raise OptionError(
            f"--context: found {context}; give {MIN_CONTEXT} to {longest} tokens, the model's "
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
    if budget is not None and not MIN_BUDGET <= budget < context:
        raise OptionError(
            f"--budget: found {budget}; give {MIN_BUDGET} tokens, for sinks, recents and one page "
            f"to choose, or more, and less than the context ({context})."
        )
    if copies is not None and not 0 <= copies <= 1:
        raise OptionError(f"--copies: found {copies:g}; give a share of 0 to 1.")
    if format == "specontext" and loss is not None:
        raise OptionError(
            f"--loss: found {loss}, but a head for retrieval alone has one loss; leave it out, or "
            "give --format eagle3."
        )
    if steps_ahead is not None:
        if format == "specontext":
            raise OptionError(
                f"--steps-ahead: found {steps_ahead}, but a head for retrieval alone drafts "
                "nothing; leave it out, or give --format eagle3."
            )
        if loss == "align":
            raise OptionError(
                f"--steps-ahead: found {steps_ahead}, but --loss align trains no drafts; leave one "
                "of the two out."
            )
        if not 1 <= steps_ahead <= MAX_STEPS_AHEAD:
            raise OptionError(
                f"--steps-ahead: found {steps_ahead}; give 1 to {MAX_STEPS_AHEAD} drafts in a row."
            )
    if freeze_retrieval:
        if format == "specontext" or new:
            raise OptionError(
                "--freeze-retrieval: there is nothing to leave as it is; give --format eagle3 and "
                "--init, or leave it out."
            )
        if loss not in (None, "draft"):
            raise OptionError(
                f"--freeze-retrieval: found --loss {loss}, which trains what it is to leave as it "
                "is; leave one of the two out."
            )
        loss = "draft"
    if loaders < 0:
        raise OptionError(f"--loaders: found {loaders}; give 0 or more processes, or leave it out.")
    if not 0 <= seed < MAX_SEED:
        raise OptionError(f"--seed: found {seed}; give 0 to {MAX_SEED - 1}.")
    width, rate = (HEAD_WIDTH, HEAD_RATE) if format == "specontext" else (DEMO_WIDTH, DEMO_RATE)
    if copies is None:
        copies = Settings.copies if format == "specontext" else 0.0
    return Settings(
        context=context,
        batch_tokens=batch_tokens or context,
        budget=budget or max(MIN_BUDGET, context // 16),
        hours=hours,
        steps=steps,
        loss=loss or "both",
        copies=copies,
        steps_ahead=steps_ahead or Settings.steps_ahead,
        freeze_retrieval=freeze_retrieval,
        learning_rate=learning_rate or rate * min(1.0, width / config.hidden_size),
        seed=seed,
        loaders=loaders,
    )
