"""Figures of a policy's steps."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from benchmarks.selections.buffers import StepCounts

STRETCHES = 8
"""Parts of a run that misses are also given for."""


def figures(steps: Sequence[StepCounts]) -> dict[str, Any]:
    """Of all steps but the first, whose whole selection is missed: the share of the selection that
    was missed (mean, median, 90th percentile, by stretch of the run, by tenth of the context), the
    share of it that the step before had selected too, the same without sinks and recents, and where
    in the context selected pages lie.
    """
    selected = _stacked([step.selected for step in steps[1:]])
    missed = _stacked([step.missed for step in steps[1:]])
    kept, free, free_kept = (
        _stacked([getattr(step, name) for step in steps[1:]])
        for name in ("kept", "free", "free_kept")
    )
    return {
        **share_figures(missed.sum(1) / selected.sum(1)),
        "overlap": float(kept.sum() / selected.sum()),
        "free_overlap": float(free_kept.sum() / free.sum()) if free.sum() else None,
        "missed_by_place": _ratios(missed.sum(0), selected.sum(0)),
        "selected_by_place": _ratios(selected.sum(0), selected.sum()),
    }


def share_figures(shares: np.ndarray) -> dict[str, Any]:
    """Mean, median, 90th percentile and means by stretch of the steps' shares, and themselves."""
    parts = [part for part in np.array_split(shares, STRETCHES) if len(part)]
    return {
        "share": float(shares.mean()),
        "p50": float(np.median(shares)),
        "p90": float(np.percentile(shares, 90)),
        "by_stretch": [round(float(part.mean()), 4) for part in parts],
        "shares": np.round(shares, 4).tolist(),
    }


def repeated(tokens: np.ndarray, length: int = 8) -> float:
    """Share of the runs of ``length`` tokens in texts ``[B, N]`` that stood in the same text
    before: greedy text of a small model goes in circles.
    """
    shares = []
    for text in tokens.tolist():
        runs = [tuple(text[at : at + length]) for at in range(len(text) - length + 1)]
        shares.append(1 - len(set(runs)) / max(1, len(runs)))
    return float(np.mean(shares))


def _stacked(values: Sequence[torch.Tensor]) -> np.ndarray:
    return torch.stack(list(values)).cpu().double().numpy()


def _ratios(part: np.ndarray, whole: np.ndarray) -> list[float]:
    return np.round(np.divide(part, whole, out=np.zeros_like(part), where=whole > 0), 4).tolist()
