"""Options that several commands have."""

from __future__ import annotations

from typing import Annotated

import typer

HeadCheckpointName = Annotated[
    str, typer.Argument(help="Checkpoint of a head: a folder or a Hugging Face hub id.")
]
Revision = Annotated[
    str | None, typer.Option(help="Commit, tag or branch of a hub id; default main.")
]
AllowPickle = Annotated[
    bool,
    typer.Option("--allow-pickle", help="Open pytorch_model.bin where there are no safetensors."),
]
