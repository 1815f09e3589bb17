"""Accuracy of the trained model on held-out problems, dense and sparse."""

from __future__ import annotations

import numpy as np
import torch

from specontext_vllm.demo.decoder import Decoder
from specontext_vllm.demo.log import Log
from specontext_vllm.demo.model import Model
from specontext_vllm.distillation.draft import DraftModel
from specontext_vllm.synthetic import tasks


def evaluate(
    model: Model, draft: DraftModel, ids: dict[str, int], deadline: float, log: Log
) -> None:
    """Log scores on needle and recitation problems in every layout; stop at ``deadline`` seconds of
    the log.
    """
    size = model.size
    text_of = {v: k for k, v in ids.items()}
    decoder = Decoder(model, draft)
    generator = torch.Generator(device=model.norm.device).manual_seed(0)
    columns = [
        ("dense", 0),
        *[("dlm", b) for b in size.eval_budgets],
        ("recent", size.eval_budgets[-1]),
        ("random", size.eval_budgets[-1]),
    ]
    for length in size.eval_lengths:
        for kind in ("needle", "recitation"):
            results: dict[tuple[str, int], list[float]] = {c: [] for c in columns}
            layouts: dict[str, list[float]] = {}
            for seed in range(
                size.eval_problems if kind == "needle" else max(2, size.eval_problems // 2)
            ):
                if log.seconds > deadline:
                    break
                problem = tasks.make_problem(kind, seed=seed, approx_tokens=length)
                roles = [
                    (("text" if problem.layout == "plain" else m["role"]), m["content"])
                    for m in problem.messages
                ]
                stretches = [text for text, _ in tasks.render(roles)]
                if problem.layout != "plain":
                    stretches.append(tasks.ASSISTANT)
                prompt = [ids[p] for text in stretches for p in tasks.pieces(text)]
                state = decoder.prefill(prompt)
                for method, budget in columns:
                    limit = 20 if kind == "needle" else 96
                    reply = decoder.decode(state, method, budget, limit, ids[tasks.END], generator)
                    value = tasks.score(
                        problem, "".join(text_of.get(t, "?") for t in reply if t != ids[tasks.END])
                    )
                    results[method, budget].append(value)
                    if method == "dense":
                        layouts.setdefault(problem.layout, []).append(value)
            row = "  ".join(
                f"{m}{f'@{b}' if b else ''} {np.mean(v):.3f}" for (m, b), v in results.items() if v
            )
            log(f"eval {kind} at {length} tokens ({len(results[columns[0]])} problems): {row}")
            log(
                "     dense by layout: "
                + "  ".join(f"{k} {np.mean(v):.2f}" for k, v in layouts.items())
            )
