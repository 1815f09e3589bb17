"""The command `figures`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from benchmarks.figures.expressions import Difference, FigureError
from benchmarks.figures.markers import Filler
from benchmarks.figures.prose import fill_sentence, read_sentences
from benchmarks.report import RESULTS

ROOT = Path(__file__).parents[2]
SENTENCES = ROOT / "docs" / "figures.toml"


def documents(root: Path) -> list[Path]:
    """The Markdown files that are filled in."""
    return [root / "README.md", *sorted((root / "docs").rglob("*.md"))]


def fill_documents(*, redraw: bool) -> tuple[dict[Path, str], list[Difference], int]:
    """Every document that has figures as the results have it, what is otherwise now, and how many
    tables, pictures and sentences there are.

    Raises:
        FigureError: a marker or a sentence that cannot be filled.
    """
    filled: dict[Path, str] = {}
    differences: list[Difference] = []
    count = 0
    for path in documents(ROOT):
        filler = Filler(path, RESULTS, redraw=redraw)
        filled[path] = filler.fill()
        differences += filler.differences
        count += filler.count
    for sentence in read_sentences(SENTENCES):
        path = ROOT / sentence.document
        if path not in filled:
            raise FigureError(f"{SENTENCES}: there is no {sentence.document}.")
        filled[path], found = fill_sentence(sentence, filled[path], path, RESULTS)
        differences += found
        count += 1
    return filled, differences, count


def main(
    check: Annotated[
        bool, typer.Option("--check", help="Change nothing; exit code 1 if something differs.")
    ] = False,
) -> None:
    """Bring the figures in README.md and docs/ up to date with the result files: tables and the
    picture between their markers, and the sentences listed in docs/figures.toml.
    """
    try:
        filled, differences, count = fill_documents(redraw=not check)
    except FigureError as error:
        typer.echo(str(error), err=True)
        raise typer.Exit(2) from None
    if not check:
        for path, text in filled.items():
            if text != path.read_text():
                path.write_text(text)
    for difference in differences:
        print(difference)
    print(
        f"{count} tables, pictures and sentences, {len(differences)} "
        f"{'differ' if check else 'changed'}."
    )
    raise typer.Exit(1 if check and differences else 0)
