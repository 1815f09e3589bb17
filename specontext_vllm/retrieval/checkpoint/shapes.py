"""The tensors that a head of a spec has, and whether a checkpoint's are those."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch

from specontext_vllm.retrieval.checkpoint.errors import HeadError
from specontext_vllm.retrieval.checkpoint.int8 import SCALE
from specontext_vllm.retrieval.checkpoint.spec import HeadSpec
from specontext_vllm.retrieval.checkpoint.tensor_files import TensorInfo

SUPPORTED_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def required_shapes(spec: HeadSpec) -> dict[str, tuple[int, ...]]:
    """Canonical names and shapes of the tensors that a head of ``spec`` cannot do without."""
    aux_width = spec.num_aux * spec.target_hidden_size
    q_rows, k_rows = spec.num_heads * spec.head_dim, spec.num_kv_heads * spec.head_dim
    shapes: dict[str, tuple[int, ...]] = {
        "fc.weight": (spec.hidden_size, aux_width),
        "embed_norm.weight": (spec.embed_size,),
        "feature_norm.weight": (spec.hidden_size,),
        "q_proj.weight": (q_rows, spec.query_width),
        "k_proj.weight": (k_rows, spec.key_width),
    }
    if spec.norm_before_fc:
        shapes["input_norm.weight"] = (aux_width,)
    if spec.fc_norm:
        shapes |= {f"fc_norm.{i}.weight": (spec.target_hidden_size,) for i in range(spec.num_aux)}
    if spec.qk_norm:
        shapes |= {"q_norm.weight": (spec.head_dim,), "k_norm.weight": (spec.head_dim,)}
    for name, inner, rows, width in (
        ("q_mlp", spec.q_mlp, q_rows, spec.query_width),
        ("k_mlp", spec.k_mlp, k_rows, spec.key_width),
    ):
        if inner:
            shapes |= {
                f"{name}.gate_proj.weight": (inner, width),
                f"{name}.up_proj.weight": (inner, width),
                f"{name}.down_proj.weight": (rows, inner),
            }
    return shapes


def optional_shapes(spec: HeadSpec) -> dict[str, tuple[int, ...]]:
    """Canonical names and shapes of the tensors that a head of ``spec`` may have besides."""
    return {
        "fc.bias": (spec.hidden_size,),
        "q_proj.bias": (spec.num_heads * spec.head_dim,),
        "k_proj.bias": (spec.num_kv_heads * spec.head_dim,),
        "embed_tokens.weight": (spec.embed_vocab_size or 0, spec.embed_size),
    }


def check_tensors(spec: HeadSpec, infos: Mapping[str, TensorInfo], path: Path) -> None:
    """Checks that these tensors, by their canonical names, are a head of ``spec``. In our own
    format matrices may be int8, with their scales.

    Raises:
        HeadError: one is missing, unknown, of another shape or of a dtype that is not read.
    """
    expected = required_shapes(spec)
    for canonical in expected:
        if canonical not in infos:
            raise HeadError(
                f"{path} holds no {canonical} although its configuration asks for it: download it "
                "in full."
            )
    known = expected | optional_shapes(spec)
    if spec.format == "specontext":
        known |= _scale_shapes(known, infos, path)
    for canonical, info in infos.items():
        wanted = known.get(canonical)
        if wanted is None:
            raise HeadError(
                f"{path}: {info.name} is no tensor of a head in this format: correct its name or "
                "leave it out."
                if spec.format == "specontext" and not canonical.startswith("fc_norm.")
                else f"{path}: {info.name} is one input norm too many for the {spec.num_aux} "
                "hidden states that fc.weight reads: correct target_hidden_size in config.json."
            )
        if info.shape != wanted and canonical.endswith(SCALE):
            raise HeadError(
                f"{path}: {info.name} has shape {list(info.shape)} where {list(wanted)} is needed, "
                "a scale for each row: copy the head in full, or prune it with --int8 again."
            )
        if info.shape != wanted:
            also = ", key_states" if spec.format == "specontext" else ""
            raise HeadError(
                f"{path}: {info.name} has shape {list(info.shape)} where {list(wanted)} is needed: "
                f"check hidden_size, target_hidden_size{also} and the head "
                "counts in config.json."
            )
        if info.dtype not in SUPPORTED_DTYPES and canonical + SCALE not in known:
            raise HeadError(
                f"{path}: {info.name} is stored as {info.dtype}, which is not read here: use the "
                "bfloat16, float16 or float32 head, or int8 as specontext prune --int8 writes it."
                if spec.format == "specontext"
                else f"{path}: {info.name} is stored as {info.dtype}, and quantized heads are not "
                "supported: use the bfloat16, "
                "float16 or float32 checkpoint."
            )


def _scale_shapes(
    known: Mapping[str, tuple[int, ...]], infos: Mapping[str, TensorInfo], path: Path
) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the scales that the int8 matrices among ``infos`` need."""
    scales: dict[str, tuple[int, ...]] = {
        name + SCALE: shape[:1]
        for name, shape in known.items()
        if len(shape) == 2 and name in infos and infos[name].dtype == torch.int8
    }
    for name in scales:
        if name not in infos:
            raise HeadError(
                f"{path} holds no {name}, without which the int8 {name.removesuffix(SCALE)} means "
                "nothing: copy the head in full, or prune it with --int8 again."
            )
    return scales
