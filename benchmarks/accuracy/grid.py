"""What is asked for: the options, checked."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

from benchmarks.accuracy.cells import DENSE, Group, Setting
from benchmarks.accuracy.tasks import Task
from benchmarks.accuracy.writer import Writer
from benchmarks.prefilled import EngineSpec
from specontext_vllm.config import PAGE_SIZE, HeadKeyDtype, SpeContextConfig, pages_for
from specontext_vllm.retrieval.rules import find_rule, listed_rules

CONTEXTS = (4096, 8192, 16384, 32768)
BUDGETS = (64, 128, 256, 512, 1024, 2048, 4096)
LARGE = 1 << 30
"""A budget that leaves room for any number of recent tokens."""
THRESHOLDS = (0.05, 0.1, 0.15, 0.2, 0.3, 0.5)


class OptionError(ValueError):
    """An option that cannot be used; the message is one sentence."""


@dataclass(frozen=True)
class Grid:
    """What is asked for, checked."""

    model: Path
    head: str | None
    tasks: dict[str, Task]
    retrievers: list[str]
    budgets: list[int]
    contexts: list[int]
    prompts: int
    thresholds: list[float]
    threshold_budget: int
    recents: Sequence[int] = ()

    def settings(self, context: int) -> list[Setting]:
        """Dense first, then every retriever with every budget that is less than the context and
        every number of recent tokens that leaves it a page to choose, then the thresholds of the
        fallback.
        """
        out = [Setting(DENSE)]
        recent_tokens: Sequence[int | None] = self.recents or [None]
        out += [
            Setting(name, budget, recents=recents)
            for name in self.retrievers
            if name != DENSE
            for budget in self.budgets
            if budget < context
            for recents in recent_tokens
            if recents is None or _min_budget(recents) <= budget
        ]
        out += [
            Setting("dlm", self.threshold_budget, threshold)
            for threshold in self.thresholds
            if threshold
        ]
        return out

    def groups(self, writer: Writer) -> list[Group]:
        """All prompts, the shorter contexts first."""
        return [
            Group(
                name,
                context,
                [
                    task.make(writer, seed, context)
                    for seed in range(min(self.prompts, task.count or self.prompts))
                ],
            )
            for context in self.contexts
            for name, task in self.tasks.items()
        ]


def _min_budget(recents: int) -> int:
    """Tokens of the smallest budget that leaves a page to choose beside so many recent ones."""
    settings = {"budget": LARGE, "recent_tokens": recents}
    return SpeContextConfig.from_settings(settings).min_budget


def parse_numbers(option: str, text: str, kind: type) -> list[Any]:
    try:
        found = sorted({kind(part) for part in text.split(",")})
    except ValueError:
        raise OptionError(f"{option}: found {text!r}; give numbers separated by commas.") from None
    if found[0] < 0:
        raise OptionError(f"{option}: found {found[0]}; give positive numbers.")
    return found


def parse_names(option: str, text: str | None, known: Sequence[str]) -> list[str]:
    names = list(known) if text is None else text.split(",")
    for name in names:
        if name not in known:
            raise OptionError(f"{option}: found {name!r}; use some of {', '.join(known)}.")
    return names


def _longest(model: Path) -> int:
    from transformers import AutoConfig

    return int(AutoConfig.from_pretrained(str(model)).get_text_config().max_position_embeddings)


def find_head(
    model: Path, head: str | None, retrievers: str | None
) -> tuple[str | None, list[str]]:
    """The head, and the retrievers that can run with it."""
    beside = model / "retrieval_head"
    head = head or (str(beside) if beside.is_dir() else None)
    known = listed_rules()
    names = parse_names("--retrievers", retrievers, known)
    headless = [name for name in names if not find_rule(name).needs_head]
    if head is not None or names == headless:
        return head, names
    if retrievers is not None:
        needing = next(name for name in names if name not in headless)
        raise OptionError(
            f"--retrievers: {needing} needs a retrieval head and {model} has no retrieval_head "
            "folder; name one with --head."
        )
    return head, headless


def head_words(model: Path, head: str | None) -> list[str]:
    """Words for the file names of a run with a head that is not the model's own, so that it does
    not overwrite another run's; else none.
    """
    if head is None or Path(head).resolve() == (model / "retrieval_head").resolve():
        return []
    return ["head", re.sub(r"[^\w.]+", "-", Path(head).resolve().name).strip("-.")]


def label_words(text: str | None) -> list[str]:
    if text is not None and not re.fullmatch(r"[\w.]+", text):
        raise OptionError(
            f"--label: found {text!r}; give one word of letters, digits, dots and underscores."
        )
    return [text] if text else []


def read_other(path: Path | None, groups: Sequence[Group]) -> dict[str, Any] | None:
    """The result to compare with.

    Raises:
        OptionError: it is none, or has other numbers of prompts.
    """
    if path is None:
        return None
    try:
        other = json.loads(path.read_text())
        title, scores = other["title"], other["details"]["scores"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise OptionError(
            f"--against: {path} is no result of this case ({type(error).__name__}); give its JSON "
            "file."
        ) from None
    for group in groups:
        found = {
            len(values)
            for name, values in scores.items()
            if name.startswith(f"{group.task}, {group.context}, ")
        }
        if found - {len(group.examples)}:
            raise OptionError(
                f"--against: {path} ({title}) has {found.pop()} prompts of {group.task} at "
                f"{group.context} tokens, this grid has "
                f"{len(group.examples)}; compare results over the same prompts."
            )
    return other


def make_grid(
    model: Path,
    head: str | None,
    tasks: dict[str, Task],
    retrievers: str | None,
    budgets: str,
    contexts: str | None,
    prompts: int,
    thresholds: str,
    threshold_budget: int | None,
    recent_tokens: str | None,
) -> Grid:
    """Check the options.

    Raises:
        OptionError, ConfigError: one cannot be used.
    """
    if not (model / "config.json").exists():
        raise OptionError(f"--model: no config.json in {model}; name a model folder.")
    sizes = parse_numbers("--budgets", budgets, int)
    fallbacks = [
        threshold for threshold in parse_numbers("--thresholds", thresholds, float) if threshold
    ]
    recents = [] if recent_tokens is None else parse_numbers("--recent-tokens", recent_tokens, int)
    for number in recents:
        if _min_budget(number) > sizes[-1]:
            raise OptionError(
                f"--recent-tokens: found {number}, but no budget of {budgets} leaves a page to "
                f"choose beside them; give a budget of {_min_budget(number)}, or fewer recent "
                "tokens."
            )
    lengths = None if contexts is None else parse_numbers("--contexts", contexts, int)
    found_head, names = find_head(model, head, retrievers)
    if lengths is None:
        lengths = [context for context in CONTEXTS if context < _longest(model)]
    grid = Grid(
        model,
        found_head,
        tasks,
        names,
        sizes,
        lengths,
        prompts,
        fallbacks if "dlm" in names else [],
        threshold_budget or sizes[0],
        recents,
    )
    for context in grid.contexts:
        for setting in grid.settings(context):
            setting.changes()
    return grid


def make_spec(
    grid: Grid,
    groups: Sequence[Group],
    dtype: str,
    head_keys: str,
    on_gpu: bool,
    kv_gib: float | None,
) -> EngineSpec:
    """The engine that holds the longest prompt with its reply.

    Raises:
        OptionError: the model does not reach so far, or ``head_keys`` is unknown.
    """
    if head_keys not in get_args(HeadKeyDtype):
        raise OptionError(
            f"--head-keys: found {head_keys!r}; use {', '.join(get_args(HeadKeyDtype))}."
        )
    longest = max(
        len(e.prompt) + max(e.reply_tokens, len(e.forced or ()))
        for group in groups
        for e in group.examples
    )
    reach = _longest(grid.model)
    if longest > reach:
        raise OptionError(
            f"--contexts: found {max(grid.contexts)}; with the reply that makes {longest} tokens "
            f"and the model reaches {reach}; use "
            f"shorter ones."
        )
    return EngineSpec(
        model=str(grid.model),
        head=grid.head,
        head_keys=head_keys,
        # What keeps vectors of each page does so from the start.
        retriever=next((r for r in grid.retrievers if find_rule(r).page_vectors), DENSE),
        dtype=dtype,
        on_gpu=on_gpu,
        eager=not on_gpu or any(find_rule(r).per_layer for r in grid.retrievers),
        max_model_len=min(reach, pages_for(longest + 1) * PAGE_SIZE),
        kv_gib=kv_gib,
    )


def make_writer(model: Path) -> Writer:
    from transformers import AutoTokenizer

    return Writer(AutoTokenizer.from_pretrained(str(model)))
