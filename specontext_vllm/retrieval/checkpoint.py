"""Reads the retrieval head's weights out of an EAGLE-3 checkpoint.

Three layouts exist in the wild: the original one (SafeAILab, `midlayer.*`), SpecForge's (the same
    tensors under another
architecture name) and speculators' (`layers.0.*`, a nested config). They differ in names and
defaults only, so all are read into one `HeadSpec` and one set of canonical tensor names. Where
config and tensors disagree about a width,
the tensors are right: published configs carry head dimensions that were edited for other engines
    (Tencent/AngelSlim#5).
"""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .tensor_files import HeadError, TensorEntry, TensorInfo, list_tensors, read_json

logger = logging.getLogger("vllm.specontext")

SUPPORTED_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
HUB_PATTERNS = [
    "config.json",
    "*.safetensors",
    "*.safetensors.index.json",
    "pytorch_model*.bin",
    "*.bin.index.json",
]

PRUNED_ARCHITECTURE = "SpeContextRetrievalHead"
"""What `specontext inspect --write-pruned` writes: the flat layout, with `vocab_size` for the
target's tokens in place of t2d and LM head.
"""

# Defaults of transformers' LlamaConfig, which every published head leans on when its config is
# silent. The RoPE base is
# the trap: silence means 10,000, not the target's own base.
_DEFAULT_ROPE_THETA = 10_000.0
_DEFAULT_TRAINED_LENGTH = 2048
_DEFAULT_RMS_NORM_EPS = 1e-6

_LAYER_NAMES = {
    "input_layernorm.weight": "embed_norm.weight",
    "hidden_norm.weight": "feature_norm.weight",
    "self_attn.q_proj.weight": "q_proj.weight",
    "self_attn.q_proj.bias": "q_proj.bias",
    "self_attn.k_proj.weight": "k_proj.weight",
    "self_attn.k_proj.bias": "k_proj.bias",
    "self_attn.q_norm.weight": "q_norm.weight",
    "self_attn.k_norm.weight": "k_norm.weight",
}
_AUX_KEY = "eagle_aux_hidden_state_layer_ids"
_TOP_NAMES = ("fc.weight", "fc.bias", "input_norm.weight", "embed_tokens.weight")
_REQUIRED = ("fc.weight", "embed_norm.weight", "q_proj.weight", "k_proj.weight")


@dataclass(frozen=True)
class HeadSpec:
    """Shapes and settings of a retrieval head.

    Attributes:
        format: layout it was read from: "safeailab", "specforge", "speculators", "pruned" or
            "dummy".
        hidden_size: H, width of the fused feature.
        target_hidden_size: width of one auxiliary hidden state of the target.
        embed_size: E, width of the token embedding; q_proj and k_proj read E + H values.
        num_heads, num_kv_heads, head_dim: nh, nkv, D of the head's attention.
        rope_theta: RoPE base.
        rope_scaling: the checkpoint's own RoPE scaling in transformers' terms, or None.
        trained_length: positions that the checkpoint claims to know (`max_position_embeddings`).
        aux_layer_ids: target layers to read, or None for `default_aux_layers`. Id i is the hidden
            state that enters layer i (0: the embedding, num_layers: the last layer's output), as
            vLLM counts. Some heads made for SGLang count layer outputs instead, which their config
            does not tell; vLLM takes their ids as they are, and so do we.
        aux_layers_from: where in config.json they stand; None where they do not.
        num_aux: auxiliary hidden states that fc concatenates.
        norm_before_fc: one RMSNorm over the concatenation. fc_norm: one RMSNorm for each state.
        qk_norm: RMSNorm over D on q and on k.
        dtype: dtype of fc in the checkpoint.
        embed_vocab_size: rows of the head's own token embedding, or None where it shares the
            target's.
        target_vocab_size: tokens of the target it was made for: the length of its `t2d` map, at
            full vocabulary the rows of its LM head, in a pruned head's config its `vocab_size`;
            None where it has none of them.
    """

    format: str
    hidden_size: int
    target_hidden_size: int
    embed_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rms_norm_eps: float
    rope_theta: float
    rope_scaling: dict[str, Any] | None
    trained_length: int
    aux_layer_ids: tuple[int, ...] | None
    num_aux: int
    norm_before_fc: bool
    fc_norm: bool
    qk_norm: bool
    dtype: torch.dtype
    embed_vocab_size: int | None = None
    target_vocab_size: int | None = None
    aux_layers_from: str | None = None


