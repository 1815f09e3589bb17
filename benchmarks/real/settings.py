"""What the decode steps read: retrievers, heads, budgets and whatever else is varied, and the
engines that this takes.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from specontext_vllm.config import PAGE_SIZE, SpeContextConfig
from specontext_vllm.retrieval.rules import find_rule, rule_names

DENSE = "dense"
OWN_HEAD = "own"
"""Name of the head in the model's folder."""

LIVE = (
    "recent_tokens",
    "sink_tokens",
    "stickiness",
    "confidence_threshold",
    "fallback_budget",
    "rule_settings",
)
"""Settings that ``specontext_set`` changes, besides the retriever and its budget; the others need
an engine of their own."""


class OptionError(ValueError):
    """An option that cannot be used; the message is one sentence."""


@dataclass(frozen=True)
class Variant:
    """A way of choosing pages, at any budget.

    Attributes:
        name: in the tables.
        head: name of the head, where the retriever needs one.
        settings: others that differ from their defaults, as sorted pairs.
    """

    name: str
    retriever: str
    head: str | None = None
    settings: tuple[tuple[str, Any], ...] = ()

    def at_start(self) -> tuple[tuple[str, Any], ...]:
        """Those settings that only a new engine takes."""
        return tuple((key, value) for key, value in self.settings if key not in LIVE)


@dataclass(frozen=True)
class Setting:
    """A variant with its budget in tokens; None: everything is read."""

    variant: Variant
    budget: int | None = None

    @property
    def name(self) -> str:
        return self.variant.name if self.budget is None else f"{self.variant.name} {self.budget}"

    def changes(self) -> dict[str, Any]:
        """Arguments of ``specontext_set``: all that others may have changed.

        Raises:
            ConfigError: no such setting can be.
        """
        given = {key: _thawed(value) for key, value in self.variant.settings if key in LIVE}
        if self.budget is None:
            return {"retriever": self.variant.retriever, "confidence_threshold": 0.0, **given}
        default = SpeContextConfig()
        settings = {
            "retriever": self.variant.retriever,
            "budget": self.budget,
            "recent_tokens": default.recent_tokens,
            "sink_tokens": default.sink_tokens,
            "stickiness": default.stickiness,
            "confidence_threshold": default.confidence_threshold,
            "fallback_budget": 4 * self.budget,
            **given,
        }
        least = PAGE_SIZE * (default.sink_pages + default.recent_pages + 1)
        if "recent_tokens" not in given and self.budget < least:
            settings["recent_tokens"] = self.budget // 4
        SpeContextConfig.from_settings(settings)
        return settings


def _thawed(value: Any) -> Any:
    return dict(value) if isinstance(value, tuple) else value


# -- options


def parse_heads(model: Path, given: Sequence[str]) -> dict[str, Path]:
    """Folders by name; without any, the one in the model's folder.

    Raises:
        OptionError: no such folder, or a name twice.
    """
    heads: dict[str, Path] = {}
    for text in given:
        name, equals, folder = text.partition("=")
        path = Path(folder)
        if not equals or not name or name in heads or not (path / "config.json").exists():
            raise OptionError(
                f"--head: found {text!r}; give NAME=FOLDER, each name once, the folder with a "
                "config.json."
            )
        heads[name] = path
    beside = model / "retrieval_head"
    return heads or ({OWN_HEAD: beside} if beside.is_dir() else {})


