"""Names of a head's tensors: in the published layouts, and here."""

from __future__ import annotations

LAYER_NAMES = {
    "input_layernorm.weight": "embed_norm.weight",
    "hidden_norm.weight": "feature_norm.weight",
    "self_attn.q_proj.weight": "q_proj.weight",
    "self_attn.q_proj.bias": "q_proj.bias",
    "self_attn.k_proj.weight": "k_proj.weight",
    "self_attn.k_proj.bias": "k_proj.bias",
    "self_attn.q_norm.weight": "q_norm.weight",
    "self_attn.k_norm.weight": "k_norm.weight",
}

_TOP_NAMES = ("fc.weight", "fc.bias", "input_norm.weight", "embed_tokens.weight")
REQUIRED = ("fc.weight", "embed_norm.weight", "q_proj.weight", "k_proj.weight")


def file_name(canonical: str) -> str:
    """The name of a kept tensor in SafeAILab's layout."""
    layer = {ours: theirs for theirs, ours in LAYER_NAMES.items()}
    return f"midlayer.{layer[canonical]}" if canonical in layer else canonical


def canonical_name(name: str) -> str | None:
    name = name.removeprefix("model.")
    if name in _TOP_NAMES or (name.startswith("fc_norm.") and name.endswith(".weight")):
        return name
    for prefix in ("midlayer.", "layers.0."):
        if name.startswith(prefix):
            return LAYER_NAMES.get(name.removeprefix(prefix))
    return None
