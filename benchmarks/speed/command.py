"""The command `speed` and its parts."""

from __future__ import annotations

import typer

from benchmarks.speed.decode_steps import steps
from benchmarks.speed.paper import edge, paper
from benchmarks.speed.service import serve

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
PARTS = (steps, serve, paper, edge)
for part in PARTS:
    app.command()(part)


@app.callback(invoke_without_command=True)
def main(context: typer.Context) -> None:
    """Specontext against every alternative. Without a part: all parts with their defaults. Exit
    code 1 if anything failed.
    """
    if context.invoked_subcommand is None:
        failed = False
        for part in PARTS:
            try:
                part()
            except typer.Exit as ended:
                failed |= ended.exit_code != 0
        raise typer.Exit(1 if failed else 0)
