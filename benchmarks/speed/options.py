"""What the parts share: options, the folder of work files, the end of a run."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from benchmarks import report

MAX_REQUESTS = 32
ModelShape = Annotated[str, typer.Option(help="8b, 1b, demo or tiny; the weights are random.")]
Budget = Annotated[int, typer.Option(help="Tokens a KV head may read in a step.")]
Timed = Annotated[
    int, typer.Option(min=2, help="Timed steps of each cell; at most 32 of Hugging Face.")
]
Engines = Annotated[
    str, typer.Option(help="Comma-separated; results of the others stay as they are.")
]
EngineSeconds = Annotated[
    float, typer.Option(help="Time limit of each engine; what it measured till then is kept.")
]
Scale = Annotated[float, typer.Option(help="All lengths are multiplied by this.")]
Out = Annotated[
    Path, typer.Option(help="Folder of the result files; earlier ones there are added to.")
]
Work = Annotated[
    Path | None,
    typer.Option(
        help="Folder of the model config and the engines' logs; default a new temporary one."
    ),
]


def refusing(make: Callable[[], Any]) -> Any:
    """``make()``, or exit code 2 with the sentence of its ValueError."""
    try:
        return make()
    except ValueError as error:
        typer.echo(str(error), err=True)
        raise typer.Exit(2) from None


def work_folder(work: Path | None) -> Path:
    # Absolute, since servers and clients run in other folders and name the model by its path.
    return (work or Path(tempfile.mkdtemp(prefix="specontext-bench-"))).resolve()


def end(result: report.Report, out: Path) -> None:
    result.show()
    print(f"written: {out}", flush=True)
    raise typer.Exit(1 if result.failures else 0)
