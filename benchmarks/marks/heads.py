"""A retrieval head beside the model, token by token as the engine runs it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.marks.paged_model import PagedModel, token_log_probs
from specontext_vllm.config import PAGE_SIZE
from specontext_vllm.retrieval.checkpoint import aux_layers_of, layer_groups, read_checkpoint
from specontext_vllm.retrieval.head import RetrievalHead, check_head
from specontext_vllm.retrieval.reference import (
    Budget,
    chosen_pages,
    grouped_logits,
    page_scores,
    reduce_to_pages,
)


@dataclass(frozen=True)
class Serving:
    """How a head is run.

    Attributes:
        own_states: it reads the aux states of the sparse run, as in the engine; else those of the
            dense run.
        last_look: a page that the step before read also scores by the largest weight that any
            layer gave it there.
    """

    own_states: bool
    last_look: bool

    @property
    def name(self) -> str:
        states = "its own states" if self.own_states else "the dense run's states"
        return states + (", last look" if self.last_look else "")


SERVINGS = {
    "dense": Serving(False, False),
    "own": Serving(True, False),
    "dense-look": Serving(False, True),
    "own-look": Serving(True, True),
}
"""By the name that `--servings` takes."""


def load_head(folder: Path, model: Any, length: int) -> RetrievalHead:
    """The head in a folder, for texts of ``length`` tokens of ``model``, in its dtype.

    Raises:
        HeadError: it cannot be read or does not fit the model.
    """
    checkpoint, config = read_checkpoint(folder), model.config
    check_head(
        checkpoint,
        target={
            "target_hidden_size": config.hidden_size,
            "num_layers": config.num_hidden_layers,
            "num_kv_heads": getattr(config, "num_key_value_heads", None)
            or config.num_attention_heads,
            "vocab_size": config.vocab_size,
        },
        max_position=length,
        dtype=model.dtype,
    )
    return RetrievalHead(checkpoint, max_position=length, dtype=model.dtype, device=model.device)


class HeadBeside:
    """A head and its keys of the texts that a ``PagedModel`` holds.

    Attributes:
        places: the layers that it reads, of ``aux_layers_of``; the model keeps their states.
        groups: of each of the model's layers, the group whose selection it reads.

    B texts, G groups of layers, H the model's KV heads, K the head's fused width.
    """

    def __init__(self, head: RetrievalHead, model: PagedModel) -> None:
        self.head, self.model = head, model
        self.places = aux_layers_of(head.spec, len(model.layers))
        self.groups = layer_groups(len(model.layers), head.spec.layer_groups)
        self.keys_follow = head.spec.key_states == "own"
        spec, options = head.spec, {"dtype": model.model.dtype, "device": model.device}
        self._keys = torch.zeros(
            model.pieces, spec.num_kv_heads, model.length, spec.head_dim, **options
        )
        self._prompt_end = torch.zeros(model.pieces, spec.hidden_size, **options)
        self._last = self._prompt_end

    @torch.inference_mode()
    def learn_prompt(self, number: int, ids: Tensor) -> None:
        """The keys of text ``number``, of whose tokens ``ids [n]`` the model has just made KV."""
        fused = self.fuse_states()[0]
        place = torch.arange(1, len(ids), device=ids.device)
        keys = self._make_keys(ids[1:], fused[:-1], place, fused[1:])
        self._keys[number, :, 1 : len(ids)] = keys.transpose(0, 1)
        self._prompt_end[number] = fused[-1]

    def rewind(self) -> None:
        """Stand behind the prompts again."""
        self._last = self._prompt_end

    @torch.inference_mode()
    def scores(self, ids: Tensor, position: int) -> Tensor:
        """The pages' scores ``[G, B, H, pages]`` for the tokens ``ids [B]`` at ``position``."""
        place = torch.full_like(ids, position)
        query = self.head.queries(self._embed(ids), self._last, place)
        # A key that is made from the token's own states does not exist yet.
        newest = position - 1 if self.keys_follow else position
        if not self.keys_follow:
            self._keys[: len(ids), :, position] = self._make_keys(ids, self._last, place, None)
        logits = grouped_logits(query[:, :, None], self._keys[: len(ids)]).squeeze(2)
        # Token 0 has no pair.
        token = torch.arange(self.model.length, device=ids.device)
        logits.masked_fill_((token > newest) | (token == 0), float("-inf"))
        # Several KV heads of the head may stand for one of the model's, if it has no groups.
        by_target = logits.unflatten(1, (self.model.kv_heads, -1)).flatten(2, 3)
        by_group = by_target.unflatten(2, (self.head.spec.layer_groups, -1))
        return page_scores(*reduce_to_pages(by_group, PAGE_SIZE))[0].movedim(2, 0)

    @torch.inference_mode()
    def learn(self, ids: Tensor, position: int, fused: Tensor | None = None) -> None:
        """Take the states of the model's latest pass over the tokens ``ids [B]`` at ``position``,
        or what was fused of others (``[B, K]``), for the next step.
        """
        own = self.fuse_states()[:, -1] if fused is None else fused
        if self.keys_follow:
            place = torch.full_like(ids, position)
            self._keys[: len(ids), :, position] = self._make_keys(ids, self._last, place, own)
        self._last = own

    @torch.inference_mode()
    def fuse_states(self) -> Tensor:
        """Fused states ``[B, S, K]`` of the model's latest pass."""
        states = [self.model.states[place] for place in self.places]
        return self.head.fuse([part.flatten(0, 1) for part in states]).unflatten(
            0, states[0].shape[:2]
        )

    def _make_keys(
        self, ids: Tensor, previous: Tensor, positions: Tensor, own: Tensor | None
    ) -> Tensor:
        return self.head.keys(
            self._embed(ids), previous, positions, own if self.keys_follow else None
        )

    def _embed(self, ids: Tensor) -> Tensor:
        return self.model.embed(ids) if self.head.embed_tokens is None else self.head.embed(ids)


