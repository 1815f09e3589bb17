"""The table of docs/engine-arguments.md, from docs/engine_arguments.toml (`make docs`)."""

from __future__ import annotations

import tomllib
from pathlib import Path

FILE = Path(__file__).resolve().parents[1] / "docs" / "engine_arguments.toml"

SERVED, OTHER, OURS, STOCK, ELSEWHERE, FAILED = (
    "served",
    "served, with other tokens than vLLM's",
    "refused",
    "refused by vLLM itself",
    "not started on a CPU",
    "misbehaves",
)
OUTCOMES = (SERVED, OTHER, OURS, STOCK, ELSEWHERE, FAILED)


def read_file() -> dict[str, dict[str, str]]:
    """Argument -> value, outcome and sentence."""
    return tomllib.loads(FILE.read_text())


def as_markdown() -> str:
    """The arguments by what becomes of them."""
    by_outcome: dict[str, list[tuple[str, dict[str, str]]]] = {outcome: [] for outcome in OUTCOMES}
    for name, entry in read_file().items():
        by_outcome[entry["outcome"]].append((name, entry))
    served = ", ".join(f"`{name}`" for name, _ in by_outcome[SERVED])
    lines = [f"**Served, with stock's tokens** ({len(by_outcome[SERVED])}): {served}.", ""]
    for outcome in OUTCOMES[1:]:
        if not (entries := by_outcome[outcome]):
            continue
        lines += ["", f"**{outcome[0].upper()}{outcome[1:]}** ({len(entries)})", ""]
        lines += ["| argument | value | |", "|---|---|---|"]
        for name, entry in entries:
            value = f"`{entry['value']}`" if entry["value"] else ""
            said = " ".join(entry["sentence"].split()).replace("|", "\\|").replace("<", "&lt;")
            lines.append(f"| `{name}` | {value} | {said} |")
    return "\n".join(lines) + "\n"
