"""Sizes that the demo model is trained in."""

from __future__ import annotations

from dataclasses import dataclass, replace


@dataclass(frozen=True)
class Size:
    """Shape of model and training.

    Attributes:
        window: tokens that every second layer reads, the first among them, as in gpt-oss; 0: all.
        linear: layers of linear attention before each one of full attention.
        phases: of the model's training: (batch, tokens, share of its time, share of drill rows).
        model_until, head_until: shares of all time at which the model's and the head's training
            end.
        head_queries, head_chains: positions of a row that the head is aligned at, and that several
            drafts in a row start from.
        align_weight: factor of the alignment loss; the draft loss has 1.
    """

    hidden: int = 256
    ffn: int = 640
    layers: int = 6
    heads: int = 4
    kv_heads: int = 2
    head_dim: int = 64
    window: int = 0
    linear: int = 0
    aux_layers: tuple[int, int, int] = (1, 3, 4)
    draft_ffn: int = 192
    theta: float = 500000.0
    eps: float = 1e-5
    max_position: int = 16384
    rate: float = 1.5e-3
    head_rate: float = 1.5e-3
    phases: tuple[tuple[int, int, float, float], ...] = (
        (256, 512, 0.46, 0.4),
        (64, 2048, 0.20, 0.1),
        (32, 4096, 0.13, 0.0),
        (16, 8192, 0.14, 0.0),
        (8, 12288, 0.07, 0.0),
    )
    head_batches: tuple[tuple[int, int], ...] = ((8, 4096), (4, 8192), (8, 4096), (2, 12288))
    head_queries: int = 48
    head_chains: int = 64
    model_until: float = 0.66
    head_until: float = 0.86
    align_weight: float = 1.0
    eval_lengths: tuple[int, ...] = (4096, 8192)
    eval_budgets: tuple[int, ...] = (256, 512)
    eval_problems: int = 16
    workers: int = 14

    def window_of(self, layer: int) -> int:
        """Tokens that a layer reads; 0: all."""
        return 0 if layer % 2 else self.window

    def is_full(self, layer: int) -> bool:
        """Whether a layer is not one of linear attention."""
        return layer % (self.linear + 1) == self.linear


LARGER = Size(
    hidden=512,
    ffn=1408,
    layers=12,
    heads=8,
    kv_heads=4,
    aux_layers=(2, 6, 9),
    draft_ffn=384,
    rate=8e-4,
    head_rate=8e-4,
    phases=(
        (128, 512, 0.46, 0.4),
        (32, 2048, 0.20, 0.1),
        (16, 4096, 0.13, 0.0),
        (8, 8192, 0.14, 0.0),
        (4, 12288, 0.07, 0.0),
    ),
    model_until=0.56,
    head_until=0.90,
    align_weight=3.0,
)
"""Seven times the demo's parameters, and half its batch, for as many steps in the same time. Its
head needs longer (docs/results/accuracy.md), so it gets a larger share of the time, and the
alignment weight that docs/results/distillation.md found best.
"""

SMOKE = Size(
    layers=5,
    phases=((8, 256, 0.6, 0.4), (4, 512, 0.4, 0.0)),
    head_batches=((2, 512), (1, 768)),
    head_queries=8,
    eval_lengths=(512,),
    eval_budgets=(128, 256),
    eval_problems=2,
    workers=2,
)

WINDOWS = replace(Size(), window=128)
"""The demo's, with windows in half of its layers."""

HYBRID = replace(Size(), layers=8, linear=3, model_until=0.75)
"""The demo's width, with linear attention in three of four layers, as in Qwen3.5. Its head is
distilled in the rest of the time.
"""

SIZES = {"demo": Size(), "larger": LARGER, "windows": WINDOWS, "hybrid": HYBRID, "smoke": SMOKE}
