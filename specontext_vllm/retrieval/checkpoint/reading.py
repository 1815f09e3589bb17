"""Reads the retrieval head's weights out of a checkpoint: of EAGLE-3, or in the format of our own.

Published EAGLE-3 checkpoints have one of three layouts: the original one (SafeAILab, `midlayer.*`),
SpecForge's (the same tensors under another architecture name) and speculators' (`layers.0.*`, a
nested config). They differ only in names and defaults, so all are read into one `HeadSpec` and one
set of canonical tensor names. If config and tensors disagree about a width, the tensors are right:
published configs carry head dimensions that were edited for other engines (Tencent/AngelSlim#5).
Ours (`saving.py`) has those very names, and more kinds of heads.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from specontext_vllm.retrieval.checkpoint.config import (
    DEFAULT_RMS_NORM_EPS,
    DEFAULT_TRAINED_LENGTH,
    flatten,
    key_states_of,
    layer_groups_of,
    layout_of,
    named_aux_layers,
    read_config,
    rope_settings,
    rotary_share,
    usable_values,
)
from specontext_vllm.retrieval.checkpoint.errors import HeadError
from specontext_vllm.retrieval.checkpoint.int8 import dequantize
from specontext_vllm.retrieval.checkpoint.shapes import check_tensors
from specontext_vllm.retrieval.checkpoint.spec import HeadCheckpoint, HeadSpec
from specontext_vllm.retrieval.checkpoint.tensor_files import TensorEntry, list_tensors
from specontext_vllm.retrieval.checkpoint.tensor_names import LAYER_NAMES, REQUIRED, canonical_name


def read_checkpoint(path: Path, *, allow_pickle: bool = False) -> HeadCheckpoint:
    """Reads config and kept tensors of a head's folder; the pruned tensors are never loaded.

    Args:
        path: folder with config.json and *.safetensors or pytorch_model.bin, sharded or not.
        allow_pickle: whether pytorch_model.bin may be opened; see ``list_tensors``.

    Raises:
        HeadError: not a readable checkpoint of a head, or a kept tensor with values that are no
            finite numbers.
    """
    path = Path(path)
    config = read_config(path)
    with usable_values(path):
        layout = layout_of(config, path)
        flat = flatten(config, layout)
    entries = list_tensors(path, allow_pickle=allow_pickle)
    found: dict[str, str] = {}
    for name in entries:
        canonical = canonical_name(name, layout)
        if canonical is None:
            continue
        if canonical in found:
            raise HeadError(
                f"{path} holds both {found[canonical]} and {name}: delete one of the two from the "
                "checkpoint."
            )
        found[canonical] = name
    if layout == "specontext":
        _check_holds(found, path)
    else:
        _check_is_eagle3(found, entries, flat, path)

    shapes = {canonical: entries[name].info.shape for canonical, name in found.items()}
    with usable_values(path):
        spec = _spec(
            layout,
            config,
            flat,
            shapes,
            _dtype_read(entries[found["fc.weight"]]),
            _target_vocabulary(entries, flat, layout),
            path,
        )
    for unused in [n for n in found if n.startswith(("input_norm", "fc_norm"))]:
        # As in vLLM, the config says whether these are used, not whether they are there.
        if not (spec.norm_before_fc if unused.startswith("input_norm") else spec.fc_norm):
            del found[unused]
    check_tensors(spec, {c: entries[n].info for c, n in found.items()}, path)

    kept = set(found.values())
    stored = {canonical: _load(entries[name], path) for canonical, name in found.items()}
    return HeadCheckpoint(
        spec=spec,
        tensors=dequantize(stored, path),
        kept=[entry.info for name, entry in entries.items() if name in kept],
        pruned=[entry.info for name, entry in entries.items() if name not in kept],
    )


def _target_vocabulary(
    entries: Mapping[str, TensorEntry], flat: Mapping[str, Any], layout: str
) -> int | None:
    """Tokens of the target: the length of ``t2d``, or the rows of an LM head that is not reduced,
    or the setting of a head in our own format.

    A reduced LM head may come without the maps (vLLM then takes its rows for the first token ids);
    it says nothing about the target.
    """
    shapes = {name.removeprefix("model."): entry.info.shape for name, entry in entries.items()}
    if layout == "specontext":
        return None if "vocab_size" not in flat else int(flat["vocab_size"])
    if "t2d" in shapes:
        return shapes["t2d"][0]
    rows = shapes["lm_head.weight"][0] if "lm_head.weight" in shapes else None
    return rows if rows == flat.get("vocab_size", rows) else None


def _dtype_read(entry: TensorEntry) -> torch.dtype:
    """What a tensor has once it is read: matrices of integers become float32."""
    return torch.float32 if entry.info.dtype == torch.int8 else entry.info.dtype


def _load(entry: TensorEntry, path: Path) -> Tensor:
    """A tensor's data, which must be finite: one NaN makes every page's score NaN, and the
    selection arbitrary.
    """
    name = entry.info.name
    try:
        tensor = entry.load()
    except Exception as error:  # both readers raise their own kinds for a broken file
        raise HeadError(
            f"{path}: {name} cannot be read ({type(error).__name__}): download the checkpoint "
            "again."
        ) from error
    if bad := int((~torch.isfinite(tensor)).sum()):
        raise HeadError(
            f"{path}: {name} holds {bad} of {tensor.numel()} values that are NaN or infinite: "
            "download the checkpoint again, or use one from "
            "before its training diverged."
        )
    return tensor


def _check_holds(found: Mapping[str, str], path: Path) -> None:
    for canonical in (*REQUIRED, "feature_norm.weight"):
        if canonical not in found:
            raise HeadError(
                f"{path} holds no {canonical}, without which there is no head: copy or save it in "
                "full."
            )


def _check_is_eagle3(
    found: Mapping[str, str],
    entries: Mapping[str, TensorEntry],
    flat: Mapping[str, Any],
    path: Path,
) -> None:
    hidden = flat.get("hidden_size")
    if "feature_norm.weight" not in found:
        fc = entries[found["fc.weight"]].info.shape if "fc.weight" in found else None
        if fc is not None and hidden is not None and tuple(fc) == (hidden, 2 * hidden):
            raise HeadError(
                f"{path} is an EAGLE-1 or EAGLE-2 checkpoint (fc.weight {list(fc)}, no "
                "hidden_norm.weight): a retrieval "
                "head needs an EAGLE-3 checkpoint."
            )
        raise HeadError(
            f"{path} holds no midlayer.hidden_norm.weight or layers.0.hidden_norm.weight, so it is "
            "not an EAGLE-3 "
            "checkpoint: give an EAGLE-3 draft head, not the target model."
        )
    if flat.get("use_aux_hidden_state") is False:
        raise HeadError(
            f"{path} sets use_aux_hidden_state to false, so it reads the target's last layer only: "
            "a retrieval head needs "
            "an EAGLE-3 checkpoint that reads auxiliary layers."
        )
    for canonical in REQUIRED:
        if canonical not in found:
            original = {v: k for k, v in LAYER_NAMES.items()}.get(canonical)
            wanted = (
                canonical if original is None else f"midlayer.{original} or layers.0.{original}"
            )
            raise HeadError(
                f"{path} holds no {wanted}: download an unquantized EAGLE-3 checkpoint in full."
            )


def _spec(
    layout: str,
    config: Mapping[str, Any],
    flat: Mapping[str, Any],
    shapes: Mapping[str, tuple[int, ...]],
    dtype: torch.dtype,
    target_vocab_size: int | None,
    path: Path,
) -> HeadSpec:
    for canonical in (*REQUIRED, "feature_norm.weight"):
        wanted = 1 if "norm" in canonical else 2
        if len(shapes[canonical]) != wanted:
            raise HeadError(
                f"{path}: {canonical} has shape {list(shapes[canonical])}, not "
                f"{wanted}-dimensional."
            )
    hidden_size, fc_in = shapes["fc.weight"]
    if flat.get("hidden_size", hidden_size) != hidden_size:
        raise HeadError(
            f"{path}: hidden_size is {flat['hidden_size']} in config.json but fc.weight has "
            f"{hidden_size} rows: correct "
            "hidden_size in config.json."
        )
    target_hidden_size = int(flat.get("target_hidden_size", hidden_size))
    if fc_in % target_hidden_size:
        raise HeadError(
            f"{path}: fc.weight reads {fc_in} values, which is not a multiple of the target's "
            "hidden size "
            f"{target_hidden_size}: set target_hidden_size in config.json to the target's "
            "hidden_size."
        )
    num_aux = fc_in // target_hidden_size
    num_heads, num_kv_heads, head_dim = _attention_shape(flat, shapes, path)
    if layout == "specontext" and flat.get("head_dim", head_dim) != head_dim:
        raise HeadError(
            f"{path}: head_dim is {flat['head_dim']} in config.json but q_proj.weight has "
            f"{num_heads} heads of {head_dim} rows: correct config.json."
        )
    rope_theta, rope_scaling = rope_settings(flat, path)
    rms_norm_eps = float(flat.get("rms_norm_eps", DEFAULT_RMS_NORM_EPS))
    trained_length = int(flat.get("max_position_embeddings", DEFAULT_TRAINED_LENGTH))
    for name, value in (
        ("rms_norm_eps", rms_norm_eps),
        ("rope_theta", rope_theta),
        ("max_position_embeddings", trained_length),
    ):
        if not (math.isfinite(value) and value > 0):
            raise HeadError(
                f"{path}: {name} is {value} in config.json, where a positive number is needed: "
                "correct it."
            )
    embed_tokens = shapes.get("embed_tokens.weight")
    aux_layer_ids, aux_layers_from = named_aux_layers(config, layout, num_aux, path)
    return HeadSpec(
        format=layout,
        hidden_size=hidden_size,
        target_hidden_size=target_hidden_size,
        embed_size=shapes["embed_norm.weight"][0],
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        rms_norm_eps=rms_norm_eps,
        rope_theta=rope_theta,
        rope_scaling=rope_scaling,
        partial_rotary_factor=rotary_share(flat, layout, head_dim, path),
        trained_length=trained_length,
        aux_layer_ids=aux_layer_ids,
        num_aux=num_aux,
        norm_before_fc=bool(flat.get("norm_before_fc", False)),
        fc_norm=bool(flat.get("fc_norm", False)),
        qk_norm="q_norm.weight" in shapes or "k_norm.weight" in shapes,
        dtype=dtype,
        embed_vocab_size=None if embed_tokens is None else embed_tokens[0],
        target_vocab_size=target_vocab_size,
        aux_layers_from=aux_layers_from,
        key_states=key_states_of(flat, path) if layout == "specontext" else "previous",
        layer_groups=(
            layer_groups_of(flat, num_heads, num_kv_heads, path) if layout == "specontext" else 1
        ),
        q_mlp=_mlp_width("q_mlp", shapes),
        k_mlp=_mlp_width("k_mlp", shapes),
    )


def _mlp_width(name: str, shapes: Mapping[str, tuple[int, ...]]) -> int:
    """Inner width of a gated MLP by whichever of its tensors is there; 0 without any."""
    for part, axis in (("gate_proj", 0), ("up_proj", 0), ("down_proj", -1)):
        if shape := shapes.get(f"{name}.{part}.weight"):
            return shape[axis]
    return 0


def _attention_shape(
    flat: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]], path: Path
) -> tuple[int, int, int]:
    """(nh, nkv, D): counts from the config, D from the tensors, whatever `head_dim` says."""
    q_rows, k_rows = shapes["q_proj.weight"][0], shapes["k_proj.weight"][0]
    if "num_attention_heads" not in flat:
        raise HeadError(
            f"{path}/config.json has no num_attention_heads: add the draft model's number of heads."
        )
    num_heads = int(flat["num_attention_heads"])
    num_kv_heads = int(flat.get("num_key_value_heads", num_heads))
    head_dim = q_rows // num_heads
    if (
        (num_heads * head_dim, num_kv_heads * head_dim) != (q_rows, k_rows)
        or num_heads % num_kv_heads
        or head_dim % 2
    ):
        raise HeadError(
            f"{path}: q_proj has {q_rows} rows and k_proj {k_rows}, which do not divide into "
            "num_attention_heads "
            f"{num_heads} and num_key_value_heads {num_kv_heads} of one even head dimension: "
            "correct config.json."
        )
    return num_heads, num_kv_heads, head_dim
