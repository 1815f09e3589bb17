"""What `specontext plan` says of drafts: a drafter's memory, and from which length lossless mode
pays.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from specontext_vllm.config import PAGE_SIZE, ConfigError
from specontext_vllm.engine.draft_length import StepBytes, best_length, gain
from specontext_vllm.residency.memory_model import KVShape

ACCEPTANCES = (0.6, 0.7, 0.8, 0.9, 0.95)
"""Shares of drafts that are accepted where those before them were, for which a plan is made."""


@dataclass(frozen=True)
class Drafter:
    """A draft model of --speculative-config.

    Attributes:
        weight_bytes: of its files; what it shares with the target or the head is counted twice.
        layers, num_kv_heads, head_dim: of its KV.
    """

    weight_bytes: int
    layers: int
    num_kv_heads: int
    head_dim: int

    def page_bytes(self, itemsize: int) -> int:
        """KV of a page in all its layers; its elements are the target's."""
        return self.layers * self.num_kv_heads * PAGE_SIZE * 2 * self.head_dim * itemsize


def read_drafter(folder: Path) -> Drafter:
    """Read the folder of an EAGLE-3 head or of a draft model.

    Raises:
        ConfigError: it holds no config.json with the widths of attention, or no weights.
    """
    try:
        config = json.loads((folder / "config.json").read_text())
        # The format of the library `speculators` nests the layer's.
        config = config.get("transformer_layer_config") or config.get("text_config") or config
        heads = config["num_attention_heads"]
        dim = config.get("head_dim") or config["hidden_size"] // heads
        kv_heads = config.get("num_key_value_heads") or heads
        layers = config.get("num_hidden_layers", 1)
    except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
        raise ConfigError(
            f"--drafter: {folder}/config.json cannot be read as that of a draft model "
            f"({type(error).__name__}: {error}); give the folder of --speculative-config's model."
        ) from None
    files = [*folder.glob("*.safetensors")] or [*folder.glob("*.bin")]
    if not files:
        raise ConfigError(
            f"--drafter: {folder} holds no *.safetensors and no *.bin; download it in full."
        )
    return Drafter(sum(file.stat().st_size for file in files), layers, kv_heads, dim)


def step_bytes(kv: KVShape, weight_bytes: int, budget: int) -> StepBytes:
    """What the steps of a planned engine read."""
    return StepBytes(
        weights=weight_bytes,
        kv=kv.num_layers * kv.page_bytes / PAGE_SIZE,
        scores=kv.retriever_page_bytes / PAGE_SIZE,
        budget=budget,
    )


def lossless_gain(
    read: StepBytes, requests: int, length: int, acceptance: float
) -> tuple[int, float]:
    """How many tokens lossless mode drafts for equal requests, and its tokens per second in those
    of dense attention; 0 and 1.0 where it does not draft.
    """
    share = read.sparse_share([length] * requests)
    drafts = best_length(acceptance, share)
    return drafts, gain(drafts, acceptance, share)


def pays_from(read: StepBytes, requests: int, longest: int, acceptance: float) -> int | None:
    """The shortest context, in whole pages, from which on lossless mode drafts; None: it does not
    up to ``longest``.
    """

    def drafts(pages: int) -> bool:
        return lossless_gain(read, requests, pages * PAGE_SIZE, acceptance)[0] > 0

    # Beyond the budget a sparse step's share falls with the length.
    short, long = 0, longest // PAGE_SIZE
    if not drafts(long):
        return None
    while long - short > 1:
        middle = (short + long) // 2
        short, long = (short, middle) if drafts(middle) else (middle, long)
    return long * PAGE_SIZE


@dataclass(frozen=True)
class LosslessPlan:
    """Lossless mode under a load of equal requests.

    Attributes:
        lengths: contexts, in tokens.
        choices: at each acceptance, for each length, the drafts and the gain over dense attention.
        starts: at each acceptance the context from which it pays, or None.
    """

    lengths: Sequence[int]
    choices: dict[float, list[tuple[int, float]]]
    starts: dict[float, int | None]


def plan_lossless(read: StepBytes, requests: int, lengths: Sequence[int]) -> LosslessPlan:
    """Choices as the scheduler makes them (engine/draft_length.py).

    Args:
        lengths: ascending contexts; the last is the longest.
    """
    return LosslessPlan(
        lengths,
        {a: [lossless_gain(read, requests, n, a) for n in lengths] for a in ACCEPTANCES},
        {a: pays_from(read, requests, lengths[-1], a) for a in ACCEPTANCES},
    )
