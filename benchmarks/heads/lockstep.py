"""All variants in training at once: one pass of the teacher serves all that read the same text."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.collectors import Collectors
from benchmarks.heads.variants import Variant
from specontext_vllm.distillation.data import (
    Data,
    Documents,
    Sequences,
    batches,
    sample_positions,
    with_copies,
)
from specontext_vllm.distillation.head_shape import HeadShape
from specontext_vllm.distillation.head_trainer import HeadDistiller, stretch_positions
from specontext_vllm.distillation.losses import AttentionCollector, AttentionTarget, ByGroup
from specontext_vllm.distillation.page_loss import PageTarget, choosable_pages
from specontext_vllm.distillation.settings import Settings
from specontext_vllm.distillation.teacher import Lesson, Teacher
from specontext_vllm.retrieval.checkpoint import layer_groups

SIDE_BY_SIDE = 8
"""Second runs at a time; each needs keys and values of its own."""


@dataclass(frozen=True)
class Trained:
    """A variant in training."""

    variant: Variant
    run: HeadDistiller


def states_of(aux: Tensor, known: tuple[int, ...], wanted: tuple[int, ...]) -> Tensor:
    """The states of the ``wanted`` layers, of ``aux [B, T, known layers * Ht]``."""
    if known == wanted:
        return aux
    parts = aux.chunk(len(known), -1)
    return torch.cat([parts[known.index(layer)] for layer in wanted], -1)


class Classroom:
    """Variants that learn from the same batches.

    Args:
        model: the teacher's.
        layers: target layers whose states a variant reads, ascending.
    """

    def __init__(
        self, model: Any, layers: tuple[int, ...], pupils: Mapping[str, Trained], data: Data
    ) -> None:
        self.teacher, self.pupils = Teacher(model, layers), pupils
        settings = [pupil.run.settings for pupil in pupils.values()]
        self._loaders = settings[0].loaders
        self._positions = max(own.positions for own in settings)
        self._stretch = max(own.stretch for own in settings)
        self._aligned = next((p.run.settings for p in pupils.values() if p.variant.aligned), None)
        self._source = batches(data, 0, self._loaders)

    def step(self) -> dict[str, float]:
        """Train each on the next batch; their losses."""
        device = self.teacher.device
        ids, weights = (t.to(device, non_blocking=True) for t in next(self._source))
        generator = next(iter(self.pupils.values())).run.generator(device)
        at, _ = sample_positions(weights[:, 1:], self._positions, generator, answers_only=False)
        stretch = stretch_positions(ids, self._stretch, generator)
        watched = at if stretch is None else torch.cat([at, stretch], 1)
        collectors = Collectors(self._collectors())
        lesson = self.teacher(ids, watched, collectors, keep_cache=stretch is not None)
        results = self._results(collectors)
        lessons = {
            name: replace(
                lesson,
                aux=states_of(lesson.aux, self.teacher.aux_layers, pupil.run.head.aux_layers),
            )
            for name, pupil in self.pupils.items()
        }
        states = {} if stretch is None else self._decode(ids, lessons, stretch, generator)
        found = {}
        for name, pupil in self.pupils.items():
            # Positions are drawn one after the other, so that the first ones are a sample too.
            own = states.get(name)
            here = torch.arange(min(pupil.run.settings.positions, at.shape[1]), device=device)
            if own is not None:
                in_stretch = at.shape[1] + torch.arange(own.shape[1], device=device)
                here = torch.cat([here, in_stretch])
            own_at = watched[:, here]
            losses = pupil.run.learn(
                replace(lessons[name], **_target(results, pupil, own_at, here)),
                own_at,
                weights,
                generator,
                **({} if own is None else {"states": own}),
            )
            (found[name],) = losses.values()
        return found

    def _decode(
        self, ids: Tensor, lessons: dict[str, Lesson], stretch: Tensor, generator: torch.Generator
    ) -> dict[str, Tensor]:
        """The states of each variant's second run of the stretch. They run side by side, as so many
        sequences, since such short runs take as long for one as for several.
        """
        state = generator.get_state()
        chosen: dict[tuple[int, int], dict[str, Tensor]] = {}
        for name, lesson in lessons.items():
            run = self.pupils[name].run
            if run.settings.stretch:
                # All draw their budget alike, and as `specontext distill` does.
                generator.set_state(state)
                own = stretch[:, : run.settings.stretch]
                pages = run.stretch_pages(lesson, own, generator)
                alike = own.shape[1], run.head.groups
                chosen.setdefault(alike, {})[name] = pages
        first, found = int(stretch[0, 0]) + 1, {}
        cache = next(iter(lessons.values())).cache
        for group in chosen.values():
            names = list(group)
            for begin in range(0, len(names), SIDE_BY_SIDE):
                some = names[begin : begin + SIDE_BY_SIDE]
                states = self.teacher.decode(
                    ids.repeat(len(some), 1), cache, first, torch.cat([group[n] for n in some])
                )
                for name, part in zip(some, states.chunk(len(some)), strict=True):
                    layers = self.pupils[name].run.head.aux_layers
                    found[name] = states_of(part, self.teacher.aux_layers, layers)
        return found

    def _collectors(self) -> dict[str | int, AttentionCollector]:
        """Of pages by the number of groups of layers, and of tokens. One group of all layers
        follows from several.
        """
        layers, aligned = len(self.teacher.layers), self._aligned
        counts = {pupil.run.head.groups for pupil in self.pupils.values()}
        # Newest pages are left out for each variant by itself.
        found: dict[str | int, AttentionCollector] = {
            groups: ByGroup(layer_groups(layers, groups), lambda: PageTarget(0))
            for groups in sorted(counts - {1} or counts)
        }
        if aligned is not None:
            found["tokens"] = AttentionTarget(aligned.window, aligned.over_layers)
        return found

    def _results(self, collectors: Collectors[str | int]) -> dict[str | int, tuple[Tensor, Tensor]]:
        """What each has collected."""
        found = collectors.results()
        counts = [name for name in found if isinstance(name, int)]
        if counts and 1 not in counts:
            whole = found[counts[0]][0].unflatten(1, (counts[0], -1)).amax(1)
            found[1] = whole, whole.sum(-1)
        return found


def _target(
    results: dict[str | int, tuple[Tensor, Tensor]], pupil: Trained, at: Tensor, here: Tensor
) -> dict[str, Tensor]:
    """``target`` and ``mass`` of a lesson."""
    if pupil.variant.aligned:
        target, mass = (part[:, :, here] for part in results["tokens"])
        return {"target": target, "mass": mass}
    pages = results[pupil.run.head.groups][0][:, :, here]
    weights = pages * choosable_pages(at, pages.shape[-1], pupil.run.settings.recents)
    return {"target": weights, "mass": weights.sum(-1)}


def make_pupil(
    variant: Variant, model: Any, shape: HeadShape, plain: Settings, out: Path, accelerator: Any
) -> Trained:
    """A variant before its first step.

    Args:
        model: the teacher's.
        shape, plain: the default's.
    """
    config = model.config
    settings = variant.settings(plain, config)
    head = variant.head(shape, config, settings.seed)
    teacher = Teacher(model, head.aux_layers)
    return Trained(variant, variant.trainer(teacher, head, [], [], settings, out, accelerator))


def all_layers(pupils: Iterable[Trained]) -> tuple[int, ...]:
    """Target layers that any of them reads, ascending."""
    return tuple(sorted({layer for pupil in pupils for layer in pupil.run.head.aux_layers}))


def make_classrooms(
    model: Any, pupils: Mapping[str, Trained], documents: Documents, tokenizer: Any
) -> list[Classroom]:
    """One for each share of copies. Batches are numbered and seeded as in `specontext distill`."""
    shares: dict[float, dict[str, Trained]] = {}
    for name, pupil in pupils.items():
        shares.setdefault(pupil.run.settings.copies, {})[name] = pupil
    rooms = []
    for copies, group in shares.items():
        settings = next(iter(pupils.values())).run.settings
        own = with_copies(documents, copies, tokenizer)
        data = Sequences(own, settings.lengths, settings.batch_tokens, seed=settings.seed)
        rooms.append(Classroom(model, all_layers(group.values()), group, data))
    return rooms


def train(
    classrooms: list[Classroom], settings: Settings, points: int, tell: Callable[[str], None]
) -> Iterator[dict[str, float]]:
    """Train all to the end, and yield the last losses at ``points`` places of it, of which the end
    is the last one. Time that passes there does not count.
    """
    runs = [pupil.run for room in classrooms for pupil in room.pupils.values()]
    progress = runs[0].progress
    began, reached, told = time.monotonic(), 0, 0.0
    while reached < points:
        losses: dict[str, float] = {}
        for room in classrooms:
            losses |= room.step()
        seconds = time.monotonic() - began
        for run in runs:
            run.progress.seconds = seconds
        share = progress.share(settings)
        if seconds - told > 20:
            told = seconds
            tell(f"step {progress.step}, {100 * share:.0f} %, {seconds:.0f} s")
        if share >= (reached + 1) / points:
            # Short runs pass several at once.
            reached = min(points, max(reached + 1, int(share * points)))
            paused = time.monotonic()
            yield losses
            began += time.monotonic() - paused
