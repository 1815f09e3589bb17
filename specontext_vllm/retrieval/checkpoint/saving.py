"""Writes a head in the format of our own: what selection reads of it, and nothing else.

An EAGLE-3 head fits into it too, without its LM head, values, output projection and FFN.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from specontext_vllm.retrieval.checkpoint.config import ARCHITECTURE
from specontext_vllm.retrieval.checkpoint.errors import HeadError
from specontext_vllm.retrieval.checkpoint.int8 import quantize
from specontext_vllm.retrieval.checkpoint.shapes import check_tensors
from specontext_vllm.retrieval.checkpoint.spec import HeadCheckpoint, HeadSpec
from specontext_vllm.retrieval.checkpoint.tensor_files import TensorInfo
from specontext_vllm.retrieval.checkpoint.whole_file import whole_file


def save_head(
    folder: Path,
    spec: HeadSpec,
    tensors: Mapping[str, Tensor],
    *,
    dtype: torch.dtype | None = torch.bfloat16,
) -> None:
    """Write model.safetensors and config.json, each whole or not at all, over those of an earlier
    save. ``read_checkpoint`` reads the same spec and tensors again, as format "specontext".

    The result serves as retrieval head only, and no engine takes it for a draft model.

    Args:
        folder: made if it does not exist.
        spec: of any format; its ``format``, ``dtype`` and ``aux_layers_from`` are not written.
        tensors: under the canonical names of ``HeadCheckpoint``, on any device.
        dtype: what they are stored in; None: each in its own; torch.int8: matrices in 8 bits with
            a scale for each row, the rest in bfloat16 (``int8.py``).

    Raises:
        HeadError: the tensors are not those of ``spec``.
        OSError: the folder cannot be written.
    """
    from safetensors.torch import save

    held = {name: tensor.detach().cpu() for name, tensor in tensors.items()}
    if dtype == torch.int8:
        held = quantize(held)
    elif dtype is not None:
        held = {name: tensor.to(dtype) for name, tensor in held.items()}
    infos = {name: TensorInfo(name, tuple(t.shape), t.dtype) for name, t in held.items()}
    check_tensors(replace(spec, format="specontext"), infos, folder)
    stored = {name: tensor.contiguous() for name, tensor in held.items()}
    folder.mkdir(parents=True, exist_ok=True)
    with whole_file(folder / "model.safetensors") as part:
        part.write_bytes(save(stored, metadata={"format": "pt"}))
    # The config comes last: a folder without one is not taken for a checkpoint.
    with whole_file(folder / "config.json") as part:
        part.write_text(json.dumps(_config(spec), indent=2) + "\n")


def prune_head(checkpoint: HeadCheckpoint, folder: Path, *, int8: bool = False) -> None:
    """Write what selection reads of a head, as it is stored, into a new folder.

    Args:
        int8: in 8 bits instead; see ``save_head``.
    Raises:
        HeadError: the folder holds something already, or cannot be written.
    """
    try:
        if folder.is_dir() and any(folder.iterdir()):
            raise HeadError(
                f"{folder} holds something already: give a new folder for the pruned head."
            )
        dtype = torch.int8 if int8 or checkpoint.is_int8 else None
        save_head(folder, checkpoint.spec, checkpoint.tensors, dtype=dtype)
    except OSError as error:
        raise HeadError(
            f"{folder} cannot be written ({type(error).__name__}: {error.strerror}): give another "
            "folder for the pruned head."
        ) from error


def _config(spec: HeadSpec) -> dict[str, object]:
    config = {
        "architectures": [ARCHITECTURE],
        "model_type": "specontext_head",
        "hidden_size": spec.hidden_size,
        "target_hidden_size": spec.target_hidden_size,
        "num_attention_heads": spec.num_heads,
        "num_key_value_heads": spec.num_kv_heads,
        "head_dim": spec.head_dim,
        "vocab_size": spec.target_vocab_size,
        "max_position_embeddings": spec.trained_length,
        "rope_theta": spec.rope_theta,
        "rope_scaling": spec.rope_scaling,
        "partial_rotary_factor": spec.partial_rotary_factor,
        "rms_norm_eps": spec.rms_norm_eps,
        "aux_layer_ids": spec.aux_layer_ids,
        "norm_before_fc": spec.norm_before_fc,
        "fc_norm": spec.fc_norm,
        "key_states": spec.key_states,
        "layer_groups": spec.layer_groups if spec.layer_groups > 1 else None,
    }
    return {key: value for key, value in config.items() if value is not None}
