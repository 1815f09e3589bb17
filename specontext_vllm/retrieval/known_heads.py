"""The table of published EAGLE-3 heads by target model, `configs/known_heads.yaml`."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from importlib import resources
from importlib.resources.abc import Traversable
from pathlib import Path

import yaml


@dataclass(frozen=True)
class KnownHead:
    """A published head: its hub id, and the commit that the table pins it to, if it does."""

    head: str
    revision: str | None


def known_head(model_id: str) -> KnownHead | None:
    """The published EAGLE-3 head for a target model, or None.

    Args:
        model_id: the target's full hub id, in any case. For a local folder, pass its config's
            `_name_or_path`.
    """
    return _heads().get(model_id.lower())


@cache
def _heads() -> dict[str, KnownHead]:
    entries = yaml.safe_load(_configs().joinpath("known_heads.yaml").read_text())
    return {
        entry["target"].lower(): KnownHead(entry["head"], entry.get("revision"))
        for entry in entries
    }


def _configs() -> Traversable:
    try:
        return resources.files("specontext_vllm.configs")
    except ModuleNotFoundError:  # a source tree without the link: configs/ is beside the package
        return Path(__file__).parents[2] / "configs"
