"""`specontext prune`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from specontext_vllm.cli.refusals import refusals
from specontext_vllm.retrieval.checkpoint import (
    HeadError,
    checkpoint_folder,
    prune_head,
    read_checkpoint,
)


def prune(
    head: Annotated[
        str, typer.Argument(help="Checkpoint of a head: a folder or a Hugging Face hub id.")
    ],
    out: Annotated[Path, typer.Argument(help="New folder for what the retrieval head keeps.")],
    int8: Annotated[
        bool,
        typer.Option("--int8", help="Store matrices in 8 bits, with a scale for each row."),
    ] = False,
    revision: Annotated[
        str | None, typer.Option(help="Commit, tag or branch of a hub id; default main.")
    ] = None,
    allow_pickle: Annotated[
        bool,
        typer.Option(
            "--allow-pickle", help="Open pytorch_model.bin where there are no safetensors."
        ),
    ] = False,
) -> None:
    """Write what selection needs of a head, without the LM head and the rest of a draft model.

    Exit code 2: not a usable checkpoint, or no folder to write to.
    """
    with refusals(HeadError):
        folder = checkpoint_folder(head, revision, say=lambda text: typer.echo(text, err=True))
        checkpoint = read_checkpoint(folder, allow_pickle=allow_pickle)
        prune_head(checkpoint, out, int8=int8)
        written = read_checkpoint(out).kept_bytes
    rounded = int8 and not checkpoint.is_int8
    typer.echo(
        f"Wrote {out}: {written:,} of {checkpoint.whole_bytes:,} bytes. It selects "
        f"{'nearly ' if rounded else ''}as the whole head does; it cannot serve as a draft model."
    )
