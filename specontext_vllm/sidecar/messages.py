"""What travels between an engine's worker and its sidecar. All tensors are on the CPU; every
message gets one reply.

N tokens and R rows of a step, the first B of them decode rows; H KV heads of the target; nkv, D of
the head; P tokens a page.
"""

from __future__ import annotations

import pickle
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import torch
from torch import Tensor

from specontext_vllm.config import HeadKeyDtype, SpeContextConfig, pages_for
from specontext_vllm.float8 import FP8
from specontext_vllm.retrieval.checkpoint import HeadCheckpoint

SEPARATE_BYTES = 1 << 18
"""Bytes from which a tensor travels as an array of its own, which Ray copies straight into a
channel's shared memory; strings of megabytes are slow.
"""

Wire = bytes | tuple[bytes, list[np.ndarray]] | None
"""A message on its way: one string, with the large tensors beside it; None for the reply None."""


def encode(message: Any) -> Wire:
    """The message, one of the classes below, as Ray's channels take it with the least work: its own
    pickling of a step's small tensors takes three times as long.
    """
    if message is None:
        return None
    large: list[np.ndarray] = []

    def stays(buffer: pickle.PickleBuffer) -> bool:
        with buffer.raw() as raw:
            if raw.nbytes < SEPARATE_BYTES:
                return True
        large.append(np.frombuffer(memoryview(buffer), np.uint8))
        return False

    values = [_pack(getattr(message, field.name)) for field in fields(message)]
    text = pickle.dumps((type(message), values), protocol=5, buffer_callback=stays)
    return (text, large) if large else text


def decode(wire: Wire) -> Any:
    """The message again. Its tensors are its own: what stayed in a channel would block the next
    message.
    """
    if wire is None:
        return None
    text, large = wire if isinstance(wire, tuple) else (wire, [])
    kind, values = pickle.loads(text, buffers=[array.copy() for array in large])
    return kind(*(_unpack(value) for value in values))


def _pack(value: Any) -> Any:
    if isinstance(value, Tensor):
        # NumPy has no bfloat16 and no 8-bit floats.
        plain = {torch.bfloat16: torch.int16, torch.float8_e4m3fn: torch.uint8}.get(value.dtype)
        array = np.ascontiguousarray((value if plain is None else value.view(plain)).numpy())
        return _Packed(
            (
                str(value.dtype).removeprefix("torch."),
                tuple(value.shape),
                pickle.PickleBuffer(array.data),
            )
        )
    return (
        [_pack(item) for item in value]
        if isinstance(value, list) and value and isinstance(value[0], Tensor)
        else value
    )


def _unpack(value: Any) -> Any:
    if isinstance(value, _Packed):
        name, shape, content = value
        dtype = getattr(torch, name)
        # torch makes no tensor of an empty buffer.
        return (
            torch.frombuffer(content, dtype=dtype).view(shape)
            if len(content)
            else torch.empty(shape, dtype=dtype)
        )
    return (
        [_unpack(item) for item in value]
        if isinstance(value, list) and value and isinstance(value[0], _Packed)
        else value
    )


class _Packed(tuple):
    """Name of a tensor's dtype, its shape, its bytes."""

    __slots__ = ()


@dataclass(frozen=True)
class SidecarSpec:
    """What an actor is started with.

    Attributes:
        config: the settings in force.
        checkpoint: the retrieval head.
        dtype: of the head's weights and fused aux, a torch dtype.
        head_key_dtype: what its keys are kept in, fp8 or model: the worker's mirror and every actor
            must agree.
        num_kv_heads: H.
        max_model_len: longest context, in tokens.
        max_rows: largest number of rows of a step.
        vocab_size, embed_size: shape of the target's embedding, which follows in ``Embeddings``; 0
            if the head brings its own.
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

    @property
    def max_pages(self) -> int:
        """Pages of the longest context."""
        return pages_for(self.max_model_len)

    @property
    def key_dtype(self) -> torch.dtype:
        """What ``head_key_dtype`` stands for."""
        return FP8 if self.head_key_dtype == "fp8" else self.dtype


@dataclass(frozen=True)
class Embeddings:
    """Rows of the target's embedding from ``first`` on: ``[n, E]``. Reply: None."""

    first: int
    rows: Tensor


@dataclass(frozen=True)
class Allocate:
    """Allocate ``num_blocks`` pages, all unknown. Reply: None."""

    num_blocks: int


@dataclass(frozen=True)
class Refill:
    """Content of the pages ``blocks [n]``: ``keys [n, nkv, P, D]`` and ``fused [n, H]``, as the
    last actor wrote them. Reply: None.
    """

    blocks: Tensor
    keys: Tensor
    fused: Tensor


@dataclass(frozen=True)
class Configure:
    """Other settings from the next step on. Reply: None."""

    config: SpeContextConfig


@dataclass(frozen=True)
class Select:
    """A step before its forward pass; see ``StepBatch``. Reply: ``Selected``.

    Attributes:
        changed, blocks: entries ``[n]`` int32 of the flattened ``[max_rows, W]`` block table that
            differ from the last step's, and what they are now.
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
    budgets: tuple[int | None, ...]


@dataclass(frozen=True)
class Selected:
    """What the step's decode rows read.

    Attributes:
        pages: ``[B * H, K]`` int32 ids ``block * H + head``; K as wide as the widest row of this
            step.
        lengths: ``[B * H]`` int32 tokens in them.
        counters: what the step adds to the retriever's ``Counters``, all places, float64.
    """

    pages: Tensor
    lengths: Tensor
    counters: Tensor


@dataclass(frozen=True)
class Learn:
    """The auxiliary hidden states ``[N, H_target]`` of the step last selected for, one tensor per
    layer. Reply: ``Learned``.
    """

    aux: list[Tensor]


@dataclass(frozen=True)
class Learned:
    """What the actor's caches gained, for the mirror.

    Attributes:
        keys: ``[N, nkv, D]`` of the step's tokens.
        fused: ``[n, H]`` of the step's pages, in ascending order of their ids.
    """

    keys: Tensor
    fused: Tensor
