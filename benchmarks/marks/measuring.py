"""What each selection costs, piece by piece."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from benchmarks.marks.heads import HeadBeside, Serving, forced
from benchmarks.marks.own_attention import Attention, OwnSelection, tokens_read
from benchmarks.marks.paged_model import PagedModel, token_log_probs
from specontext_vllm.config import PAGE_SIZE, SpeContextConfig
from specontext_vllm.retrieval.checkpoint import aux_layers_of
from specontext_vllm.retrieval.head import RetrievalHead
from specontext_vllm.retrieval.reference import Budget

DENSE = "dense attention"


@dataclass(frozen=True)
class Choosers:
    """Who chooses the pages: the model's own attention in these ways, and heads by name, each
    served in those.
    """

    own: Sequence[OwnSelection]
    heads: Mapping[str, RetrievalHead]
    servings: Sequence[Serving]


@dataclass(frozen=True)
class Size:
    """Tokens that a selection holds, and the newest of them that it always does, as the engine's
    settings of these names.
    """

    budget: int
    recent_tokens: int

    def check(self) -> None:
        """Raises:
        ConfigError: no room for a page to choose.
        """
        self._settings()

    @property
    def pages(self) -> Budget:
        """In pages."""
        return Budget.of(self._settings())

    def _settings(self) -> SpeContextConfig:
        return SpeContextConfig.from_settings(
            {"budget": self.budget, "recent_tokens": self.recent_tokens}
        )


@dataclass(frozen=True)
class Mark:
    """What one selection gave some pieces.

    Attributes:
        by: who chose.
        size: None for ``DENSE``.
        log_probs: of each piece, the mean over its scored tokens.
        read: tokens in the pages that a KV head read, mean.
    """

    by: str
    size: Size | None
    log_probs: list[float]
    read: float


def measure(
    model: Any,
    pieces: Tensor,
    forced_tokens: int,
    choosers: Choosers,
    sizes: Sequence[Size],
    go_on: Callable[[], bool] = lambda: True,
) -> Iterator[Mark]:
    """The marks of ``pieces [B, T]``, all at once; that of ``DENSE`` first.

    All but the last ``forced_tokens`` are a dense prompt. Those are forced: each is read with the
    chosen pages only, and the next one's log-probability counts.

    Args:
        go_on: asked before each mark.
    """
    length, start = pieces.shape[1], pieces.shape[1] - forced_tokens
    places = [
        place
        for head in choosers.heads.values()
        for place in aux_layers_of(head.spec, model.config.num_hidden_layers)
    ]
    paged = PagedModel(model, len(pieces), length, places)
    try:
        beside = {name: HeadBeside(head, paged) for name, head in choosers.heads.items()}
        for number, _ in enumerate(paged.prefill(pieces[:, :start])):
            for head in beside.values():
                head.learn_prompt(number, pieces[number, :start])
        ids = pieces[:, start:]
        positions = torch.arange(start, length - 1, device=pieces.device)

        def mark(by: str, size: Size | None, log_probs: Tensor, read: float) -> Mark:
            return Mark(by, size, log_probs.mean(-1).tolist(), read)

        def parallel(**options: Any) -> Tensor:
            return token_log_probs(paged.forward(ids[:, :-1], start, **options), ids[:, 1:])

        attention = Attention(len(paged.layers))
        dense = parallel(watch=attention.watch if choosers.own else None)
        yield mark(DENSE, None, dense, tokens_read([None], positions))
        dense_states = {name: head.fuse_states() for name, head in beside.items()}
        for size in sizes:
            for own in choosers.own:
                if not go_on():
                    return
                reads = own.reads(attention, positions, size.pages)
                yield mark(own.name, size, parallel(reads=reads), tokens_read(reads, positions))
        for size in sizes:
            for name, head in beside.items():
                for serving in choosers.servings:
                    if not go_on():
                        return
                    found = forced(paged, head, ids, start, size.pages, serving, dense_states[name])
                    read = PAGE_SIZE * float(
                        (positions // PAGE_SIZE + 1).clamp(max=size.pages.total).float().mean()
                    )
                    yield mark(f"{name}, {serving.name}", size, found, read)
    finally:
        paged.close()
