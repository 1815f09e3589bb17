"""Selections made from the model's own attention, which no head can see before the step: upper
marks.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from specontext_vllm.config import PAGE_SIZE
from specontext_vllm.retrieval.checkpoint import layer_groups
from specontext_vllm.retrieval.reference import Budget, chosen_pages

LayerScores = list[Tensor | None]
"""Of each layer the scores of its pages ``[B, H, S, pages]``; None: it reads all."""


class Attention:
    """Where the layers look in a dense pass, kept by ``watch``.

    Attributes:
        scores, mass: ``[L, B, H, S, pages]`` float32 of ``reference.page_scores``.
    """

    def __init__(self, layers: int) -> None:
        self._layers = layers
        self.scores = self.mass = torch.empty(0)

    def watch(self, number: int, scores: Tensor, mass: Tensor) -> None:
        if number == 0:
            self.scores, self.mass = (
                torch.empty(self._layers, *scores.shape, device=scores.device) for _ in range(2)
            )
        self.scores[number], self.mass[number] = scores, mass


@dataclass(frozen=True)
class OwnSelection:
    """Attributes:
    name: for people.
    score: the layers' scores, from what the layers look at.
    united: a token also reads what was chosen for the token before it.
    """

    name: str
    score: Callable[[Attention], LayerScores]
    united: bool = False

    def reads(self, attention: Attention, positions: Tensor, budget: Budget) -> list[Tensor | None]:
        """The pages that each layer reads, as ``PagedModel.forward`` takes them, for tokens at
        ``positions [S]``.
        """
        counts = (positions // PAGE_SIZE + 1)[:, None]
        # Layers that share scores share the selection.
        chosen: dict[int, Tensor] = {}
        found: list[Tensor | None] = []
        layers = self.score(attention)
        for scores in layers:
            if scores is None:
                found.append(None)
                continue
            if id(scores) not in chosen:
                pages = chosen_pages(scores, counts, budget)
                if self.united:
                    pages[:, :, 1:] |= pages[:, :, :-1].clone()
                chosen[id(scores)] = pages
            found.append(chosen[id(scores)])
        return found


def tokens_read(reads: list[Tensor | None], positions: Tensor) -> float:
    """Tokens in the pages that a KV head reads, mean over layers, heads and tokens."""
    everything = float((positions // PAGE_SIZE + 1).float().mean())
    pages = [
        everything if chosen is None else float(chosen.sum(-1).float().mean()) for chosen in reads
    ]
    return PAGE_SIZE * sum(pages) / len(pages)


def in_groups(number: int) -> Callable[[Attention], LayerScores]:
    """The layers in so many ``layer_groups`` (or each for itself, where there are fewer); each
    group by its maximum.
    """

    def score(attention: Attention) -> LayerScores:
        layers = len(attention.scores)
        groups = layer_groups(layers, min(number, layers))
        sizes = [groups.count(group) for group in range(groups[-1] + 1)]
        best = [part.amax(0) for part in attention.scores.split(sizes)]
        return [best[group] for group in groups]

    return score


def shared(score: Callable[[Attention], Tensor], dense: int = 0) -> Callable[..., LayerScores]:
    """One selection for all layers, but the first ``dense``, which read everything."""

    def scores(attention: Attention) -> LayerScores:
        return [None] * dense + [score(attention)] * (len(attention.scores) - dense)

    return scores


def _over_heads(attention: Attention) -> Tensor:
    scores = attention.scores.amax(0)
    return scores.amax(1, keepdim=True).expand_as(scores)


def _beyond(first: int) -> Callable[[Attention], Tensor]:
    return lambda attention: attention.scores[first:].amax(0)


_MAXIMUM = shared(lambda attention: attention.scores.amax(0))
OWN_SELECTIONS = {
    "max": OwnSelection("all layers one, maximum", _MAXIMUM),
    "mass": OwnSelection("all layers one, mass", shared(lambda a: a.mass.mean(0))),
    "square": OwnSelection(
        "all layers one, mean of squares", shared(lambda a: (2 * a.scores).exp().mean(0))
    ),
    **{
        f"groups-{n}": OwnSelection(f"{n} groups of layers, maximum", in_groups(n))
        for n in (2, 3, 5, 10)
    },
    "layer-max": OwnSelection("each layer its own, maximum", lambda a: list(a.scores)),
    "layer-mass": OwnSelection("each layer its own, mass", lambda a: list(a.mass)),
    "heads": OwnSelection("all layers and KV heads one, maximum", shared(_over_heads)),
    **{
        f"dense-{n}": OwnSelection(
            f"all but the first {n} one, maximum; those dense", shared(_beyond(n), n)
        )
        for n in (1, 2)
    },
    "united": OwnSelection("all layers one, maximum, and the last step's", _MAXIMUM, united=True),
}
"""By the name that `--selections` takes."""
