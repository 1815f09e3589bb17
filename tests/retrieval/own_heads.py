"""Heads in the format of our own with random weights, for tests."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from specontext_vllm.retrieval.checkpoint import HeadCheckpoint, HeadSpec
from specontext_vllm.retrieval.checkpoint.shapes import optional_shapes, required_shapes

SEED = 7

KINDS: dict[str, dict] = {
    "own": {},
    "previous": {"key_states": "previous"},
    "own-mlps": {"q_mlp": 12, "k_mlp": 20},
    "previous-mlps": {"key_states": "previous", "q_mlp": 12, "k_mlp": 20},
    "own-query-mlp": {"q_mlp": 7},
    "previous-key-mlp": {"key_states": "previous", "k_mlp": 7},
    "own-all-of-it": {"q_mlp": 9, "k_mlp": 5, "fc_norm": True, "qk_norm": True, "biases": True},
}
"""Changes to ``make_own``'s head that its kinds need."""


def make_own(*, biases: bool = False, seed: int = SEED, **changes) -> HeadCheckpoint:
    """A head of odd sizes; ``changes`` replace fields of its spec."""
    spec = HeadSpec(
        **{
            "format": "specontext",
            "hidden_size": 28,
            "target_hidden_size": 40,
            "embed_size": 40,
            "num_heads": 12,
            "num_kv_heads": 3,
            "head_dim": 10,
            "rms_norm_eps": 1e-5,
            "rope_theta": 5e4,
            "rope_scaling": None,
            "trained_length": 64,
            "aux_layer_ids": (0, 3, 4, 9),
            "num_aux": 4,
            "norm_before_fc": False,
            "fc_norm": False,
            "qk_norm": False,
            "dtype": torch.float32,
            "target_vocab_size": 77,
            "aux_layers_from": "aux_layer_ids",
            "key_states": "own",
        }
        | changes
    )
    generator = torch.Generator().manual_seed(seed)
    shapes = required_shapes(spec)
    if biases:
        given = optional_shapes(spec)
        shapes |= {name: given[name] for name in ("fc.bias", "q_proj.bias", "k_proj.bias")}

    def random(name: str, shape: tuple[int, ...]) -> Tensor:
        values = torch.randn(shape, generator=generator)
        # Outputs of the size of the inputs; MLPs have to weigh as much as what they add to.
        return 1 + 0.3 * values if "norm" in name else 2 * values / shape[-1] ** 0.5

    return HeadCheckpoint(
        spec=spec,
        tensors={name: random(name, shape).to(spec.dtype) for name, shape in shapes.items()},
        kept=[],
        pruned=[],
    )


def changed_tensor(
    name: str, value: Callable[[Tensor | None], Tensor | None]
) -> Callable[[Path], None]:
    """Replaces a stored tensor by what ``value`` makes of it; None takes it away."""

    def change(folder: Path) -> None:
        tensors = load_file(folder / "model.safetensors")
        changed = value(tensors.pop(name, None))
        if changed is not None:
            tensors[name] = changed.contiguous()
        save_file(tensors, folder / "model.safetensors")

    return change
