"""Train the bundled demo model and its retrieval head from scratch:
``python -m specontext_vllm.demo.train --out models/demo``.

A 5.7 M-parameter Llama (``--size larger``: 39 M; ``windows``: with a window of 128 tokens in every
second layer) learns to answer needle questions and to recite passages (synthetic/tasks.py) at 512
to 12,288 tokens. Then an EAGLE-3-shaped head learns to attend to what the frozen model attends to.
The clock ends every part: nine minutes in all on one H200.
``--size hybrid`` trains a Qwen3.5 of this width, with linear attention in three of four layers; its
head is `specontext distill`'s, and what both are worth is asked of an engine.
``--size smoke`` checks the script on a CPU, with tiny sizes and a useless result.
"""

from __future__ import annotations

import argparse
import math
import platform
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from specontext_vllm.demo.evaluate import evaluate
from specontext_vllm.demo.hybrid import Hybrid
from specontext_vllm.demo.log import Log
from specontext_vllm.demo.model import Model, check_equals_transformers, save_model
from specontext_vllm.demo.rows import batches, to_device
from specontext_vllm.demo.sizes import SIZES, Size
from specontext_vllm.demo.tokenizer import train_tokenizer
from specontext_vllm.distillation.draft import DraftModel
from specontext_vllm.distillation.losses import WINDOW, alignment_loss, attention_target, draft_loss
from specontext_vllm.distillation.settings import Settings
from specontext_vllm.distillation.shape import DraftShape
from specontext_vllm.distillation.steps_ahead import Pairs, draft_losses


class TrainingError(RuntimeError):
    """The training has come to nothing; the message is one sentence."""


NO_TIME = "the clock left no time for a step of the head; give the training more --minutes."


def draft_shape(size: Size, vocabulary: int) -> DraftShape:
    """The head that goes with a model of this size."""
    return DraftShape(
        hidden=size.hidden,
        heads=size.heads,
        kv_heads=size.kv_heads,
        head_dim=size.head_dim,
        ffn=size.draft_ffn,
        vocabulary=vocabulary,
        draft_vocabulary=vocabulary,
        rope_theta=size.theta,
        rope_scaling=None,
        eps=size.eps,
        max_position=size.max_position,
        aux_layers=size.aux_layers,
    )


def cosine(rate: float, step: int, warmup: int, progress: float) -> float:
    """Learning rate: linear warm-up, then a cosine down to a twentieth over ``progress`` 0..1."""
    return (
        rate
        * min(1.0, (step + 1) / warmup)
        * (0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * min(1.0, progress))))
    )


def train_model(
    model: Model | Hybrid, ids: dict[str, int], seconds: float, device: str, log: Log
) -> None:
    """Train at growing lengths; the clock ends each phase.

    Raises:
        TrainingError: the model has not learned to copy in the first phase, on a GPU.
    """
    size = model.size
    optimizer = torch.optim.AdamW(
        model.parameters(),
        lr=size.rate,
        betas=(0.9, 0.95),
        weight_decay=0.05,
        fused=device == "cuda",
    )
    if device == "cuda":
        # Layers share their code, so this compiles once.
        for block in model.blocks:
            block.compile()
    begun, steps, tokens, share = time.time(), 0, 0, 0.0
    for number, (batch, length, part, drills) in enumerate(size.phases):
        data = batches(ids, batch, length, seed=number + 1, workers=size.workers, drills=drills)
        share += part
        shown, shown_tokens, right = time.time(), tokens, 0.0
        while time.time() - begun < seconds * share:
            x, w = to_device(next(data), device)
            for group in optimizer.param_groups:
                group["lr"] = cosine(size.rate, steps, 200, (time.time() - begun) / seconds)
            with torch.autocast(
                device, torch.bfloat16, enabled=device == "cuda"
            ):  # emulated on most CPUs
                logits = model(x[:, :-1])
            loss = F.cross_entropy(
                logits.float().flatten(0, 1), x[:, 1:].flatten(), reduction="none"
            ).view(x.shape[0], -1)
            weights = w[:, 1:]
            loss = (loss * weights).sum() / weights.sum()
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            steps, tokens = steps + 1, tokens + x.numel()
            if time.time() - shown > 5:
                right = right_share(logits, x, w)
                rate = (tokens - shown_tokens) / (time.time() - shown)
                log(
                    f"model: {length} tokens, step {steps}, loss {loss.item():.3f}, right answer "
                    f"tokens {right:.4f} (teacher-forced), "
                    f"{rate / 1e6:.2f} M tokens/s, {tokens / 1e6:.0f} M in all"
                )
                shown, shown_tokens = time.time(), tokens
        log(f"model: end of {length} tokens after {steps} steps")
        if device == "cuda" and number == 0 and right < 0.9:
            raise TrainingError(
                f"the model did not learn to copy at {length} tokens ({right:.3f} of the answer "
                "tokens right); longer rows will not help."
            )
        del data


