"""Steps of a transformers model, and the scores that each step's pages get."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from benchmarks.marks.heads import HeadBeside, LastLook
from benchmarks.marks.paged_model import PagedModel
from specontext_vllm.retrieval.checkpoint import aux_layers_of
from specontext_vllm.retrieval.head import RetrievalHead

Choose = Callable[[Tensor, int], Tensor | None]
"""(scores ``[B, H, max_pages]``, position) -> the pages that the model reads; None: all."""


@dataclass(frozen=True)
class Course:
    """What the steps go through.

    Attributes:
        tokens: ``[B, T]``, of which those from ``start`` on are forced; without ``forced`` the
            model's own greedy ones take their places.
        start: tokens of the dense prompt.
    """

    tokens: Tensor
    start: int
    forced: bool


class LargestWeights:
    """The pages' scores from the model's own attention: the largest weight of any layer."""

    def __init__(self) -> None:
        self.scores = torch.empty(0)

    def watch(self, number: int, scores: Tensor, mass: Tensor) -> None:
        self.scores = scores if number == 0 else self.scores.maximum(scores)


@torch.inference_mode()
def run_steps(
    model: Any, head: RetrievalHead | None, course: Course, choose: Choose, last_look: bool = False
) -> Iterator[Tensor]:
    """Go through a course; yields the tokens ``[B]`` that follow each step.

    Args:
        head: gives the pages their scores, the same for all layers. None: the model's own attention
            does, with all pages in sight; then ``choose`` is asked behind the step, and its answer
            is not read.
        last_look: a page that the step before read also scores by what it got there.
    """
    tokens = course.tokens.clone()
    places: Sequence[int] = ()
    if head is not None:
        places = aux_layers_of(head.spec, model.config.num_hidden_layers)
    paged = PagedModel(model, len(tokens), tokens.shape[1], places)
    try:
        beside = None if head is None else HeadBeside(head, paged)
        for number, logits in enumerate(paged.prefill(tokens[:, : course.start])):
            if beside is not None:
                beside.learn_prompt(number, tokens[number, : course.start])
            if not course.forced:
                tokens[number, course.start] = logits.argmax()
        if beside is not None:
            beside.rewind()
        look = LastLook(beside.groups) if beside is not None and last_look else None
        for position in range(course.start, tokens.shape[1]):
            ids = tokens[:, position]
            if beside is None:
                own = LargestWeights()
                logits = paged.forward(ids[:, None], position, watch=own.watch)
                choose(own.scores[:, :, 0], position)
            else:
                scores = beside.scores(ids, position)
                (shared,) = scores if look is None else look.blend(scores)
                chosen = choose(shared, position)
                reads = None if chosen is None else [chosen[:, :, None]] * len(paged.layers)
                logits = paged.forward(
                    ids[:, None], position, reads, None if look is None else look.watch
                )
                beside.learn(ids, position)
            following = logits[:, -1].argmax(-1)
            if position + 1 < tokens.shape[1]:
                if course.forced:
                    following = tokens[:, position + 1]
                else:
                    tokens[:, position + 1] = following
            yield following
    finally:
        paged.close()
