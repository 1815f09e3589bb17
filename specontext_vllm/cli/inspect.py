"""`specontext inspect`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.table import Table

from specontext_vllm.cli.options import AllowPickle, HeadCheckpointName, Revision
from specontext_vllm.cli.refusals import refusals
from specontext_vllm.model_config import has_state, layer_kinds, num_full_layers
from specontext_vllm.other_layers import dtype_of, state_bytes
from specontext_vllm.retrieval.checkpoint import (
    HeadCheckpoint,
    HeadError,
    HeadSpec,
    TensorInfo,
    aux_layers_of,
    checkpoint_folder,
    describe_aux_layers,
    read_checkpoint,
    read_config,
)
from specontext_vllm.retrieval.checkpoint.config import usable_values
from specontext_vllm.retrieval.head import check_head
from specontext_vllm.retrieval.rope import rope_frequencies


def inspect(
    checkpoint: HeadCheckpointName,
    target: Annotated[
        Path | None, typer.Option(help="Folder of the target model; only its config.json is read.")
    ] = None,
    revision: Revision = None,
    allow_pickle: AllowPickle = False,
) -> None:
    """Show what a retrieval head is like and what it keeps of its checkpoint, and whether it fits
    a target model.

    Exit code 0: readable, and it fits the target if one was given; 1: it does not fit; 2: not a
    usable checkpoint.
    """
    with refusals(HeadError):
        folder = checkpoint_folder(
            checkpoint, revision, say=lambda text: typer.echo(text, err=True)
        )
        head = read_checkpoint(folder, allow_pickle=allow_pickle)
        served, sentences = None, []
        if target is not None:
            served = _target(target, head.spec)
            with usable_values(target):
                sentences = list(_served_layers(_text_config(target)))
        rope_frequencies(head.spec, head.spec.trained_length)
    console = Console(soft_wrap=True)
    console.print(_tensor_table(head))
    console.print(_facts_table(head))
    kept, whole = head.kept_bytes, head.whole_bytes
    if kept < whole:
        _print(
            console,
            f"`specontext prune` writes the {kept:,} of {whole:,} bytes that selection reads.",
        )
    if served is not None and target is not None:
        try:
            check_head(head, **served)
            layers = describe_aux_layers(
                head.spec, aux_layers_of(head.spec, served["target"]["num_layers"])
            )
        except HeadError as error:
            _print(console, f"Does not fit {target}: {error}")
            raise typer.Exit(1) from None
        _print(console, f"Fits {target}: reads its layers {layers}.")
        for sentence in sentences:
            _print(console, sentence)


def _print(console: Console, text: str) -> None:
    console.print(text, markup=False, highlight=False)


def _target(path: Path, spec: HeadSpec) -> dict[str, Any]:
    """What `check_head` needs to know of the target, from its config.json."""
    config = read_config(path)
    # Multimodal models nest the language model's settings.
    config = config.get("text_config", config)
    if not isinstance(config, dict):
        raise HeadError(
            f"{path}/config.json has text_config {config!r}, where the language model's settings "
            "are needed: correct it."
        )

    def number(key: str) -> int:
        if type(found := config.get(key)) is int and found > 0:
            return found
        if found is None:
            raise HeadError(
                f"{path}/config.json has no {key}: --target must be the folder of a language model."
            )
        raise HeadError(
            f"{path}/config.json has {key} {found!r}, where a number above 0 is needed: correct it."
        )

    def given(key: str, default: int) -> int:
        return default if config.get(key) is None else number(key)

    # Only float16 can be too narrow for a weight: bfloat16 ends where float32 does.
    dtype = (
        torch.float16
        if "float16" in (config.get("dtype"), config.get("torch_dtype"))
        else torch.bfloat16
    )
    return {
        "target": {
            "target_hidden_size": number("hidden_size"),
            "num_layers": number("num_hidden_layers"),
            "num_kv_heads": given("num_key_value_heads", number("num_attention_heads")),
            "vocab_size": number("vocab_size"),
        },
        "max_position": given("max_position_embeddings", spec.trained_length),
        "dtype": dtype,
    }


def _served_layers(text: Any) -> Iterator[str]:
    """Sentences on the layers for which pages are selected, where the target's config lists layers
    of several kinds.
    """
    full, count = num_full_layers(text), text.num_hidden_layers
    if 0 < full < count:
        yield (
            f"It selects for {full} of its {count} layers, those that attend to the whole context."
        )
    states = 0 if isinstance(text, SimpleNamespace) else sum(map(has_state, layer_kinds(text)))
    if states and (size := state_bytes(text, dtype_of(text))):
        yield (
            f"{states} layers keep a state: {states * size:,} bytes a request, whatever its "
            "context; `specontext plan` has the rest."
        )


def _text_config(target: Path) -> Any:
    """The language model's config: transformers' class of it, which lists the layers where the file
    only has a rule for them; the file as it is, of a model that transformers does not know.

    Raises:
        HeadError: transformers knows the model, and does not take its config.json.
    """
    from transformers import CONFIG_MAPPING, AutoConfig

    config = read_config(target)
    try:
        return AutoConfig.from_pretrained(str(target)).get_text_config()
    except Exception as error:  # a broken config fails where one of its values is first used
        if config.get("model_type") not in CONFIG_MAPPING:
            return SimpleNamespace(**config.get("text_config", config))
        raise HeadError(
            f"{target}/config.json holds a value that cannot be used ({type(error).__name__}: "
            f"{' '.join(str(error).split())}): correct it."
        ) from None


def _tensor_table(head: HeadCheckpoint) -> Table:
    table = Table(title="Tensors", title_justify="left")
    table.add_column("")
    table.add_column("tensor", overflow="fold")
    table.add_column("shape")
    table.add_column("dtype")
    table.add_column("parameters", justify="right")
    for verb, infos in (("kept", head.kept), ("pruned", head.pruned)):
        for info in infos:
            dtype = str(info.dtype).removeprefix("torch.")
            table.add_row(
                verb, info.name, " x ".join(map(str, info.shape)), dtype, f"{info.parameters:,}"
            )
        table.add_section()
    return table


def _facts_table(head: HeadCheckpoint) -> Table:
    spec = head.spec
    table = Table(title="Retrieval head", title_justify="left", show_header=False)
    table.add_column()
    table.add_column(overflow="fold")
    rows: list[tuple[str, Any]] = [
        ("format", spec.format),
        ("kept of all parameters", _share(head.kept, head.pruned)),
        (
            "the same without embedding and LM head",
            _share(*map(_without_vocabulary, (head.kept, head.pruned))),
        ),
        ("stored as", _storage(head.kept)),
        ("kept bytes", f"{head.kept_bytes:,}"),
        (
            "kept bytes without embedding",
            f"{sum(info.num_bytes for info in _without_vocabulary(head.kept)):,}",
        ),
        (
            "embedding",
            "the target's"
            if spec.embed_vocab_size is None
            else f"its own, {spec.embed_vocab_size} tokens",
        ),
        ("auxiliary layers", describe_aux_layers(spec)),
        (
            "query heads, KV heads, head_dim",
            f"{spec.num_heads}, {spec.num_kv_heads}, {spec.head_dim}",
        ),
        (
            "selections of a step",
            "one for all layers"
            if spec.layer_groups == 1
            else f"one for each of {spec.layer_groups} groups of layers",
        ),
        (
            "RoPE",
            f"theta {spec.rope_theta:g}, scaling {_scaling(spec)}, trained length "
            f"{spec.trained_length}",
        ),
        ("norms", _norms(spec)),
        (
            "a key is made from",
            "its token's embedding, the states before"
            + (" and its own" if spec.key_states == "own" else ""),
        ),
        ("gated MLPs", _mlps(spec)),
        ("drafts tokens", _drafts(head)),
    ]
    for name, value in rows:
        table.add_row(name, str(value))
    return table


def _without_vocabulary(infos: Sequence[TensorInfo]) -> list[TensorInfo]:
    return [info for info in infos if not info.is_vocabulary]


def _share(kept: Sequence[TensorInfo], pruned: Sequence[TensorInfo]) -> str:
    kept_count = sum(info.parameters for info in kept)
    total = kept_count + sum(info.parameters for info in pruned)
    return f"{kept_count:,} of {total:,}: {100 * (total - kept_count) / total:.1f} % pruned"


def _storage(kept: Sequence[TensorInfo]) -> str:
    dtypes = {info.dtype for info in kept if not info.is_scale}
    return ", ".join(
        str(dtype).removeprefix("torch.")
        + (" with a scale for each row" if dtype == torch.int8 else "")
        for dtype in sorted(dtypes, key=str)
    )


def _scaling(spec: HeadSpec) -> str:
    if spec.rope_scaling is None:
        return "none (YaRN beyond the trained length)"
    return ", ".join(f"{key}={value}" for key, value in spec.rope_scaling.items())


def _norms(spec: HeadSpec) -> str:
    extra = {
        "norm before fc": spec.norm_before_fc,
        "a norm for each layer before fc": spec.fc_norm,
        "q and k norm": spec.qk_norm,
    }
    return ", ".join(
        ["embedding", "feature", *(name for name, present in extra.items() if present)]
    )


def _drafts(head: HeadCheckpoint) -> str:
    if head.spec.format == "specontext":
        return "no: a head for retrieval alone; `specontext distill --format eagle3` makes both"
    if any(info.name.endswith("v_proj.weight") for info in head.pruned):
        return "yes: a whole draft model"
    return "no: what only drafts is not in it"


def _mlps(spec: HeadSpec) -> str:
    widths = {"queries": spec.q_mlp, "keys": spec.k_mlp}
    given = [f"{width} wide for {kind}" for kind, width in widths.items() if width]
    return ", ".join(given) or "none"