@dataclass(frozen=True)
class HeadCheckpoint:
    """A head's spec, its kept tensors under canonical names (on the CPU), and what was kept and
    pruned.

    Canonical names: fc.weight [H, num_aux*H_target], fc.bias [H], input_norm.weight
        [num_aux*H_target],
    fc_norm.{i}.weight [H_target], embed_norm.weight [E], feature_norm.weight [H], q_proj.weight
    [nh*D, E+H], q_proj.bias [nh*D], k_proj.weight [nkv*D, E+H], k_proj.bias [nkv*D], q_norm.weight
    [D], k_norm.weight [D], embed_tokens.weight [V, E]. fc.bias, the input norms, the q/k biases and
    norms, and embed_tokens are optional.
    """

    spec: HeadSpec
    tensors: dict[str, Tensor]
    kept: list[TensorInfo]
    pruned: list[TensorInfo]


def resolve_checkpoint(
    name: str, revision: str | None = None, *, say: Callable[[str], None] = logger.warning
) -> Path:
    """Folder of a checkpoint given as a folder or as a Hugging Face hub id (downloaded, or taken
    from the hub cache).

    A snapshot's folder bears its commit's name, so whoever reads it reads the same. Offline
    (HF_HUB_OFFLINE, TRANSFORMERS_OFFLINE, which are vLLM's switches too) only the cache is read.

    Args:
        revision: commit, tag or branch of the hub id; None for `main`.
        say: told what is taken from where, before it is, and of a revision that is no commit, which
            one it was.

    Raises:
        HeadError: neither a folder nor an id the hub or its cache can provide, or a folder with a
            revision.
    """
    path = Path(name).expanduser()
    if path.is_dir():
        if revision is not None:
            raise HeadError(
                f"{name} is a folder, which has no revision {revision!r}: leave "
                "retrieval_head_revision (specontext inspect: --revision) out."
            )
        return path
    if path.is_file():
        raise HeadError(
            f"{name} is a file: give the folder that holds it together with its config.json."
        )
    from huggingface_hub import constants, snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError
    from huggingface_hub.utils import validate_repo_id

    wanted, offline = revision or "main", constants.HF_HUB_OFFLINE
    pinned = re.fullmatch("[0-9a-f]{40}", wanted) is not None
    try:
        validate_repo_id(name)
        if not offline:
            loose = "" if pinned else ", which is not pinned and may hold something else tomorrow"
            say(
                f"Retrieval head: taking {name} from {constants.ENDPOINT} at revision "
                f"{wanted}{loose}."
            )
        folder = Path(
            snapshot_download(
                name, revision=wanted, allow_patterns=HUB_PATTERNS, local_files_only=offline
            )
        )
    except HFValidationError as error:
        raise HeadError(
            f"{name} is no folder here, and no id on the Hugging Face hub can be called so: check "
            "the name."
        ) from error
    except Exception as error:  # the hub client's failures share no base class
        if offline and isinstance(error, LocalEntryNotFoundError):
            raise HeadError(
                f"{name} is no folder here, its revision {wanted} is not in the Hugging Face cache "
                f"({constants.HF_HUB_CACHE}), and HF_HUB_OFFLINE or "
                "TRANSFORMERS_OFFLINE keeps it from being fetched: download it where there is a "
                "network, or give a folder."
            ) from error
        raise HeadError(
            f"{name} is no folder here, and the Hugging Face hub did not provide its revision "
            f"{wanted} ({type(error).__name__}): check the "
            "name, or download it where there is a network and give the folder."
        ) from error
    if not pinned:
        say(
            f"Retrieval head: {name} at {wanted} is commit {folder.name}; retrieval_head_revision "
            "(specontext inspect: --revision) pins it."
        )
    return folder


