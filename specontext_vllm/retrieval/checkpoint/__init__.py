"""Checkpoints of heads, EAGLE-3's and our own: where they are, what is read and written of them,
and what they serve.
"""

from specontext_vllm.retrieval.checkpoint.aux_layers import (
    aux_layers_of,
    default_aux_layers,
    describe_aux_layers,
)
from specontext_vllm.retrieval.checkpoint.config import read_config
from specontext_vllm.retrieval.checkpoint.dummy import dummy_checkpoint, random_checkpoint
from specontext_vllm.retrieval.checkpoint.errors import HeadError
from specontext_vllm.retrieval.checkpoint.fit import check_dtype, check_fits
from specontext_vllm.retrieval.checkpoint.hub import checkpoint_folder
from specontext_vllm.retrieval.checkpoint.layer_groups import layer_groups
from specontext_vllm.retrieval.checkpoint.reading import read_checkpoint
from specontext_vllm.retrieval.checkpoint.saving import prune_head, save_head
from specontext_vllm.retrieval.checkpoint.spec import HeadCheckpoint, HeadSpec, KeyStates
from specontext_vllm.retrieval.checkpoint.tensor_files import TensorInfo

__all__ = [
    "HeadCheckpoint",
    "HeadError",
    "HeadSpec",
    "KeyStates",
    "TensorInfo",
    "check_dtype",
    "check_fits",
    "default_aux_layers",
    "describe_aux_layers",
    "dummy_checkpoint",
    "layer_groups",
    "prune_head",
    "random_checkpoint",
    "read_checkpoint",
    "read_config",
    "save_head",
    "aux_layers_of",
    "checkpoint_folder",
]