def parse_variants(retrievers: str, given: Sequence[str], heads: dict[str, Path]) -> list[Variant]:
    """One for each retriever, and for each head that it needs; then those that are given as
    ``NAME:key=value,...``.

    Raises:
        OptionError: an unknown retriever, head or setting.
    """
    out: list[Variant] = []
    for name in [part for part in retrievers.split(",") if part and part != DENSE]:
        out += _with_heads(name, name, (), heads, "--retrievers")
    for text in given:
        name, _, rest = text.partition(":")
        pairs = dict(part.partition("=")[::2] for part in rest.split(",") if part)
        settings = {key: _value(value) for key, value in pairs.items()}
        retriever = str(settings.pop("retriever", "dlm"))
        head = settings.pop("head", None)
        if not name or (head is not None and head not in heads):
            raise OptionError(
                f"--variant: found {text!r}; give NAME:retriever=dlm,recent_tokens=16 with a head "
                f"of {', '.join(heads) or 'none'}."
            )
        known = {key: settings[key] for key in settings if key in SpeContextConfig.model_fields}
        own = {key: value for key, value in settings.items() if key not in known}
        if own:
            known["rule_settings"] = tuple(sorted(own.items()))
        frozen = tuple(sorted(known.items()))
        mine = heads if head is None else {head: heads[head]}
        out += _with_heads(name, retriever, frozen, mine, "--variant")
    names = [variant.name for variant in out]
    if twice := next((name for name in names if names.count(name) > 1), None):
        raise OptionError(f"--variant: found {twice!r} twice; give each variant another name.")
    return out


def _with_heads(
    name: str,
    retriever: str,
    settings: tuple[tuple[str, Any], ...],
    heads: dict[str, Path],
    option: str,
) -> list[Variant]:
    if retriever not in rule_names():
        raise OptionError(f"{option}: found {retriever!r}; use some of {', '.join(rule_names())}.")
    if not find_rule(retriever).needs_head:
        return [Variant(name, retriever, None, settings)]
    if not heads:
        raise OptionError(
            f"{option}: {retriever} needs a retrieval head and the model's folder has none; name "
            "one with --head."
        )
    several = len(heads) > 1
    return [
        Variant(f"{name} {head}" if several else name, retriever, head, settings) for head in heads
    ]


def _value(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return text


def dense_setting() -> Setting:
    """Everything is read."""
    return Setting(Variant(DENSE, DENSE))


def settings_of(variants: Sequence[Variant], budgets: Sequence[int]) -> list[Setting]:
    """Dense first, then every variant with every budget.

    Raises:
        ConfigError: one cannot be.
    """
    out = [dense_setting()]
    out += [Setting(variant, budget) for variant in variants for budget in budgets]
    for setting in out:
        setting.changes()
    return out


# -- engines


@dataclass(frozen=True)
class EngineKind:
    """What must be the same for settings to share an engine."""

    head: str | None
    at_start: tuple[tuple[str, Any], ...]
    eager: bool


def engines(settings: Sequence[Setting], on_gpu: bool) -> dict[EngineKind, list[Setting]]:
    """The settings by the engine that runs them, as few engines as can be. On a GPU, rules that
    select in each layer can only be switched without CUDA graphs, so they have an engine apart; on
    a CPU nothing is captured.
    """
    out: dict[EngineKind, list[Setting]] = {}
    free: list[Setting] = []
    for setting in settings:
        variant, rule = setting.variant, find_rule(setting.variant.retriever)
        per_layer = rule.per_layer and on_gpu
        if variant.head is None and not variant.at_start() and not per_layer:
            free.append(setting)
            continue
        kind = EngineKind(variant.head, variant.at_start(), per_layer or not on_gpu)
        out.setdefault(kind, []).append(setting)
    # What fits everywhere goes where it costs no engine, first where graphs make it fast.
    host = min(out, key=lambda kind: (kind.eager, bool(kind.at_start)), default=None)
    if host is None:
        host = EngineKind(None, (), not on_gpu)
    first = {host: [*free, *out.get(host, [])]}
    return {**first, **{kind: mine for kind, mine in out.items() if kind != host}}


def parse_numbers(option: str, text: str) -> list[int]:
    """The comma-separated numbers, ascending, each once.

    Raises:
        OptionError: something else, or a number under 1.
    """
    try:
        found = sorted({int(part) for part in text.split(",")})
    except ValueError:
        found = [0]
    if found[0] < 1:
        raise OptionError(f"{option}: found {text!r}; give positive numbers separated by commas.")
    return found
