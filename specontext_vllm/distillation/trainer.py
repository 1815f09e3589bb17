"""The training loop of `specontext distill`, whatever is trained."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor, nn

from specontext_vllm.distillation.data import Data, batches
from specontext_vllm.distillation.draft import DraftModel
from specontext_vllm.distillation.head_model import HeadModel
from specontext_vllm.distillation.recall import HeldOut
from specontext_vllm.distillation.settings import Progress, Settings, rate_at
from specontext_vllm.distillation.teacher import Lesson, Teacher
from specontext_vllm.retrieval.checkpoint.whole_file import whole_file

HELD_OUT_SEQUENCES = 4
HeadT = TypeVar("HeadT", DraftModel, HeadModel)


class Distiller(Generic[HeadT]):
    """One head or draft model in training; a subclass says what it learns from a batch.

    Args:
        teacher: the target.
        head: the same on every process.
        data: batches of this process.
        held_out: batches that recall is measured on.
        settings: how to train.
        out: folder of the head; the run's own files are in ``training/`` there.
        accelerator: of accelerate, with the device, the processes and the mixed precision.
    """

    def __init__(
        self,
        teacher: Teacher,
        head: HeadT,
        data: Data,
        held_out: Data,
        settings: Settings,
        out: Path,
        accelerator: Any,
    ) -> None:
        self.teacher, self.data = teacher, data
        self.held_out = HeldOut(
            teacher,
            (held_out[i] for i in range(HELD_OUT_SEQUENCES)),
            settings.budget,
            settings.align_positions,
            head.groups,
            drafts=isinstance(head, DraftModel) and settings.loss != "align",
        )
        self.settings, self.out, self.accelerator = settings, out, accelerator
        # Not through accelerator.prepare(): the losses call parts of the draft model, and
        # DistributedDataParallel only hooks forward().
        self.head: HeadT = head.to(accelerator.device)
        self.optimizers = self.make_optimizers()
        self.progress = Progress()
        self._measured: int | None = None
        """Step of the last measurement."""

    def make_optimizers(self) -> list[torch.optim.Optimizer]:
        """Of all parameters that learn; the learning rate is set in each step."""
        rate = self.settings.learning_rate
        learning = [p for p in self.head.parameters() if p.requires_grad]
        return [torch.optim.AdamW(learning, lr=rate, betas=(0.9, 0.95))]

    @property
    def state_file(self) -> Path:
        return self.out / "training" / "state.pt"

    @property
    def curve_file(self) -> Path:
        return self.out / "training" / "curve.jsonl"

    def step(self, ids: Tensor, weights: Tensor) -> dict[str, float]:
        """Train on one batch ``ids [B, T]``, ``weights [B, T]``, and return its losses."""
        raise NotImplementedError

    def losses(
        self,
        lesson: Lesson,
        at: Tensor,
        weights: Tensor,
        generator: torch.Generator,
        **rest: Tensor,
    ) -> dict[str, Tensor]:
        """The losses of a batch that the teacher was watched on, at ``at [B, S]``."""
        raise NotImplementedError

    def generator(self, device: torch.device) -> torch.Generator:
        """The generator that samples the next step's positions."""
        return torch.Generator(device=device).manual_seed(
            self.settings.seed + 7919 * self.progress.step
        )

    def learn(
        self,
        lesson: Lesson,
        at: Tensor,
        weights: Tensor,
        generator: torch.Generator,
        **rest: Tensor,
    ) -> dict[str, float]:
        """Train on one batch that the teacher has seen and was watched on, at ``at [B, S]``; the
        rest is for ``losses``.
        """
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = rate_at(self.settings, self.progress)
        found = self.losses(lesson, at, weights, generator, **rest)
        weight = {"align": self.settings.align_weight}
        loss = sum(value * weight.get(name, 1.0) for name, value in found.items())
        for optimizer in self.optimizers:
            optimizer.zero_grad(set_to_none=True)
        self.accelerator.backward(loss)
        self._share_gradients()
        nn.utils.clip_grad_norm_(self.head.parameters(), 1.0)
        for optimizer in self.optimizers:
            optimizer.step()
        self.progress.step += 1
        self.progress.tokens += weights.numel() * self.accelerator.num_processes
        return {name: float(value.detach()) for name, value in found.items()}

    def _share_gradients(self) -> None:
        if self.accelerator.num_processes > 1:
            for parameter in self.head.parameters():
                if parameter.grad is not None:
                    parameter.grad = self.accelerator.reduce(parameter.grad, "mean")

    def save(self) -> None:
        """Write the head, and the state that a later run resumes from."""
        if not self.accelerator.is_main_process:
            return
        self.state_file.parent.mkdir(parents=True, exist_ok=True)
        state = {
            "head": self.head.state_dict(),
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
            "progress": asdict(self.progress),
        }
        with whole_file(self.state_file) as part:
            torch.save(state, part)
        self.head.save(self.out)

    def resume(self) -> bool:
        """Load the saved state, if there is one, and drop what the curve has beyond it."""
        if not self.state_file.is_file():
            return False
        state = torch.load(self.state_file, map_location="cpu", weights_only=True)
        self.head.load_state_dict(state["head"])
        for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        self.progress = Progress(**state["progress"])
        if self.accelerator.is_main_process and self.curve_file.is_file():
            lines = [
                line
                for line in self.curve_file.read_text().splitlines(keepends=True)
                if line.endswith("\n")
            ]
            steps = {line: json.loads(line)["step"] for line in lines}
            kept = [line for line in lines if steps[line] <= self.progress.step]
            with whole_file(self.curve_file) as part:
                part.write_text("".join(kept))
            self._measured = max((steps[line] for line in kept), default=None)
        return True

    def run(self) -> Iterator[dict[str, Any]]:
        """Train to the end of the hours or steps, and save.

        Yields:
            The figures of each step. At the start, at the end and every ``report_seconds`` (or less
            often, see ``measuring_share``) they include those of the held-out sequences.
        """
        settings, progress = self.settings, self.progress
        source = batches(self.data, progress.step, settings.loaders)
        began = time.monotonic() - progress.seconds
        saved = progress.seconds
        due = progress.seconds + settings.report_seconds if progress.step else progress.seconds
        found: dict[str, float] = {}
        while True:
            progress.seconds = self._first_process(time.monotonic() - began)
            ended = progress.share(settings) >= 1
            if ended or progress.seconds - saved > settings.save_seconds:
                self.save()
                progress.seconds = saved = self._first_process(time.monotonic() - began)
            if ended or progress.seconds >= due:
                paused = time.monotonic()
                figures, cost = self._report(found)
                due = progress.seconds + max(
                    settings.report_seconds, self._first_process(cost) / settings.measuring_share
                )
                began += time.monotonic() - paused
                yield figures
            if ended:
                return
            found = self.step(*(t.to(self.teacher.device, non_blocking=True) for t in next(source)))
            yield self._figures(found)

    def _first_process(self, seconds: float) -> float:
        """The first process's clock: all processes save, stop and set their learning rate by it."""
        if self.accelerator.num_processes == 1:
            return seconds
        mine = torch.tensor(seconds * self.accelerator.is_main_process, device=self.teacher.device)
        return float(self.accelerator.reduce(mine, "sum"))

    def _figures(self, found: dict[str, float]) -> dict[str, Any]:
        progress = self.progress
        rate = (
            {"tokens_per_s": round(progress.tokens / progress.seconds)}
            if progress.tokens and progress.seconds
            else {}
        )
        return {
            "step": progress.step,
            "tokens": progress.tokens,
            "seconds": round(progress.seconds, 1),
            **rate,
            **{f"{name}_loss": round(value, 4) for name, value in found.items()},
        }

    def _report(self, found: dict[str, float]) -> tuple[dict[str, Any], float]:
        """Figures with the recall on held-out sequences, and the drafts accepted there, also
        written to the curve, and the seconds that this took; other processes wait.

        A step is measured once, even if a finished run is started again.
        """
        figures = self._figures(found)
        if not self.accelerator.is_main_process or self._measured == self.progress.step:
            return figures, 0.0
        self.held_out.prepare()
        began = time.monotonic()
        recall = self.held_out.recall(self.head)
        figures |= {
            "measured": True,
            "recall": round(recall.found, 4),
            "recall_best": round(recall.best, 4),
            "heaviest": round(recall.heaviest, 4),
        }
        if isinstance(self.head, DraftModel) and self.held_out.drafts:
            figures["accepted"] = [round(n, 3) for n in self.held_out.accepted(self.head)]
        if self.teacher.device.type == "cuda":
            figures["peak_gib"] = round(torch.cuda.max_memory_allocated() / 2**30, 2)
        self.curve_file.parent.mkdir(parents=True, exist_ok=True)
        with self.curve_file.open("a") as file:
            file.write(json.dumps(figures) + "\n")
        self._measured = self.progress.step
        return figures, time.monotonic() - began
