"""`specontext top` and `specontext metrics`."""

from __future__ import annotations

from typing import Annotated

import typer
from rich.console import Console

from specontext_vllm.cli.refusals import check_range, refusals
from specontext_vllm.config import ConfigError

MAX_SECONDS = 86400.0


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

    with refusals(ConfigError, TopError):
        check_range("--every", every, 0.5, MAX_SECONDS)
        try:
            watch(url, every, once, Console())
        except KeyboardInterrupt:
            pass


def metrics(
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port to listen on, 1 to 65535.")] = 9464,
) -> None:
    """Serve the figures of this machine's workers when `vllm serve` runs on another machine, whose
    /metrics lacks them; Ctrl-C ends.

    Exit code 2: the address cannot be listened on.
    """
    from prometheus_client import CollectorRegistry, start_http_server

    from specontext_vllm.observability.files import MachineCollector

    registry = CollectorRegistry()
    registry.register(MachineCollector())
    with refusals(ConfigError):
        check_range("--port", port, 1, 65535)
        try:
            server, thread = start_http_server(port, host, registry)
        except (OSError, UnicodeError) as error:  # UnicodeError: a name that no host can have
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