class LastLook:
    """The largest weight that any layer of a group gave each page in the latest step, as a score.

    Args:
        groups: of ``HeadBeside``.
    """

    def __init__(self, groups: Sequence[int]) -> None:
        self._groups = groups
        self._now: dict[int, Tensor] = {}

    def watch(self, number: int, scores: Tensor, mass: Tensor) -> None:
        """See ``paged_model.Watch``; a page that was not read has no score."""
        if number == 0:
            self._now = {}
        group = self._groups[number]
        known = self._now.get(group)
        self._now[group] = scores if known is None else known.maximum(scores)

    def blend(self, scores: Tensor) -> Tensor:
        """The larger of a page's ``scores [G, B, H, pages]`` and of what was seen of it."""
        if not self._now:
            return scores
        seen = torch.stack([self._now[group][:, :, 0] for group in range(len(scores))])
        return scores.maximum(seen)


def forced(
    model: PagedModel,
    beside: HeadBeside,
    ids: Tensor,
    start: int,
    budget: Budget,
    serving: Serving,
    dense_states: Tensor,
) -> Tensor:
    """Log-probability ``[B, S - 1]`` of tokens 1 to S of ``ids [B, S]``, which stand from ``start``
    on, each read after a step whose pages the head chose.

    Args:
        dense_states: ``[B, S - 1, K]`` fused states of the dense run.
    """
    beside.rewind()
    look = LastLook(beside.groups) if serving.last_look else None
    found = []
    for step in range(ids.shape[1] - 1):
        position = start + step
        scores = beside.scores(ids[:, step], position)
        if look is not None:
            scores = look.blend(scores)
        chosen = chosen_pages(scores, position // PAGE_SIZE + 1, budget)[:, :, :, None]
        logits = model.forward(
            ids[:, step : step + 1],
            position,
            [chosen[group] for group in beside.groups],
            None if look is None else look.watch,
        )
        found.append(token_log_probs(logits, ids[:, step + 1 : step + 2]))
        beside.learn(ids[:, step], position, None if serving.own_states else dense_states[:, step])
    return torch.cat(found, 1)
