"""What travels between an engine's worker and its sidecar. All tensors are on the CPU; every message gets one reply.

N tokens and R rows of a step, the first B of them decode rows; H KV heads of the target; nkv, D of the head; P tokens a page.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from specontext_vllm.config import HeadKeyDtype, SpeContextConfig
from specontext_vllm.retrieval.checkpoint import HeadCheckpoint


class Message:
    """Pickles its tensors as NumPy arrays, which Ray copies straight into a channel's shared memory.

    Torch's own pickling copies them into a byte string first. Unpickling copies out of the channel: what stays in there blocks
    the next message.
    """

    def __getstate__(self) -> dict[str, Any]:
        return {name: _pack(value) for name, value in self.__dict__.items()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update({name: _unpack(value) for name, value in state.items()})


def _pack(value: Any) -> Any:
    if isinstance(value, Tensor):
        # NumPy has no bfloat16 and no 8-bit floats.
        plain = {torch.bfloat16: torch.int16, torch.float8_e4m3fn: torch.uint8}.get(value.dtype)
        return _Packed((value if plain is None else value.view(plain)).numpy(), value.dtype)
    return [_pack(item) for item in value] if isinstance(value, list) else value


def _unpack(value: Any) -> Any:
    if isinstance(value, _Packed):
        return torch.tensor(value.array).view(value.dtype)
    return [_unpack(item) for item in value] if isinstance(value, list) else value


@dataclass(frozen=True)
class _Packed:
    array: np.ndarray
    dtype: torch.dtype


@dataclass(frozen=True)
class SidecarSpec:
    """What an actor is started with.

    Attributes:
        config: the settings in force.
        checkpoint: the retrieval head.
        dtype: of the head's weights and fused aux, a torch dtype.
        head_key_dtype: what its keys are kept in, fp8 or model: the worker's mirror and every actor must agree.
        num_kv_heads: H.
        max_model_len: longest context, in tokens.
        max_rows: most rows of a step.
        vocab_size, embed_size: shape of the target's embedding, which follows in ``Embeddings``; 0 if the head brings its own.
    """

    config: SpeContextConfig
    checkpoint: HeadCheckpoint
    dtype: Any
    head_key_dtype: HeadKeyDtype
    num_kv_heads: int
    max_model_len: int
    max_rows: int
    vocab_size: int
    embed_size: int


@dataclass(frozen=True)
class Embeddings(Message):
    """Rows of the target's embedding from ``first`` on: ``[n, E]``. Reply: None."""

    first: int
    rows: Tensor


@dataclass(frozen=True)
class Allocate(Message):
    """Make room for ``num_blocks`` pages, all unknown. Reply: None."""

    num_blocks: int


@dataclass(frozen=True)
class Refill(Message):
    """Content of the pages ``blocks [n]``: ``keys [n, nkv, P, D]`` and ``fused [n, H]``, as the last actor wrote them. Reply: None."""

    blocks: Tensor
    keys: Tensor
    fused: Tensor


@dataclass(frozen=True)
class Configure(Message):
    """Other settings from the next step on. Reply: None."""

    config: SpeContextConfig


@dataclass(frozen=True)
class Select(Message):
    """A step before its forward pass; see ``StepBatch``. Reply: ``Selection``.

    Attributes:
        changed, blocks: entries ``[n]`` int32 of the flattened ``[max_rows, W]`` block table that differ from the last step's,
            and what they are now.
    """

    token_ids: Tensor
    positions: Tensor
    slots: Tensor
    query_starts: Tensor
    seq_lens: Tensor
    changed: Tensor
    blocks: Tensor
    seq_lens_bound: list[int]
    num_decodes: int


@dataclass(frozen=True)
class Selection(Message):
    """What the step's decode rows read.

    Attributes:
        pages: ``[B * H, K]`` int32 ids ``block * H + head``; K as wide as the widest row of this step.
        lengths: ``[B * H]`` int32 tokens in them.
        keys: ``[B, nkv, D]`` the keys that the decode rows' tokens got, for the mirror.
        counters: what the step adds to the retriever's ``Counters``, all places, float64.
    """

    pages: Tensor
    lengths: Tensor
    keys: Tensor
    counters: Tensor


@dataclass(frozen=True)
class Learn(Message):
    """The auxiliary hidden states ``[N, H_target]`` of the step last selected for, one tensor per layer. Reply: ``Learned``."""

    aux: list[Tensor]


@dataclass(frozen=True)
class Learned(Message):
    """What the actor's caches gained, for the mirror.

    Attributes:
        keys: ``[N - B, nkv, D]`` of the prefill rows' tokens.
        fused: ``[n, H]`` of the step's pages, in ascending order of their ids.
    """

    keys: Tensor
    fused: Tensor
