"""What a model's Hugging Face config says of its layers."""

from __future__ import annotations

from typing import Any


def has_windowed_layers(text: Any) -> bool:
    """Whether vLLM gives a layer of this text model a sliding window, by its own rule
    (vllm/engine/arg_utils.py and the models' layers).

    A window without a list of layer types holds for all layers; with one, for those of that type; a
    type without a window for none.
    """
    types = getattr(text, "layer_types", None)
    return bool(getattr(text, "sliding_window", None)) and (
        types is None or "sliding_attention" in types
    )


def num_full_layers(text: Any) -> int:
    """Layers of this text model that attend to the whole context: those our backend may run."""
    layers = int(text.num_hidden_layers)
    if not has_windowed_layers(text):
        return layers
    types = getattr(text, "layer_types", None)
    return 0 if types is None else layers - list(types).count("sliding_attention")
