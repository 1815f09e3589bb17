"""Tensors of a checkpoint folder, listed by name and shape; their data is read on demand."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path, PurePath
from typing import Any

import torch
from torch import Tensor

from specontext_vllm.retrieval.checkpoint.errors import HeadError
from specontext_vllm.retrieval.checkpoint.int8 import SCALE

_SAFETENSORS_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "BOOL": torch.bool,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
}


@dataclass(frozen=True)
class TensorInfo:
    """One tensor of a checkpoint, under the checkpoint's own name."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def parameters(self) -> int:
        """Learned values; none in the vocabulary maps `d2t` and `t2d`, nor in the scales of 8-bit
        matrices.
        """
        learned = self.dtype.is_floating_point or self.dtype == torch.int8
        return math.prod(self.shape) if learned and not self.is_scale else 0

    @property
    def num_bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    @property
    def is_scale(self) -> bool:
        """Whether it scales the rows of an 8-bit matrix."""
        return self.name.endswith(SCALE)

    @property
    def is_vocabulary(self) -> bool:
        """Whether its size grows with the vocabulary: token embedding or LM head."""
        return "embed_tokens" in self.name or "lm_head" in self.name


@dataclass(frozen=True)
class TensorEntry:
    """A tensor's description, and how to read it."""

    info: TensorInfo
    load: Callable[[], Tensor]


def read_json(file: Path) -> dict[str, Any]:
    """A JSON object from a file. Raises HeadError when the file holds something else."""
    try:
        content = json.loads(file.read_text())
    except OSError as error:
        raise HeadError(
            f"{file} cannot be read ({error.strerror}): make it readable, or give another folder."
        ) from error
    except (ValueError, RecursionError) as error:
        raise HeadError(
            f"{file} is not valid JSON ({error}): download the checkpoint again."
        ) from error
    if not isinstance(content, dict):
        raise HeadError(f"{file} is not a JSON object: download the checkpoint again.")
    return content


def list_tensors(path: Path, *, allow_pickle: bool) -> dict[str, TensorEntry]:
    """All tensors of a folder by name, shapes only; safetensors are preferred where both kinds
    exist.

    Args:
        allow_pickle: whether pytorch_model.bin may be opened where there are no safetensors. torch
            then unpickles tensors only (weights_only).

    Raises:
        HeadError: no weights, a pickle without consent, a missing shard, or a file that cannot be
            read.
    """
    for index, suffix, opener in (
        ("model.safetensors.index.json", "*.safetensors", _open_safetensors),
        ("pytorch_model.bin.index.json", "pytorch_model*.bin", _open_pickle),
    ):
        if (path / index).is_file():
            shards = _shards(path / index)
            files = [path / shard for shard in shards]
        else:
            files = sorted(path.glob(suffix))
        if not files:
            continue
        if opener is _open_pickle and not allow_pickle:
            raise HeadError(
                f"{path} holds its weights as a pickle ({files[0].name}) and no *.safetensors: "
                "convert them, or, if you trust where they come "
                "from, set additional_config.specontext.allow_pickle (specontext inspect: "
                "--allow-pickle)."
            )
        entries: dict[str, TensorEntry] = {}
        for file in files:
            if not file.is_file():
                raise HeadError(
                    f"{path / index} names {file.name}, which is not there: download the "
                    "checkpoint in full."
                )
            try:
                entries |= opener(file)
            except Exception as error:  # both readers raise their own kinds for a broken file
                cut = _first_cut_tensor(file) if opener is _open_safetensors else None
                reason = type(error).__name__ if cut is None else f"it ends within {cut}"
                raise HeadError(
                    f"{file} cannot be read ({reason}): download the checkpoint again."
                ) from error
        return entries
    raise HeadError(
        f"{path} holds neither *.safetensors nor pytorch_model.bin: download the checkpoint's "
        "weights."
    )


def _shards(index: Path) -> list[str]:
    """Names of the files that an index points to, all of them inside its folder.

    Links are not followed for this check: the files of a hub cache's snapshot are links into
    another folder.
    """
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not all(
        isinstance(name, str) for name in weight_map.values()
    ):
        raise HeadError(
            f"{index} has no weight_map of tensor names to file names: download the checkpoint "
            "again."
        )
    for name in weight_map.values():
        if PurePath(name).is_absolute() or ".." in PurePath(name).parts or "\0" in name:
            raise HeadError(
                f"{index} names {name!r}, which is not inside its folder: use a checkpoint from a "
                "source you trust."
            )
    return sorted(set(weight_map.values()))


def _first_cut_tensor(file: Path) -> str | None:
    """The first tensor that is not complete in a truncated safetensors file; None if something else
    is wrong with the file.

    The format: eight bytes with the length of a JSON header, the header, and the tensors at their
    ``data_offsets`` after it.
    """
    try:
        with file.open("rb") as handle:
            length = int.from_bytes(handle.read(8), "little")
            header = json.loads(handle.read(min(length, file.stat().st_size)))
        ends = {
            name: entry["data_offsets"][1]
            for name, entry in header.items()
            if name != "__metadata__"
        }
    except (LookupError, OSError, TypeError, ValueError):
        return None
    held = file.stat().st_size - 8 - length
    return next(
        (name for name, end in sorted(ends.items(), key=lambda item: item[1]) if end > held), None
    )


def _open_safetensors(file: Path) -> dict[str, TensorEntry]:
    from safetensors import safe_open

    entries = {}
    with safe_open(file, framework="pt") as handle:
        for name in handle.keys():
            view = handle.get_slice(name)
            dtype = _SAFETENSORS_DTYPES.get(view.get_dtype(), torch.uint8)
            info = TensorInfo(name, tuple(view.get_shape()), dtype)
            entries[name] = TensorEntry(info, partial(load_safetensor, file, name))
    return entries


def load_safetensor(file: Path, name: str) -> Tensor:
    from safetensors import safe_open

    with safe_open(file, framework="pt") as handle:
        return handle.get_tensor(name)


def _open_pickle(file: Path) -> dict[str, TensorEntry]:
    try:
        state = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
    except RuntimeError:  # files of torch before 1.6 are no zip archives and cannot be mapped
        state = torch.load(file, map_location="cpu", weights_only=True)
    return {
        # The clone releases the mapping, and with it the pruned tensors.
        name: TensorEntry(TensorInfo(name, tuple(tensor.shape), tensor.dtype), tensor.clone)
        for name, tensor in state.items()
        if isinstance(tensor, Tensor)
    }
