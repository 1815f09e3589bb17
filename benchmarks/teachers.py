"""Models that the benchmarks run layer by layer themselves."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from specontext_vllm.distillation.teacher import TeacherError, read_config
from specontext_vllm.model_config import has_windowed_layers


def read_full_config(folder: Path) -> Any:
    """transformers' config of a model folder whose layers all attend to the whole context.

    Raises:
        TeacherError: as ``read_config``; or some have windows, which the benchmarks' own attention
            and their sums over all layers do not know.
    """
    config = read_config(folder)
    if has_windowed_layers(config):
        raise TeacherError(
            f"--model: {config.model_type} has layers that look back "
            f"{getattr(config, 'sliding_window', None)} tokens only, which this benchmark does not "
            "measure; give a model without sliding windows."
        )
    return config
