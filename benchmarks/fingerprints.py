"""Digests of what a figure was measured with, so that others do not take its place."""

from __future__ import annotations

import hashlib
from pathlib import Path

SAMPLE = 2**20
"""Bytes at each end of a weight file that its digest covers, besides its size."""


def code_digest(*scoring: Path) -> str:
    """Of the code that makes the replies, and of the files that score them."""
    plugin = Path(__file__).parents[1] / "specontext_vllm"
    packages = ("attention", "engine", "residency", "retrieval", "triton_kernels")
    files = [*scoring, *plugin.glob("*.py")]
    # A package may be a link to a folder beside it, which rglob would not enter by itself.
    files += [file for name in packages for file in (plugin / name).resolve().rglob("*.py")]
    return hashlib.sha256(b"".join(file.read_bytes() for file in sorted(files))).hexdigest()[:16]


def folder_digest(folder: Path) -> str:
    """Of a model's or head's folder: its config, and size, beginning and end of each weight file;
    the same wherever the folder lies.
    """
    digest = hashlib.sha256()
    files = [folder / "config.json", *sorted(folder.glob("*.safetensors"))]
    for file in files:
        if not file.exists():
            continue
        size = file.stat().st_size
        digest.update(f"{file.name} {size}".encode())
        with file.open("rb") as content:
            digest.update(content.read(SAMPLE))
            content.seek(max(0, size - SAMPLE))
            digest.update(content.read(SAMPLE))
    return digest.hexdigest()[:16]
