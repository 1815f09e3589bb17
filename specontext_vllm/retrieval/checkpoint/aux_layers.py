"""The target's layers whose hidden states a head reads."""

from __future__ import annotations

from collections.abc import Sequence

from specontext_vllm.retrieval.checkpoint.errors import HeadError
from specontext_vllm.retrieval.checkpoint.spec import HeadSpec


def default_aux_layers(num_layers: int) -> tuple[int, ...]:
    """EAGLE-3's layers where the checkpoint names none: (2, L//2, L-3), as in SafeAILab's code and
    vLLM.

    Raises:
        HeadError: the rule gives no three ascending layers (L < 7).
    """
    ids = (2, num_layers // 2, num_layers - 3)
    if not ids[0] < ids[1] < ids[2]:
        raise HeadError(
            f"The default auxiliary layers (2, L//2, L-3) are {ids} for a target of {num_layers} "
            "layers, which are not "
            "distinct and ascending: set eagle_aux_hidden_state_layer_ids in the head's "
            "config.json."
        )
    return ids


def aux_layers_of(spec: HeadSpec, num_layers: int) -> tuple[int, ...]:
    """The auxiliary layer ids of `spec` for a target of `num_layers` layers, checked against it.

    Raises:
        HeadError: an id beyond the target's layers, or no usable default.
    """
    ids = spec.aux_layer_ids if spec.aux_layer_ids is not None else default_aux_layers(num_layers)
    # num_layers itself, the last layer's output, is allowed: published heads use it.
    if ids[-1] > num_layers:
        raise HeadError(
            f"The head reads the target's layers {ids}, but the target has only {num_layers} "
            "layers: use a head that was "
            "trained for this target."
        )
    return ids


def describe_aux_layers(spec: HeadSpec, layers: Sequence[int] | None = None) -> str:
    """For people: the layers that a head reads, and which setting names them.

    Args:
        layers: of `aux_layers_of`, if the target is known.
    """
    named = spec.aux_layer_ids if layers is None else layers
    ids = "2, L//2, L-3 of the target's L layers" if named is None else ", ".join(map(str, named))
    return f"{ids} ({spec.aux_layers_from or 'default, its config.json names none'})"
