"""The training loop behind `specontext distill`."""

from __future__ import annotations

import json
import math
import shutil
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from specontext_vllm.config import PAGE_SIZE
from specontext_vllm.distillation.data import ANSWER, Documents, Sequences, batches
from specontext_vllm.distillation.draft import DraftModel
from specontext_vllm.distillation.losses import AttentionTarget, alignment_loss, draft_loss
from specontext_vllm.distillation.recall import recall_at_budget
from specontext_vllm.distillation.teacher import Teacher

Loss = Literal["both", "draft", "align"]
WARMUP = 100
STATE = "state"


@dataclass(frozen=True)
class Settings:
    """How a head is trained.

    Attributes:
        context: longest sequence, tokens; a half and a quarter of it are trained on as well.
        batch_tokens: tokens of a step on each process.
        hours: of training in all, over resumed runs too.
        loss: what is minimised.
        learning_rate: peak, reached after ``WARMUP`` steps, then a cosine over the hours.
        draft_positions, align_positions: sampled tokens of a sequence that each loss looks at.
        window: newest tokens that alignment leaves out.
        align_weight: factor of the alignment loss.
        over_layers: "max" or "mean" over the teacher's layers.
        budget: tokens of the recall figure.
        report_seconds, save_seconds: how often to measure and to save.
        workers: processes that make batches.
        seed: of data and sampling.
    """

    context: int = 32768
    batch_tokens: int = 32768
    hours: float = 1.0
    loss: Loss = "both"
    learning_rate: float = 1e-3
    draft_positions: int = 512
    align_positions: int = 64
    window: int = 96
    align_weight: float = 1.0
    over_layers: str = "max"
    budget: int = 1024
    report_seconds: float = 30.0
    save_seconds: float = 300.0
    workers: int = 2
    seed: int = 0

    @property
    def lengths(self) -> list[int]:
        """Sequence lengths, taken in turn."""
        return [n for n in (self.context, self.context // 2, self.context // 4) if n >= 256] or [self.context]


@dataclass
class Progress:
    """Where a run stands; saved with its state."""

    step: int = 0
    tokens: int = 0
    seconds: float = 0.0


def rate_at(settings: Settings, step: int, passed: float) -> float:
    """Learning rate of a step when ``passed`` of the time is over: warm-up, then a cosine to a tenth."""
    decayed = 0.1 + 0.45 * (1 + math.cos(math.pi * min(1.0, passed)))
    return settings.learning_rate * min(1.0, (step + 1) / WARMUP) * decayed


def sample_positions(weights: Tensor, count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """``(at [B, S], weight [B, S])``: tokens to look at, those before an answer token far more often.

    Args:
        weights: ``[B, T]`` of the tokens themselves, token 0 left out.
    """
    # A token's pair drafts its successor, and its attention finds what the successor needs.
    following = torch.roll(weights, -1, 1)
    following[:, -1] = 0.0
    chance = (following >= ANSWER).float() + 0.02
    at = torch.multinomial(chance, min(count, weights.shape[1]), generator=generator)
    return at, following.gather(1, at).clamp(min=0.02)


class Distiller:
    """One head in training.

    Args:
        teacher: the target. draft: the head. documents, tokenizer: what it reads.
        settings: how. out: folder of the head, its curve and its state.
        accelerator: of accelerate; it has the device, the processes and the mixed precision.
    """

    def __init__(
        self, teacher: Teacher, draft: DraftModel, documents: Documents, tokenizer: Any, settings: Settings, out: Path, accelerator: Any
    ) -> None:  # fmt: skip
        self.teacher, self.settings, self.out, self.accelerator = teacher, settings, out, accelerator
        optimizer = torch.optim.AdamW(draft.parameters(), lr=settings.learning_rate, betas=(0.9, 0.95))
        self.draft, self.optimizer = accelerator.prepare(draft, optimizer)
        shard = {"shard": accelerator.process_index, "shards": accelerator.num_processes}
        self.data = Sequences(documents, tokenizer, settings.lengths, settings.batch_tokens, seed=settings.seed, **shard)
        self.held_out = Sequences(documents, tokenizer, settings.lengths[:1], settings.context, seed=settings.seed, held_out=True)
        self.progress = Progress()

    # -- one step -----------------------------------------------------------------------------------------------------

    def losses(self, ids: Tensor, weights: Tensor, generator: torch.Generator) -> dict[str, Tensor]:
        """The losses of a batch ``ids [B, T]``, ``weights [B, T]``."""
        settings, draft = self.settings, self.accelerator.unwrap_model(self.draft)
        at, _ = sample_positions(weights[:, 1:], settings.align_positions, generator)
        lesson = self.teacher(ids, at, AttentionTarget(settings.window, settings.over_layers))
        with self.accelerator.autocast():
            # The pair (token p+1, states p) stands at p+1; token 0 has none.
            positions = torch.arange(1, ids.shape[1], device=ids.device)
            fused, q, k, inputs = draft.queries_keys(lesson.embeds[:, 1:], lesson.aux[:, :-1], positions)
            found: dict[str, Tensor] = {}
            if settings.loss != "align":
                drafted, weight = sample_positions(weights[:, 1:], settings.draft_positions, generator)
                index = drafted[..., None]
                states = draft.states(fused, q, k, inputs)
                states = states.gather(1, index.expand(-1, -1, states.shape[-1]))
                hidden = lesson.hidden[:, 1:].gather(1, index.expand(-1, -1, lesson.hidden.shape[-1]))
                found["draft"] = draft_loss(draft.lm_head(states), self.teacher.logits(hidden, draft.draft_ids), weight)
            if settings.loss != "draft":
                found["align"] = alignment_loss(q, k, at, lesson.target, lesson.mass, settings.window)
        return found

    def step(self, ids: Tensor, weights: Tensor) -> dict[str, float]:
        """Train on one batch."""
        generator = torch.Generator(device=ids.device).manual_seed(self.settings.seed + 7919 * self.progress.step)
        passed = self.progress.seconds / (3600 * self.settings.hours)
        for group in self.optimizer.param_groups:
            group["lr"] = rate_at(self.settings, self.progress.step, passed)
        found = self.losses(ids, weights, generator)
        loss = sum(value * (self.settings.align_weight if name == "align" else 1.0) for name, value in found.items())
        self.optimizer.zero_grad(set_to_none=True)
        self.accelerator.backward(loss)
        self._share_gradients()
        nn.utils.clip_grad_norm_(self.draft.parameters(), 1.0)
        self.optimizer.step()
        self.progress.step += 1
        self.progress.tokens += ids.numel() * self.accelerator.num_processes
        return {name: float(value.detach()) for name, value in found.items()}

    def _share_gradients(self) -> None:
        # The losses call parts of the draft model, which DistributedDataParallel would not notice: its hooks sit in forward().
        if self.accelerator.num_processes > 1:
            for parameter in self.draft.parameters():
                if parameter.grad is not None:
                    parameter.grad = self.accelerator.reduce(parameter.grad, "mean")

    # -- figures --------------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def recall(self, count: int = 4) -> float | None:
        """Mean recall at the budget over held-out sequences; None where the budget holds the longest one whole."""
        settings, draft = self.settings, self.accelerator.unwrap_model(self.draft)
        if settings.budget >= settings.context:
            return None
        total = weight = 0.0
        for index in range(count):
            ids, weights = (t.to(self.teacher.device) for t in self.held_out[index])
            generator = torch.Generator(device=ids.device).manual_seed(index)
            at, _ = sample_positions(weights[:, 1:], settings.align_positions, generator)
            # Only tokens that the budget does not hold anyway ask for a choice.
            at = at.clamp(min=settings.budget)
            lesson = self.teacher(ids, at, AttentionTarget(settings.window, settings.over_layers))
            with self.accelerator.autocast():
                positions = torch.arange(1, ids.shape[1], device=ids.device)
                _, q, k, _ = draft.queries_keys(lesson.embeds[:, 1:], lesson.aux[:, :-1], positions)
            found = recall_at_budget(q, k, at, lesson.target, settings.budget // PAGE_SIZE)
            total += float((found * lesson.mass).sum())
            weight += float(lesson.mass.sum())
        return total / max(weight, 1e-9)

    # -- the run ----------------------------------------------------------------------------------------------------------

    def save(self) -> None:
        """Write the head, and the state that a later run goes on from."""
        self.accelerator.wait_for_everyone()
        # The new state stands beside the old one until it is whole, so that a kill at any moment leaves one to go on from.
        fresh = self.out / f"{STATE}.new"
        self.accelerator.save_state(str(fresh))
        if self.accelerator.is_main_process:
            (fresh / "progress.json").write_text(json.dumps(asdict(self.progress)))
            old = self.out / STATE
            shutil.rmtree(old, ignore_errors=True)
            fresh.rename(old)
            self.accelerator.unwrap_model(self.draft).save(self.out)
        self.accelerator.wait_for_everyone()

    def resume(self) -> bool:
        """Go on from a saved state, if there is one."""
        state = next((s for s in (self.out / STATE, self.out / f"{STATE}.new") if (s / "progress.json").is_file()), None)
        if state is None:
            return False
        self.accelerator.load_state(str(state))
        self.progress = Progress(**json.loads((state / "progress.json").read_text()))
        return True

    def run(self, tell: Any) -> None:
        """Train until the hours are over.

        Args:
            tell: called with a dict of figures every ``report_seconds``, at the begin and at the end.
        """
        settings, progress = self.settings, self.progress
        limit = 3600 * settings.hours
        source = batches(self.data, progress.step, settings.workers)
        self._report(tell, {})
        clock = reported = saved = time.monotonic()
        found: dict[str, float] = {}
        while not self._everyone(progress.seconds >= limit):
            ids, weights = (t.to(self.teacher.device, non_blocking=True) for t in next(source))
            found = self.step(ids, weights)
            now = time.monotonic()
            progress.seconds += now - clock
            clock = now
            if self._everyone(now - reported > settings.report_seconds):
                self._report(tell, found)
                reported = time.monotonic()
            if self._everyone(now - saved > settings.save_seconds):
                self.save()
                saved = time.monotonic()
            # Reports and saving are not training.
            clock = time.monotonic()
        self._report(tell, found)
        self.save()

    def _everyone(self, due: bool) -> bool:
        """What the first process says, so that all of them save and stop together."""
        if self.accelerator.num_processes == 1:
            return due
        return bool(self.accelerator.reduce(torch.tensor(float(due and self.accelerator.is_main_process), device=self.teacher.device), "sum"))

    def _report(self, tell: Any, found: dict[str, float]) -> None:
        if not self.accelerator.is_main_process:
            return
        progress = self.progress
        figures = {
            "step": progress.step, "tokens": progress.tokens, "seconds": round(progress.seconds, 1),
            "tokens_per_s": round(progress.tokens / progress.seconds) if progress.seconds else None,
            **{f"{name}_loss": round(value, 4) for name, value in found.items()}, "recall": self.recall(),
        }  # fmt: skip
        if self.teacher.device.type == "cuda":
            figures["peak_gib"] = round(torch.cuda.max_memory_allocated() / 2**30, 2)
        self.out.mkdir(parents=True, exist_ok=True)
        with (self.out / "training.jsonl").open("a") as file:
            file.write(json.dumps(figures) + "\n")
        tell(figures)

