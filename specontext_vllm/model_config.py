"""What a model's Hugging Face config says of its layers."""

from __future__ import annotations

from typing import Any


def has_windowed_layers(text: Any) -> bool:
    """Whether vLLM gives a layer of this text model a sliding window or chunks, by its own rule
    (vllm/engine/arg_utils.py and the models' layers).

    A window without a list of layer types holds for all layers; with one, for those of that type; a
    type without a window for none.
    """
    types = getattr(text, "layer_types", None)
    if "chunked_attention" in (types or ()):
        return True
    return bool(getattr(text, "sliding_window", None)) and (
        types is None or "sliding_attention" in types
    )


OTHER_KINDS = {
    "sliding_attention",
    "chunked_attention",
    "linear_attention",
    "mamba",
    "conv",
    "recurrent",
    "mlp",
    "moe",
}
"""What configs call layers that do not attend to the whole context, or not at all."""


WINDOWED_KINDS = {"sliding_attention", "chunked_attention"}
"""Of these, what keeps the KV of the newest tokens."""

STATE_KINDS = {"linear_attention", "mamba", "conv", "recurrent", "hybrid"}
"""What keeps a state; "hybrid" beside the KV of the whole context."""


def layer_kinds(text: Any) -> list[str]:
    """What the config calls each layer of this text model; empty where it does not say."""
    # Jamba's, Bamba's and Nemotron-H's name for the same list.
    return getattr(text, "layer_types", None) or getattr(text, "layers_block_type", None) or []


def is_full(kind: str, text: Any) -> bool:
    """Whether a layer that the config calls this attends to the whole context."""
    others = OTHER_KINDS if has_windowed_layers(text) else OTHER_KINDS - {"sliding_attention"}
    return kind not in others


def has_state(kind: str) -> bool:
    """Whether a layer that a config calls this keeps a state."""
    return kind in STATE_KINDS


def kv_heads(text: Any, layer: int) -> tuple[int, int]:
    """KV heads of a layer of this text model, and their width."""
    each = getattr(text, "per_layer_config", None)
    own = each[layer] if each else text
    heads = text.num_attention_heads
    return (
        getattr(own, "num_key_value_heads", None) or heads,
        getattr(own, "head_dim", None) or text.hidden_size // heads,
    )


def num_full_layers(text: Any) -> int:
    """Layers of this text model that attend to the whole context: those our backend may run."""
    if not (kinds := layer_kinds(text)):
        return 0 if has_windowed_layers(text) else int(text.num_hidden_layers)
    return sum(is_full(kind, text) for kind in kinds)


def num_layers_with_kv(text: Any) -> int:
    """Layers of this text model that keep what they attend to: the last ones may read the KV of
    others.
    """
    return int(text.num_hidden_layers) - (getattr(text, "num_kv_shared_layers", None) or 0)


def num_kv_layers(text: Any) -> int:
    """Of the layers that attend to the whole context those that keep KV."""
    kinds = layer_kinds(text)[num_layers_with_kv(text) :]
    return num_full_layers(text) - sum(is_full(kind, text) for kind in kinds)
