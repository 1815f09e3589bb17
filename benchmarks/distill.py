"""Case `distill`: memory and speed of `specontext distill`'s steps on a model of a given shape with
random weights.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import typer

from benchmarks import report
from benchmarks.children import ChildError, run_child
from benchmarks.machine import gpus
from benchmarks.shapes import Shape
from specontext_vllm.distillation.settings import Loss

MIN_LAYERS = 5
"""A head reads three different layers in the middle; the tiny shape gets one more than it has."""
ANSWER_SHARE = 0.1
PARTS = ("teacher", "draft", "optimizer")

TABLES = {
    "Steps": (
        report.Column("context", "sequence, tokens", ",d"),
        report.Column("loss", "loss"),
        report.Column("step_s", "step, s", ".3f"),
        report.Column("tokens_per_s", "tokens/s", ",.0f"),
        *(report.Column(part, f"{part}, GiB", ".2f") for part in PARTS),
        report.Column("peak", "peak, GiB", ".2f"),
        report.Column("reserved", "reserved, GiB", ".2f"),
    )
}


def measure(
    shape: Shape, context: int, loss: Loss, steps: int, budget: int, on_gpu: bool
) -> Iterator[tuple[str, Any]]:
    """Event ``("row", figures)``: some steps on random tokens, and one measurement of recall; runs
    in a child.
    """
    import torch
    from accelerate import Accelerator
    from transformers import AutoConfig, AutoModelForCausalLM

    from specontext_vllm.distillation.command import make_draft
    from specontext_vllm.distillation.data import ANSWER, TEXT
    from specontext_vllm.distillation.draft_trainer import DraftDistiller
    from specontext_vllm.distillation.options import make_settings
    from specontext_vllm.distillation.recall import HeldOut
    from specontext_vllm.distillation.teacher import (
        ATTENTION,
        Teacher,
        check_teacher,
        register_attention,
    )

    accelerator = Accelerator(mixed_precision="bf16" if on_gpu else "no")
    device = accelerator.device
    generator = torch.Generator().manual_seed(0)
    batches = []
    for _ in range(steps + 1):
        ids = torch.randint(0, shape.vocab_size, (1, context), generator=generator)
        weights = torch.where(
            torch.rand(1, context, generator=generator) < ANSWER_SHARE, ANSWER, TEXT
        )
        batches.append((ids, weights))

    def held() -> float:
        return torch.cuda.memory_allocated() / 2**30 if on_gpu else 0.0

    folder = Path(tempfile.mkdtemp(prefix="specontext-bench-"))
    layers = max(MIN_LAYERS, shape.num_hidden_layers)
    config = AutoConfig.from_pretrained(
        Shape(shape.name, {**shape.config, "num_hidden_layers": layers}).write(folder)
    )
    check_teacher(config)
    register_attention()
    sizes = [held()]
    with device:
        model = AutoModelForCausalLM.from_config(
            config, dtype=torch.bfloat16 if on_gpu else torch.float32, attn_implementation=ATTENTION
        )
    model.eval().requires_grad_(False)
    sizes.append(held())
    settings = make_settings(
        config,
        context=context,
        batch_tokens=None,
        hours=1.0,
        steps=steps,
        loss=loss,
        learning_rate=None,
        budget=budget,
        seed=0,
    )
    draft = make_draft(config, settings, None, None, batches)
    run = DraftDistiller(
        Teacher(model, draft.shape.aux_layers),
        draft,
        batches,
        batches,
        settings,
        folder,
        accelerator,
    )
    sizes.append(held())
    # The first step makes the optimizer's state and compiles what there is to compile.
    losses = [run.step(*(t.to(device) for t in batches[0]))]
    for optimizer in run.optimizers:
        optimizer.zero_grad(set_to_none=True)
    sizes.append(held())
    if on_gpu:
        torch.cuda.synchronize()
    begin = time.perf_counter()
    losses += [run.step(*(t.to(device) for t in batch)) for batch in batches[1:]]
    seconds = (time.perf_counter() - begin) / steps
    recall = HeldOut(run.teacher, batches[:1], settings.budget, settings.align_positions).recall(
        run.head
    )
    row: dict[str, Any] = {
        "context": context,
        "loss": loss,
        "step_s": seconds,
        "tokens_per_s": context / seconds,
        "losses": losses,
        "recall": recall.found,
        "draft_parameters": sum(p.numel() for p in draft.parameters()),
        "parameters": sum(p.numel() for p in model.parameters()),
    }
    if on_gpu:
        row |= dict(zip(PARTS, (b - a for a, b in zip(sizes, sizes[1:])), strict=True))
        row |= {
            "peak": torch.cuda.max_memory_allocated() / 2**30,
            "reserved": torch.cuda.max_memory_reserved() / 2**30,
        }
    yield "row", row


def main(
    model_shape: Annotated[
        str, typer.Option(help="8b, 1b, demo or tiny; the weights are random.")
    ] = "8b",
    contexts: Annotated[
        str, typer.Option(help="Comma-separated sequence lengths, tokens; one sequence is a step.")
    ] = "8192,32768",
    losses: Annotated[
        str, typer.Option(help="Comma-separated: both, draft, align.")
    ] = "both,align",
    steps: Annotated[int, typer.Option(help="Timed steps, after one that is not.", min=1)] = 5,
    limit_gib: Annotated[
        float, typer.Option(help="Peak memory that counts as a failure when it is passed.")
    ] = 80,
    seconds: Annotated[float, typer.Option(help="Time limit of each row.")] = 600,
    out: Annotated[Path, typer.Option(help="Folder of the result files.")] = report.RESULTS,
) -> None:
    """Peak memory and tokens per second of distillation steps. Exit code 1 if anything failed or
    took more than the limit.
    """
    try:
        shape = Shape.named(model_shape)
    except ValueError as error:
        typer.echo(str(error), err=True)
        raise typer.Exit(2) from None
    on_gpu = bool(gpus())
    result = report.Report(
        "distill", f"specontext distill, {model_shape} shape, random weights", TABLES
    )
    result.notes.append(
        f"One sequence of random tokens a step, mean of {steps} steps after a first one; 64 "
        "positions aligned and 512 drafted. Teacher: "
        "its weights; draft: float32 weights; optimizer: AdamW's two moments. Peak and reserved: "
        "torch's allocator, recall measured too."
    )
    log = Path(tempfile.mkdtemp(prefix="specontext-bench-")) / "distill.log"
    for context in map(int, contexts.split(",")):
        for loss in losses.split(","):
            try:
                for _, row in run_child(
                    measure,
                    shape,
                    context,
                    loss,
                    steps,
                    context // 2,
                    on_gpu,
                    log=log,
                    seconds=seconds,
                ):
                    result.rows.append(row)
                    if row.get("reserved", 0) > limit_gib:
                        result.failures[f"{context} tokens, {loss}"] = (
                            f"{row['reserved']:.1f} GiB reserved, more than {limit_gib:g}."
                        )
            except ChildError as error:
                result.failures[f"{context} tokens, {loss}"] = str(error)
            result.write(out)
    result.show()
    raise typer.Exit(1 if result.failures else 0)