def read_checkpoint(path: Path, *, allow_pickle: bool = False) -> HeadCheckpoint:
    """Reads config and kept tensors of an EAGLE-3 checkpoint folder; the pruned tensors are never
    loaded.

    Args:
        path: folder with config.json and *.safetensors or pytorch_model.bin, sharded or not.
        allow_pickle: whether pytorch_model.bin may be opened; see ``list_tensors``.

    Raises:
        HeadError: not a readable EAGLE-3 checkpoint, or a kept tensor with values that are no
            finite numbers.
    """
    path = Path(path)
    config = read_config(path)
    with _usable_values(path):
        layout = _layout(config, path)
        flat = _flatten(config, layout)
    entries = list_tensors(path, allow_pickle=allow_pickle)
    found: dict[str, str] = {}
    for name in entries:
        canonical = _canonical_name(name)
        if canonical is None:
            continue
        if canonical in found:
            raise HeadError(
                f"{path} holds both {found[canonical]} and {name}: delete one of the two from the "
                "checkpoint."
            )
        found[canonical] = name
    _check_is_eagle3(found, entries, flat, path)

    shapes = {canonical: entries[name].info.shape for canonical, name in found.items()}
    with _usable_values(path):
        spec = _spec(
            layout,
            config,
            flat,
            shapes,
            entries[found["fc.weight"]].info.dtype,
            _target_vocabulary(entries, flat, layout),
            path,
        )
    for unused in [n for n in found if n.startswith(("input_norm", "fc_norm"))]:
        # vLLM reads these only when the config asks for them; a left-over tensor must not change
        # the result.
        if not (spec.norm_before_fc if unused.startswith("input_norm") else spec.fc_norm):
            del found[unused]
    _check_tensors(spec, {c: entries[n].info for c, n in found.items()}, path)

    kept = set(found.values())
    return HeadCheckpoint(
        spec=spec,
        tensors={canonical: _load(entries[name], path) for canonical, name in found.items()},
        kept=[entry.info for name, entry in entries.items() if name in kept],
        pruned=[entry.info for name, entry in entries.items() if name not in kept],
    )


@contextmanager
def _usable_values(path: Path) -> Iterator[None]:
    """Within the block, a value of config.json that is of another type or out of all range becomes
    a HeadError.
    """
    try:
        yield
    except HeadError:
        raise
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
        raise HeadError(
            f"{path}/config.json holds a value that cannot be used ({type(error).__name__}: "
            f"{error}): correct it, or download the checkpoint again."
        ) from error


def _target_vocabulary(
    entries: Mapping[str, TensorEntry], flat: Mapping[str, Any], layout: str
) -> int | None:
    """Tokens of the target: the length of ``t2d``, or the rows of an LM head that config.json does
    not call a reduced one; a pruned head says it.

    A reduced LM head may come without the maps (vLLM then takes its rows for the first token ids),
    and tells nothing of the target.
    """
    shapes = {name.removeprefix("model."): entry.info.shape for name, entry in entries.items()}
    if layout == "pruned":
        return None if "vocab_size" not in flat else int(flat["vocab_size"])
    if "t2d" in shapes:
        return shapes["t2d"][0]
    rows = shapes["lm_head.weight"][0] if "lm_head.weight" in shapes else None
    return rows if rows == flat.get("vocab_size", rows) else None


def _load(entry: TensorEntry, path: Path) -> Tensor:
    """A tensor's data, which must be finite: one NaN makes every score of every page NaN, and the
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


def resolve_aux_layers(spec: HeadSpec, num_layers: int) -> tuple[int, ...]:
    """The auxiliary layer ids of `spec` for a target of `num_layers` layers, checked against it.

    Raises:
        HeadError: an id beyond the target's layers, or no usable default.
    """
    ids = spec.aux_layer_ids if spec.aux_layer_ids is not None else default_aux_layers(num_layers)
    # num_layers itself is allowed: it is the last layer's output, which published heads do use.
    if ids[-1] > num_layers:
        raise HeadError(
            f"The head reads the target's layers {ids}, but the target has only {num_layers} "
            "layers: use a head that was "
            "trained for this target."
        )
    return ids


def describe_aux_layers(spec: HeadSpec, layers: Sequence[int] | None = None) -> str:
    """The layers a head reads and where that stands, for people; `layers` as `resolve_aux_layers`
    gives them, where the target is known.
    """
    named = spec.aux_layer_ids if layers is None else layers
    ids = "2, L//2, L-3 of the target's L layers" if named is None else ", ".join(map(str, named))
    return f"{ids} ({spec.aux_layers_from or 'default, its config.json names none'})"


def check_fits(
    spec: HeadSpec, *, target_hidden_size: int, num_layers: int, num_kv_heads: int, vocab_size: int
) -> None:
    """Checks that a head can choose KV pages for a target model.

    The head's KV heads must be the target's, or a multiple of them: nkv_head = g * nkv_target. Then
    target KV head j is scored by the element-wise maximum over the head's KV heads j*g .. j*g+g-1
    (and over their query heads), the rule the paper gives for GQA. Fewer heads than the target's
    are refused, since they would make several target heads share one selection. The head dimension
    is free: it only enters the head's own scores.

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
    resolve_aux_layers(spec, num_layers)


