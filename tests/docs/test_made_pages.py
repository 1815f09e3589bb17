"""The parts of docs/ that come from the code are what the code gives (scripts/make_docs.py)."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from typing import Literal

import pytest
from annotated_types import Ge, Gt, Le

from specontext_vllm.config import SpeContextConfig

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def make_docs():
    spec = importlib.util.spec_from_file_location("make_docs", ROOT / "scripts" / "make_docs.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def test_the_pages_are_what_the_code_gives(make_docs):
    found = [str(path.relative_to(ROOT)) for path in make_docs.stale()]
    assert not found, f"{', '.join(found)}: stale; run make docs and commit"


def test_a_page_holds_every_part(make_docs):
    text = "".join(path.read_text() for path in (ROOT / "docs").rglob("*.md"))
    parts = [found[2] for found in make_docs.MADE.finditer(text)]
    assert sorted(parts) == sorted(make_docs.PARTS)


def test_a_stale_page_is_found_and_mended(make_docs, tmp_path):
    marker = "<!-- made by `make docs`: settings -->\n"
    (tmp_path / "a.md").write_text(f"before\n{marker}| `budget` | 1024 |\n<!-- end -->\nafter\n")
    ((path, text),) = make_docs.stale(tmp_path).items()
    assert text.startswith(f"before\n{marker}") and text.endswith("<!-- end -->\nafter\n")
    assert "`budget` | integer > 0 | `2048`" in text
    path.write_text(text)
    assert not make_docs.stale(tmp_path)


def test_a_part_that_nothing_makes_is_an_error(make_docs, tmp_path):
    (tmp_path / "a.md").write_text("<!-- made by `make docs`: nothing -->\n<!-- end -->\n")
    with pytest.raises(KeyError, match="nothing"):
        make_docs.stale(tmp_path)


@pytest.mark.parametrize("name", SpeContextConfig.model_fields)
def test_every_setting_says_what_it_does(name):
    description = SpeContextConfig.model_fields[name].description
    assert description and description.endswith(".")


@pytest.mark.parametrize(
    ("annotation", "metadata", "text"),
    [
        (bool, [], "`true`, `false`"),
        (int, [Gt(0)], "integer > 0"),
        (float, [Ge(0), Le(1)], "number, 0 to 1"),
        (int | None, [Ge(1)], "integer ≥ 1"),
        (Literal["a", "b"], [], "`a`, `b`"),
        (float | Literal["auto"], [], "number or `auto`"),
        (str | None, [], "text"),
    ],
)
def test_what_a_setting_accepts_in_words(make_docs, annotation, metadata, text):
    assert make_docs.type_text(annotation, metadata) == text