def right_share(logits: Tensor, ids: Tensor, weights: Tensor) -> float:
    """Share of the answer tokens that the model gives the largest logit."""
    return (logits.argmax(-1) == ids[:, 1:])[weights[:, 1:] > 0.5].float().mean().item()


def train_head(
    model: Model, draft: DraftModel, ids: dict[str, int], seconds: float, device: str, log: Log
) -> None:
    """Train the head with draft and alignment loss on the frozen model, at mixed lengths: the first
    draft at every token, those after it at sampled ones.

    Raises:
        TrainingError: there is no time for a single step.
    """
    size = model.size
    optimizer = torch.optim.AdamW(
        draft.parameters(), lr=size.head_rate, betas=(0.9, 0.95), fused=device == "cuda"
    )
    workers = max(1, size.workers // len(set(size.head_batches)))
    sources = {
        shape: batches(ids, *shape, seed=100 + i, workers=workers)
        for i, shape in enumerate(dict.fromkeys(size.head_batches))
    }
    begun, step, shown = time.time(), 0, time.time()
    while (passed := time.time() - begun) < seconds:
        x, w = to_device(next(sources[size.head_batches[step % len(size.head_batches)]]), device)
        for group in optimizer.param_groups:
            group["lr"] = cosine(size.head_rate, step, 100, passed / seconds)
        with torch.autocast(
            device, torch.bfloat16, enabled=device == "cuda"
        ):  # emulated on most CPUs
            layers = model.watch(x)
            teacher = model.head(layers.output)
            pairs = Pairs.of(draft, model.embed_tokens(x).detach(), layers.aux)
            fused, q, k, inputs = pairs.fused, pairs.q, pairs.k, pairs.inputs
            # Tokens whose successor is an answer token weigh most.
            drafted = torch.roll(w[:, 1:], -1, 1) + 0.02
            loss_draft = draft_loss(draft.logits(fused, q, k, inputs), teacher[:, 1:], drafted)
            chains = torch.multinomial(drafted, size.head_chains)
            how = (Settings.steps_ahead, size.head_chains)
            loss_ahead = draft_losses(draft, pairs, chains, w, layers.output, model.head, *how)[
                "ahead"
            ]
            hot = (drafted > 0.5).float() + 0.05 * (w[:, 1:] > 0).float() + 1e-4
            at = torch.multinomial(hot, size.head_queries)
            target, mass = attention_target(
                [t[:, :, 1:] for t in model.full(layers.queries)],
                [t[:, :, 1:] for t in model.full(layers.keys)],
                at,
                WINDOW,
            )
            loss_align = alignment_loss(q, k, at, target, mass, WINDOW)
        optimizer.zero_grad(set_to_none=True)
        (loss_draft + loss_ahead + size.align_weight * loss_align).backward()
        nn.utils.clip_grad_norm_(draft.parameters(), 1.0)
        optimizer.step()
        step += 1
        if time.time() - shown > 5:
            log(
                f"head: step {step}, draft loss {loss_draft.item():.3f}, of those ahead "
                f"{loss_ahead.item():.3f}, alignment loss "
                f"{loss_align.item():.3f}"
            )
            shown = time.time()
    if step == 0:
        raise TrainingError(NO_TIME)
    log(
        f"head: {step} steps, draft loss {loss_draft.item():.3f}, of those ahead "
        f"{loss_ahead.item():.3f}, alignment loss "
        f"{loss_align.item():.3f}"
    )


def train_hybrid(
    size: Size,
    vocabulary: int,
    ids: dict[str, int],
    seconds: float,
    device: str,
    out: Path,
    log: Log,
) -> None:
    """Train a hybrid until ``size.model_until`` of ``seconds`` of the log, and its head by
    `specontext distill` in the rest.

    Raises:
        TrainingError: see ``train_model``; or there is no time for the head.
    """
    from specontext_vllm.distillation.command import distill

    model = Hybrid(size, vocabulary, ids).to(device)
    log(f"model: {sum(p.numel() for p in model.parameters()) / 1e6:.2f} M parameters")
    train_model(model, ids, size.model_until * seconds - log.seconds, device, log)
    model.save(out)
    del model
    if (left := seconds - log.seconds) <= 0:
        raise TrainingError(NO_TIME)
    batch, context = size.head_batches[-1]
    distill(
        out,
        ["synthetic"],
        out / "retrieval_head",
        init=None,
        draft_vocabulary=None,
        context=context,
        batch_tokens=batch * context,
        hours=left / 3600,
        steps=None,
        loss=None,
        learning_rate=None,
        budget=size.eval_budgets[-1],
        seed=0,
    )
    log("done")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path("models/demo"))
    parser.add_argument(
        "--minutes", type=float, default=9.2, help="wall-clock minutes for everything"
    )
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--size", choices=SIZES, default="demo", help="smoke: tiny, to check the script"
    )
    args = parser.parse_args()

    size = SIZES[args.size]
    args.out.mkdir(parents=True, exist_ok=True)
    log = Log(args.out / "training_log.txt")
    torch.manual_seed(args.seed)
    torch.set_float32_matmul_precision("high")
    machine = (
        torch.cuda.get_device_name()
        if args.device == "cuda"
        else platform.processor() or platform.machine()
    )
    log(f"torch {torch.__version__} on {machine}, seed {args.seed}, {args.minutes} minutes, {size}")
    ids, vocabulary = train_tokenizer(args.out)
    total = args.minutes * 60
    if size.linear:
        train_hybrid(size, vocabulary, ids, total, args.device, args.out, log)
        return
    model = Model(size, vocabulary).to(args.device)
    log(
        f"model: {sum(p.numel() for p in model.parameters()) / 1e6:.2f} M parameters, vocabulary "
        f"{vocabulary}"
    )
    train_model(model, ids, size.model_until * total - log.seconds, args.device, log)
    save_model(model, vocabulary, ids, args.out)
    # From here on the weights are the ones that were saved.
    model.load_state_dict({k: v.to(torch.bfloat16).float() for k, v in model.state_dict().items()})
    model.requires_grad_(False)
    draft = DraftModel(draft_shape(size, vocabulary)).to(args.device)
    train_head(model, draft, ids, size.head_until * total - log.seconds, args.device, log)
    draft.save(args.out / "retrieval_head")
    draft.load_state_dict({k: v.to(torch.bfloat16).float() for k, v in draft.state_dict().items()})
    evaluate(model, draft, ids, total - 12, log)
    check_equals_transformers(model, args.out, log)
    log("done")


if __name__ == "__main__":
    try:
        main()
    except TrainingError as error:
        sys.exit(f"specontext_vllm.demo.train: {error}")