def check_dtype(checkpoint: HeadCheckpoint, dtype: torch.dtype) -> None:
    """Checks that a head's weights stay finite in the dtype they are served in; float16 ends at
    65504.

    Raises:
        HeadError: one does not.
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


def dummy_checkpoint(
    *,
    hidden_size: int,
    num_layers: int,
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    rope_theta: float,
    max_position: int,
    dtype: torch.dtype,
    seed: int,
) -> HeadCheckpoint:
    """A head of a target's shape with random weights, for benchmarks: right in cost, meaningless in
    what it selects.

    Projections have standard deviation 1/sqrt(fan_in) and norms are 1, so that q and k are O(1) for
    any input.
    """
    try:
        ids = default_aux_layers(num_layers)
    except HeadError:
        ids = (
            tuple(range(num_layers + 1))[-3:]
            if num_layers < 4
            else (1, num_layers // 2, num_layers - 1)
        )
    generator = torch.Generator().manual_seed(seed)

    def linear(out_features: int, in_features: int) -> Tensor:
        return (
            torch.randn(out_features, in_features, generator=generator) / math.sqrt(in_features)
        ).to(dtype)

    tensors = {
        "fc.weight": linear(hidden_size, len(ids) * hidden_size),
        "embed_norm.weight": torch.ones(hidden_size, dtype=dtype),
        "feature_norm.weight": torch.ones(hidden_size, dtype=dtype),
        "q_proj.weight": linear(num_heads * head_dim, 2 * hidden_size),
        "k_proj.weight": linear(num_kv_heads * head_dim, 2 * hidden_size),
    }
    spec = HeadSpec(
        format="dummy",
        hidden_size=hidden_size,
        target_hidden_size=hidden_size,
        embed_size=hidden_size,
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        rms_norm_eps=_DEFAULT_RMS_NORM_EPS,
        rope_theta=rope_theta,
        rope_scaling=None,
        trained_length=max_position,
        aux_layer_ids=ids,
        num_aux=len(ids),
        norm_before_fc=False,
        fc_norm=False,
        qk_norm=False,
        dtype=dtype,
        aux_layers_from="dummy",
    )
    kept = [TensorInfo(name, tuple(t.shape), t.dtype) for name, t in tensors.items()]
    return HeadCheckpoint(spec=spec, tensors=tensors, kept=kept, pruned=[])


def read_config(path: Path) -> dict[str, Any]:
    """config.json of a model folder. Raises HeadError when it is missing or not a JSON object."""
    file = Path(path) / "config.json"
    if not file.is_file():
        raise HeadError(f"{path} holds no config.json: give the folder of a downloaded checkpoint.")
    return read_json(file)


def _layout(config: Mapping[str, Any], path: Path) -> str:
    kind = config.get("speculators_model_type")
    if kind is not None:
        # P-EAGLE is EAGLE-3 with a mask vector for drafting in parallel, and drafting is what is
        # pruned here.
        if kind not in ("eagle3", "peagle"):
            raise HeadError(
                f"{path} has speculators_model_type {kind!r}: a retrieval head needs an eagle3 "
                "checkpoint."
            )
        if not isinstance(config.get("transformer_layer_config"), dict):
            raise HeadError(
                f"{path}/config.json has no transformer_layer_config: convert it with speculators "
                "again."
            )
        return "speculators"
    names = config.get("architectures") or ()
    if PRUNED_ARCHITECTURE in names:
        return "pruned"
    return "specforge" if any("Eagle3" in name for name in names) else "safeailab"


def _flatten(config: Mapping[str, Any], layout: str) -> dict[str, Any]:
    """One level of settings, as vLLM reads them; null counts as absent, as published configs use it
    that way.

    Of `eagle_config` vLLM's draft models take these two, before what stands beside it
    (models/llama_eagle3.py); of a speculators config's own level it takes these three
    (configs/speculators/algos.py), and the rest from the layer's.
    """
    settings = _given(config)
    if layout == "speculators":
        own, settings = settings, _given(config["transformer_layer_config"])
        for key in ("norm_before_fc", "fc_norm"):
            settings.pop(key, None)
        settings |= {
            key: own[key]
            for key in ("target_hidden_size", "norm_before_fc", "fc_norm")
            if key in own
        }
    settings.pop("use_aux_hidden_state", None)
    nested = _given(settings.get("eagle_config", {}))
    return settings | {
        key: nested[key] for key in ("norm_before_fc", "use_aux_hidden_state") if key in nested
    }


def _given(level: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in level.items() if value is not None}


def file_name(canonical: str) -> str:
    """The name of a kept tensor in SafeAILab's layout."""
    layer = {ours: theirs for theirs, ours in _LAYER_NAMES.items()}
    return f"midlayer.{layer[canonical]}" if canonical in layer else canonical


