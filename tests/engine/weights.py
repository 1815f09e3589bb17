"""Weights that take the demo model's place."""

from __future__ import annotations

from pathlib import Path

import torch

from tests.engine.conftest import DEMO_MODEL


def write_moved(folder: Path) -> torch.nn.Module:
    """The demo model with every weight a little moved, saved in ``folder``."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(str(DEMO_MODEL), dtype=torch.float32)
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for weight in model.parameters():
            weight += 0.3 * weight.std() * torch.randn(weight.shape, generator=generator)
    model.save_pretrained(folder)
    return model
