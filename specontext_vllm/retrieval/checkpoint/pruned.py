"""Writes a head's checkpoint without what selection does not read: LM head, values, output
projection, FFN.
"""

from __future__ import annotations

import json
from pathlib import Path

from specontext_vllm.retrieval.checkpoint.config import PRUNED_ARCHITECTURE
from specontext_vllm.retrieval.checkpoint.errors import HeadError
from specontext_vllm.retrieval.checkpoint.spec import HeadCheckpoint
from specontext_vllm.retrieval.checkpoint.tensor_names import file_name


def write_pruned(checkpoint: HeadCheckpoint, folder: Path) -> None:
    """Writes the kept tensors, in their dtypes, and a config.json that is read as the same spec.

    The result serves as retrieval head only. It has an architecture that no engine knows and no
    model_type, because an engine that took it for a draft model would use uninitialised memory for
    the missing tensors.

    Raises:
        HeadError: the folder holds something already, or cannot be written.
    """
    from safetensors.torch import save

    spec = checkpoint.spec
    config = {
        "architectures": [PRUNED_ARCHITECTURE],
        "hidden_size": spec.hidden_size,
        "target_hidden_size": spec.target_hidden_size,
        "num_hidden_layers": 1,
        "num_attention_heads": spec.num_heads,
        "num_key_value_heads": spec.num_kv_heads,
        "head_dim": spec.head_dim,
        "rms_norm_eps": spec.rms_norm_eps,
        "rope_theta": spec.rope_theta,
        "rope_scaling": spec.rope_scaling,
        "max_position_embeddings": spec.trained_length,
        "vocab_size": spec.target_vocab_size,
        "norm_before_fc": spec.norm_before_fc,
        "fc_norm": spec.fc_norm,
        "eagle_aux_hidden_state_layer_ids": spec.aux_layer_ids,
    }
    tensors = {file_name(name): tensor.contiguous() for name, tensor in checkpoint.tensors.items()}
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if any(folder.iterdir()):
            raise HeadError(
                f"{folder} holds something already: give a new folder for the pruned head."
            )
        # The config comes last: a folder without one is not taken for a checkpoint.
        (folder / "model.safetensors").write_bytes(save(tensors, metadata={"format": "pt"}))
        (folder / "config.json").write_text(
            json.dumps({key: value for key, value in config.items() if value is not None}, indent=2)
            + "\n"
        )
    except OSError as error:
        raise HeadError(
            f"{folder} cannot be written ({type(error).__name__}: {error.strerror}): give another "
            "folder for the pruned head."
        ) from error