def _canonical_name(name: str) -> str | None:
    name = name.removeprefix("model.")
    if name in _TOP_NAMES or (name.startswith("fc_norm.") and name.endswith(".weight")):
        return name
    for prefix in ("midlayer.", "layers.0."):
        if name.startswith(prefix):
            return _LAYER_NAMES.get(name.removeprefix(prefix))
    return None


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
    for canonical in _REQUIRED:
        if canonical not in found:
            original = {v: k for k, v in _LAYER_NAMES.items()}.get(canonical)
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
    for canonical in (*_REQUIRED, "feature_norm.weight"):
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
    rope_theta, rope_scaling = _rope(flat, path)
    rms_norm_eps = float(flat.get("rms_norm_eps", _DEFAULT_RMS_NORM_EPS))
    trained_length = int(flat.get("max_position_embeddings", _DEFAULT_TRAINED_LENGTH))
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
    aux_layer_ids, aux_layers_from = _aux_layer_ids(config, layout, num_aux, path)
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
    )


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


def _rope(flat: Mapping[str, Any], path: Path) -> tuple[float, dict[str, Any] | None]:
    """(base, scaling): transformers 5 writes `rope_parameters`, older files `rope_theta` and
    `rope_scaling`.
    """
    scaling = dict(flat.get("rope_scaling") or flat.get("rope_parameters") or {})
    if any(isinstance(value, dict) for value in scaling.values()):
        raise HeadError(
            f"{path}: rope_parameters differ by layer type, which is not supported: give one flat "
            "set."
        )
    theta = scaling.pop("rope_theta", None) or flat.get("rope_theta", _DEFAULT_ROPE_THETA)
    if scaling.get("partial_rotary_factor", flat.get("partial_rotary_factor", 1.0)) != 1.0:
        raise HeadError(
            f"{path}: partial_rotary_factor is not 1, which is not supported: use another head."
        )
    rope_type = _rope_type(scaling, path)
    if rope_type in ("llama3", "longrope", "yarn") and "original_max_position_embeddings" in flat:
        scaling["original_max_position_embeddings"] = flat[
            "original_max_position_embeddings"
        ]  # as transformers has it, before what stands within
    return float(theta), None if rope_type == "default" else {**scaling, "rope_type": rope_type}


def _rope_type(scaling: dict[str, Any], path: Path) -> str:
    """The type, its older names in today's terms, as in vLLM (transformers_utils/config.py,
    patch_legacy_rope_type); drops what only those need.

    In a text all sections of mrope have the same position, which is ordinary RoPE.
    """
    legacy, rope_type = scaling.pop("type", None), scaling.pop("rope_type", None)
    if (
        None not in (legacy, rope_type)
        and legacy != rope_type
        and (legacy, rope_type) not in (("su", "longrope"), ("mrope", "default"))
    ):
        raise HeadError(
            f"{path}: the RoPE settings have type {legacy!r} and rope_type {rope_type!r}: leave "
            "the wrong one out of config.json."
        )
    rope_type = rope_type or legacy or "default"
    sections = scaling.pop("mrope_section", None)
    scaling.pop("mrope_interleaved", None)
    if rope_type == "mrope" and sections is None:
        raise HeadError(
            f"{path}: the RoPE settings have type 'mrope' and no mrope_section: complete them in "
            "config.json."
        )
    return {"mrope": "default", "su": "longrope"}.get(rope_type, rope_type)


