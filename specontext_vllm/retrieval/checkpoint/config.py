"""Reads a draft model's config.json, in any of the published layouts, as vLLM reads it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, get_args

from specontext_vllm.retrieval.checkpoint.errors import HeadError
from specontext_vllm.retrieval.checkpoint.spec import KeyStates
from specontext_vllm.retrieval.checkpoint.tensor_files import read_json

ARCHITECTURE = "SpeContextHead"
"""Of a head in the format of our own; see ``save_head``."""
KEY_STATES: tuple[KeyStates, ...] = get_args(KeyStates)
# Defaults of transformers' LlamaConfig, which hold for what a head's config leaves out. In
# particular, a missing RoPE base is 10,000, not the target's.
DEFAULT_ROPE_THETA = 10_000.0
DEFAULT_TRAINED_LENGTH = 2048
DEFAULT_RMS_NORM_EPS = 1e-6
_AUX_KEY = "eagle_aux_hidden_state_layer_ids"
_OWN_AUX_KEY = "aux_layer_ids"


def read_config(path: Path) -> dict[str, Any]:
    """config.json of a model folder. Raises HeadError when it is missing or not a JSON object."""
    file = Path(path) / "config.json"
    if not file.is_file():
        raise HeadError(f"{path} holds no config.json: give the folder of a downloaded checkpoint.")
    return read_json(file)


@contextmanager
def usable_values(path: Path) -> Iterator[None]:
    """Turn the error of a value in config.json of a wrong type or range into a HeadError."""
    try:
        yield
    except HeadError:
        raise
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
        raise HeadError(
            f"{path}/config.json holds a value that cannot be used ({type(error).__name__}: "
            f"{error}): correct it, or download the checkpoint again."
        ) from error


def layout_of(config: Mapping[str, Any], path: Path) -> str:
    kind = config.get("speculators_model_type")
    if kind is not None:
        # P-EAGLE is EAGLE-3 with a mask vector for parallel drafting, which is pruned here.
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
    if ARCHITECTURE in names:
        return "specontext"
    return "specforge" if any("Eagle3" in name for name in names) else "safeailab"


def flatten(config: Mapping[str, Any], layout: str) -> dict[str, Any]:
    """The settings on one level, as vLLM reads them; null counts as absent.

    From `eagle_config` vLLM's draft models take the two keys below, before those on its own level
    (models/llama_eagle3.py). From a speculators config's top level they take the three keys below
    (configs/speculators/algos.py), and the rest from its layer's level.
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


def rope_settings(flat: Mapping[str, Any], path: Path) -> tuple[float, dict[str, Any] | None]:
    """(base, scaling). transformers 5 writes `rope_parameters`; older versions wrote `rope_theta`
    and `rope_scaling`.
    """
    scaling = dict(flat.get("rope_scaling") or flat.get("rope_parameters") or {})
    if any(isinstance(value, dict) for value in scaling.values()):
        raise HeadError(
            f"{path}: rope_parameters differ by layer type, which is not supported: give one flat "
            "set."
        )
    theta = scaling.pop("rope_theta", None) or flat.get("rope_theta", DEFAULT_ROPE_THETA)
    rope_type = _rope_type(scaling, path)
    if rope_type in ("llama3", "longrope", "yarn") and "original_max_position_embeddings" in flat:
        # As in transformers, the outer setting goes before the inner one.
        scaling["original_max_position_embeddings"] = flat["original_max_position_embeddings"]
    return float(theta), None if rope_type == "default" else {**scaling, "rope_type": rope_type}


def rotary_share(flat: Mapping[str, Any], layout: str, head_dim: int, path: Path) -> float:
    """The partial_rotary_factor: 1 in all formats but our own.

    Raises:
        HeadError: another factor elsewhere, or one that turns no whole number of pairs.
    """
    scaling = flat.get("rope_scaling") or flat.get("rope_parameters") or {}
    share = float(scaling.get("partial_rotary_factor", flat.get("partial_rotary_factor", 1.0)))
    if share != 1.0 and layout != "specontext":
        raise HeadError(
            f"{path}: partial_rotary_factor is not 1, which is not supported: use another head."
        )
    if not 0 < share <= 1 or head_dim * share % 2:
        raise HeadError(
            f"{path}: partial_rotary_factor is {share:g}, which turns {head_dim * share:g} of "
            f"{head_dim} values: give a share of an even number of them in config.json."
        )
    return share


def _rope_type(scaling: dict[str, Any], path: Path) -> str:
    """The rope_type, with older names replaced by today's as in vLLM (transformers_utils/config.py,
    patch_legacy_rope_type); keys that only the older ones need are dropped from ``scaling``.

    In a text all sections of mrope have the same position, which makes it ordinary RoPE.
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


def named_aux_layers(
    config: Mapping[str, Any], layout: str, num_aux: int, path: Path
) -> tuple[tuple[int, ...] | None, str | None]:
    """The layers that the config names, and the setting that names them; (None, None) if none
    does, or it is empty.

    In vLLM's order: the top level, for speculators' configs the layer's level
    (configs/speculators/algos.py), then `eagle_config`, of which the V1 runner reads one key and
    the V2 runner the other (v1/worker/gpu_model_runner.py,
    v1/worker/gpu/spec_decode/eagle/eagle3_utils.py).
    """
    levels = [("", config)]
    if layout == "speculators":
        levels.append(("transformer_layer_config.", config["transformer_layer_config"]))
    prefix, last = levels[-1]
    nested = last.get("eagle_config") or {}
    places = [(f"{level}{_AUX_KEY}", settings.get(_AUX_KEY)) for level, settings in levels]
    places += [(f"{prefix}eagle_config.{key}", nested.get(key)) for key in (_AUX_KEY, "layer_ids")]
    wanted = _AUX_KEY
    if layout == "specontext":
        wanted, places = _OWN_AUX_KEY, [(_OWN_AUX_KEY, config.get(_OWN_AUX_KEY))]
    place, ids = next(((place, ids) for place, ids in places if ids), (None, None))
    if ids is None:
        if num_aux != 3:
            raise HeadError(
                f"{path}: fc.weight reads {num_aux} hidden states and the default rule names 3 "
                "layers: set "
                f"{wanted}, or target_hidden_size, in config.json."
            )
        return None, None
    ids = tuple(ids)
    if len(ids) != num_aux:
        raise HeadError(
            f"{path}: {place} {list(ids)} are {len(ids)} layers but fc.weight reads {num_aux} "
            "hidden states: correct the ids, or target_hidden_size, in config.json."
        )
    # vLLM hands the states over in ascending order, each once: in another order fc would read the
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


def layer_groups_of(flat: Mapping[str, Any], num_heads: int, num_kv_heads: int, path: Path) -> int:
    """`layer_groups` of a head in our own format; every other head has one selection for all."""
    count = flat.get("layer_groups", 1)
    if type(count) is not int or count < 1 or num_heads % (num_kv_heads * count):
        raise HeadError(
            f"{path}: layer_groups is {count!r} in config.json, which does not divide the "
            f"{num_heads // num_kv_heads} query heads of a KV head: correct it."
        )
    return count


def key_states_of(flat: Mapping[str, Any], path: Path) -> KeyStates:
    """`key_states` of a head in our own format; every other head has "previous"."""
    named = flat.get("key_states")
    for known in KEY_STATES:
        if named == known:
            return known
    raise HeadError(
        f"{path}: key_states is {named!r} in config.json, where one of {', '.join(KEY_STATES)} is "
        "needed: correct it, or update specontext."
    )
