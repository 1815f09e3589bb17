"""Whether a head can serve a target model."""

from __future__ import annotations

import torch

from specontext_vllm.retrieval.checkpoint.aux_layers import aux_layers_of
from specontext_vllm.retrieval.checkpoint.errors import HeadError
from specontext_vllm.retrieval.checkpoint.spec import HeadCheckpoint, HeadSpec


def check_fits(
    spec: HeadSpec, *, target_hidden_size: int, num_layers: int, num_kv_heads: int, vocab_size: int
) -> None:
    """Checks that a head can choose KV pages for a target model.

    The head has as many KV heads as the target, or g times as many. Then target KV head j is scored
    by the element-wise maximum over the head's KV heads j*g .. j*g+g-1 and their query heads, the
    paper's rule for GQA. Fewer KV heads are refused, since several target heads would share one
    selection; a head with queries for groups of layers must have as many. The head dimension may
    differ: only the head's own scores depend on it.

    Args:
        target_hidden_size, num_layers, num_kv_heads, vocab_size: of the target, before any
            tensor-parallel split.

    Raises:
        HeadError: the head does not fit; the sentence says which width differs.
    """
    if spec.target_hidden_size != target_hidden_size:
        raise HeadError(
            f"The head's fc.weight reads {spec.num_aux} hidden states of width "
            f"{spec.target_hidden_size}, but the target's "
            f"hidden_size is {target_hidden_size}: use a head that was trained for this target."
        )
    if spec.embed_vocab_size is None and spec.embed_size != target_hidden_size:
        raise HeadError(
            f"The head takes token embeddings of width {spec.embed_size} and brings no "
            "embed_tokens.weight, but the "
            f"target's embeddings are {target_hidden_size} wide: use a head that brings its own "
            "embedding."
        )
    if spec.embed_vocab_size is not None and spec.embed_vocab_size < vocab_size:
        raise HeadError(
            f"The head's embed_tokens.weight has {spec.embed_vocab_size} rows, but the target's "
            f"vocab_size is {vocab_size}: "
            "use a head that was trained for this target."
        )
    if spec.target_vocab_size is not None and spec.target_vocab_size != vocab_size:
        raise HeadError(
            f"The head is for a vocabulary of {spec.target_vocab_size} tokens (its t2d map, LM "
            "head or config.json), but the target's "
            f"vocab_size is {vocab_size}: use a head that was trained for this target."
        )
    if spec.num_kv_heads % num_kv_heads:
        raise HeadError(
            f"The head has {spec.num_kv_heads} KV heads, which is neither the target's "
            f"{num_kv_heads} nor a multiple of it: "
            "use a head that was trained for this target."
        )
    if spec.layer_groups > num_layers:
        raise HeadError(
            f"The head has queries for {spec.layer_groups} groups of layers, but the target has "
            f"only {num_layers} layers: use a head that was trained for this target."
        )
    if spec.layer_groups > 1 and spec.num_kv_heads != num_kv_heads:
        raise HeadError(
            f"The head has queries for {spec.layer_groups} groups of layers and "
            f"{spec.num_kv_heads} KV heads, where such a head needs the target's {num_kv_heads}: "
            "use a head that was trained for this target."
        )
    aux_layers_of(spec, num_layers)


def check_dtype(checkpoint: HeadCheckpoint, dtype: torch.dtype) -> None:
    """Checks that a head's weights are finite in the dtype they are served in; the largest float16
    is 65504.

    Raises:
        HeadError: a weight is not.
    """
    largest = torch.finfo(dtype).max
    for name, tensor in checkpoint.tensors.items():
        if (
            torch.finfo(tensor.dtype).max > largest
            and (found := float(tensor.abs().max())) > largest
        ):
            raise HeadError(
                f"The head's {name} holds values up to {found:g}, which "
                f"{str(dtype).removeprefix('torch.')} cannot: serve with --dtype bfloat16 or "
                "float32."
            )