def _aux_layer_ids(
    config: Mapping[str, Any], layout: str, num_aux: int, path: Path
) -> tuple[tuple[int, ...] | None, str | None]:
    """The layers that the config names and where, or None twice; an empty list names none.

    The order is vLLM's: the top level, for speculators' configs the layer's level after it
    (configs/speculators/algos.py), then `eagle_config`, of which its V1 runner reads the one key
    and V2 the other (v1/worker/gpu_model_runner.py,
    v1/worker/gpu/spec_decode/eagle/eagle3_utils.py).
    """
    levels = [("", config)]
    if layout == "speculators":
        levels.append(("transformer_layer_config.", config["transformer_layer_config"]))
    prefix, last = levels[-1]
    nested = last.get("eagle_config") or {}
    places = [(f"{level}{_AUX_KEY}", settings.get(_AUX_KEY)) for level, settings in levels]
    places += [(f"{prefix}eagle_config.{key}", nested.get(key)) for key in (_AUX_KEY, "layer_ids")]
    place, ids = next(((place, ids) for place, ids in places if ids), (None, None))
    if ids is None:
        if num_aux != 3:
            raise HeadError(
                f"{path}: fc.weight reads {num_aux} hidden states and the default rule names 3 "
                "layers: set "
                f"{_AUX_KEY}, or target_hidden_size, in config.json."
            )
        return None, None
    ids = tuple(ids)
    if len(ids) != num_aux:
        raise HeadError(
            f"{path}: {place} {list(ids)} are {len(ids)} layers but fc.weight reads {num_aux} "
            "hidden states: correct the ids, or target_hidden_size, in config.json."
        )
    # vLLM hands the states over in ascending order, each once, so any other order would feed fc the
    # wrong columns.
    if (
        any(type(i) is not int for i in ids)
        or ids[0] < 0
        or any(a >= b for a, b in zip(ids, ids[1:]))
    ):
        raise HeadError(
            f"{path}: {place} {list(ids)} are not distinct and ascending layer ids from 0 up: "
            "correct them in config.json."
        )
    return ids, place


def _check_tensors(spec: HeadSpec, infos: Mapping[str, TensorInfo], path: Path) -> None:
    width = spec.embed_size + spec.hidden_size
    aux_width = spec.num_aux * spec.target_hidden_size
    q_rows, k_rows = spec.num_heads * spec.head_dim, spec.num_kv_heads * spec.head_dim
    expected: dict[str, tuple[int, ...]] = {
        "fc.weight": (spec.hidden_size, aux_width),
        "embed_norm.weight": (spec.embed_size,),
        "feature_norm.weight": (spec.hidden_size,),
        "q_proj.weight": (q_rows, width),
        "k_proj.weight": (k_rows, width),
    }
    if spec.norm_before_fc:
        expected["input_norm.weight"] = (aux_width,)
    if spec.fc_norm:
        expected |= {f"fc_norm.{i}.weight": (spec.target_hidden_size,) for i in range(spec.num_aux)}
    if spec.qk_norm:
        expected |= {"q_norm.weight": (spec.head_dim,), "k_norm.weight": (spec.head_dim,)}
    for canonical in expected:
        if canonical not in infos:
            raise HeadError(
                f"{path} holds no {canonical} although its configuration asks for it: download it "
                "in full."
            )
    optional: dict[str, tuple[int, ...]] = {
        "fc.bias": (spec.hidden_size,),
        "q_proj.bias": (q_rows,),
        "k_proj.bias": (k_rows,),
        "embed_tokens.weight": (spec.embed_vocab_size or 0, spec.embed_size),
    }
    for canonical, info in infos.items():
        wanted = expected.get(canonical) or optional.get(canonical)
        if wanted is None:
            raise HeadError(
                f"{path}: {info.name} is one input norm too many for the {spec.num_aux} hidden "
                "states that fc.weight "
                "reads: correct target_hidden_size in config.json."
            )
        if info.shape != wanted:
            raise HeadError(
                f"{path}: {info.name} has shape {list(info.shape)} where {list(wanted)} is needed: "
                "check hidden_size, "
                "target_hidden_size and the head counts in config.json."
            )
        if info.dtype not in SUPPORTED_DTYPES:
            raise HeadError(
                f"{path}: {info.name} is stored as {info.dtype}, and quantized heads are not "
                "supported: use the bfloat16, "
                "float16 or float32 checkpoint."
            )
