"""Options that the commands on real text have in common."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

ModelFolder = Annotated[Path, typer.Option(help="Model folder.")]
TestTexts = Annotated[
    list[Path],
    typer.Option(help="Plain text file, or folder of such, that no head was trained on."),
]
NamedHeads = Annotated[
    list[str] | None,
    typer.Option(help="NAME=FOLDER of a retrieval head. Default: the model's own."),
]
