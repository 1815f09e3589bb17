"""Rules: how the pages of a context get their scores. One file each, found by the file's name:
``rules/NAME.py`` is the rule that the setting ``retriever`` calls ``NAME``.

docs/developer/add_a_rule.md shows how one is added. The settings ask rules for their needs before
anything heavy is loaded: so this package imports no torch (rules do so where they score), and lies
below config.
"""

from __future__ import annotations

import pkgutil
from collections.abc import Mapping
from functools import cache
from importlib import import_module
from typing import TYPE_CHECKING, Any, ClassVar

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from specontext_vllm.retrieval.scoring import ScoreInputs
    from specontext_vllm.step_data import PageScores


class Rule:
    """How pages get their scores. A subclass declares its needs and defines ``score``; its
    docstring's first paragraph says in docs/configuration.md what it is.

    Attributes:
        needs_head: reads the retrieval head's queries and keys. All such rules can also fall back
            to a larger budget where the head's kept mass is small.
        per_layer: scores anew in each layer, with the layer's own queries and keys, instead of once
            for all layers. Pages are then chosen too late to be fetched from a host pool.
        reads_everything: leaves no page out; ``score`` is never called.
        page_vectors: vectors of D numbers in the model's dtype that the rule keeps of each page,
            KV head and layer, made by ``learn``; only for rules that score per layer.
        capturable: CUDA graphs may hold ``score``: it launches kernels on tensors that persist, and
            waits for nothing.
        for_benchmarks: is left out where rules are listed for users.
        default_settings: names and defaults of the setting ``rule_settings``.

    Args:
        settings: of ``rule_settings``; what is not given has its default.
        device: where the scores are.
    """

    needs_head: ClassVar[bool] = False
    per_layer: ClassVar[bool] = False
    reads_everything: ClassVar[bool] = False
    page_vectors: ClassVar[int] = 0
    capturable: ClassVar[bool] = True
    for_benchmarks: ClassVar[bool] = False
    default_settings: ClassVar[Mapping[str, Any]] = {}

    def __init__(self, settings: Mapping[str, Any], device: torch.device) -> None:
        self.settings = {**self.default_settings, **settings}
        self.device = device

    @classmethod
    def check_settings(cls, settings: Mapping[str, Any]) -> None:
        """Called for every value of the setting ``rule_settings``, before torch is imported.

        Args:
            settings: known names, all of them: what is not given has its default.
        Raises:
            ValueError: one sentence that begins with ``rule_settings:`` and says what was found and
                what to do.
        """

    def score(self, inputs: ScoreInputs, scores: PageScores) -> PageScores:
        """Score the pages of ``inputs.rows``, on the device of ``scores``.

        Args:
            inputs: queries and keys where the rule needs them, and where each row's pages are.
                ``inputs.score_keys(scores)`` scores by attention; ``inputs.token_logits(row)`` are
                the logits themselves.
            scores: the workspace to write to.
        Returns:
            What selection reads: ``scores``, or its tensors in other places. Selection takes the
            pages with the largest ``page_max - logsumexp(page_lse)`` of any query head of a group
            (``retrieval/reference.py``). Where ``page_max`` is not finite, ``page_lse`` must not be
            either, and where ``page_lse`` is -inf, ``page_max`` must be, too.
        """
        raise NotImplementedError

    @classmethod
    def learn(cls, kv_cache: Tensor, slots: Tensor, vectors: Tensor) -> None:
        """Update a layer's page vectors after the step's keys were written.

        Args:
            kv_cache: ``[num_blocks, H, P, 2 * D]`` contiguous, keys then values in the last axis.
            slots: ``[N]`` int64, negative for padding; a request's tokens side by side, in
                ascending order of position.
            vectors: ``[num_blocks, H, page_vectors, D]``, written.
        """
        raise NotImplementedError


@cache
def rule_names() -> tuple[str, ...]:
    """Names of all rules, those for benchmarks included."""
    return tuple(sorted(module.name for module in pkgutil.iter_modules(__path__)))


@cache
def find_rule(name: str) -> type[Rule]:
    """The rule of that name, loaded from its file.

    Raises:
        KeyError: there is none.
        TypeError: its file does not define exactly one rule.
    """
    if name not in rule_names():
        raise KeyError(name)
    module = import_module(f"{__name__}.{name}")
    found = [
        value
        for value in vars(module).values()
        if isinstance(value, type)
        and issubclass(value, Rule)
        and value.__module__ == module.__name__
    ]
    if len(found) != 1:
        raise TypeError(f"{module.__file__}: defines {len(found)} rules; a file defines one.")
    return found[0]


def listed_rules() -> list[str]:
    """Names of the rules that are offered to users."""
    return [name for name in rule_names() if not find_rule(name).for_benchmarks]


def make_rule(name: str, settings: Mapping[str, Any], device: torch.device) -> Rule:
    """A rule ready to score on ``device``; see ``Rule`` for ``settings``."""
    return find_rule(name)(settings, device)
