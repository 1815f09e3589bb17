"""`python -m benchmarks CASE [options]`."""

from __future__ import annotations

import signal
from collections.abc import Callable

import typer

from benchmarks import (
    ablation,
    attention,
    choices,
    decode,
    distill,
    link,
    memory,
    sidecar,
    timeline,
    transfer,
)
from benchmarks.acceptance import command as acceptance
from benchmarks.accuracy import command as accuracy
from benchmarks.capacity import command as capacity
from benchmarks.cpu import command as cpu
from benchmarks.drafts import command as drafts
from benchmarks.figures import command as figures
from benchmarks.fuzz import command as fuzz
from benchmarks.heads import command as heads
from benchmarks.host import command as host
from benchmarks.losses import command as losses
from benchmarks.marks import command as marks
from benchmarks.real import command as real
from benchmarks.rounding import command as rounding
from benchmarks.selections import command as selections
from benchmarks.soak import command as soak
from benchmarks.speed import command as speed

app = typer.Typer(
    add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False, help=__doc__
)
CASES: dict[str, Callable[..., None]] = {
    "ablation": ablation.main,
    "acceptance": acceptance.main,
    "accuracy": accuracy.main,
    "attention": attention.main,
    "capacity": capacity.main,
    "choices": choices.main,
    "cpu": cpu.main,
    "decode": decode.main,
    "distill": distill.main,
    "drafts": drafts.main,
    "figures": figures.main,
    "fuzz": fuzz.main,
    "heads": heads.main,
    "host": host.main,
    "link": link.main,
    "losses": losses.main,
    "marks": marks.main,
    "memory": memory.main,
    "overlap": capacity.overlap,
    "real": real.main,
    "rounding": rounding.main,
    "selections": selections.main,
    "sidecar": sidecar.main,
    "soak": soak.main,
    "timeline": timeline.main,
    "transfer": transfer.main,
}
for name, case in CASES.items():
    app.command(name)(case)
app.add_typer(speed.app, name="speed")


# Engines run in spawned children, which import this module again under another name.
if __name__ == "__main__":
    # A run that is told to end leaves through its ``finally`` blocks, so that no engine outlives
    # it.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    app()
