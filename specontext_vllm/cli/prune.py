"""`specontext prune`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from specontext_vllm.cli.options import AllowPickle, HeadCheckpointName, Revision
from specontext_vllm.cli.refusals import refusals
from specontext_vllm.retrieval.checkpoint import (
    HeadError,
    checkpoint_folder,
    prune_head,
    read_checkpoint,
)


def prune(
    head: HeadCheckpointName,
    out: Annotated[Path, typer.Argument(help="New folder for what the retrieval head keeps.")],
    int8: Annotated[
        bool,
        typer.Option("--int8", help="Store matrices in 8 bits, with a scale for each row."),
    ] = False,
    revision: Revision = None,
    allow_pickle: AllowPickle = False,
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
