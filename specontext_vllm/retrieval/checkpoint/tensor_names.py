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

_OWN_MODULES = (
    *("fc", "input_norm", "fc_norm", "embed_norm", "feature_norm", "embed_tokens"),
    *(f"{kind}_{part}" for kind in "qk" for part in ("proj", "norm", "mlp")),
)
"""First parts of the canonical names, which are those of our own format's files."""

_TOP_NAMES = ("fc.weight", "fc.bias", "input_norm.weight", "embed_tokens.weight")
REQUIRED = ("fc.weight", "embed_norm.weight", "q_proj.weight", "k_proj.weight")


def canonical_name(name: str, layout: str) -> str | None:
    """The name here of a checkpoint's tensor; None for one that selection does not read."""
    if layout == "specontext":
        return name if name.split(".")[0] in _OWN_MODULES else None
    name = name.removeprefix("model.")
    if name in _TOP_NAMES or (name.startswith("fc_norm.") and name.endswith(".weight")):
        return name
    for prefix in ("midlayer.", "layers.0."):
        if name.startswith(prefix):
            return LAYER_NAMES.get(name.removeprefix(prefix))
    return None
