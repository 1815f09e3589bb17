"""Every link and every path that the pages name leads somewhere."""

from __future__ import annotations

import re

import pytest

from tests.docs.pages import PAGES, ROOT, name, prose

LINK = re.compile(r"\]\(([^)\s]+)\)")
CODE = re.compile(r"`([^`\n]+)`")
FOLDERS = {path.name for path in ROOT.iterdir() if path.is_dir() and path.name != "build"}
PACKAGE = ROOT / "specontext_vllm"


def anchors(text: str) -> set[str]:
    """The anchors of a page's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.+)$", prose(text), re.MULTILINE)
    plain = [re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", heading) for heading in headings]
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in plain}


def broken_links(page, text):
    for target in LINK.findall(prose(text)):
        if re.match(r"[a-z]+:", target):
            continue
        path, _, anchor = target.partition("#")
        found = (page.parent / path).resolve() if path else page
        if not found.exists():
            yield f"{target}: no such file"
        elif anchor and anchor not in anchors(found.read_text()):
            yield f"{target}: no such heading"


def missing_paths(text):
    """Paths in code style that are not there: from the root, or from inside the package."""
    for code in CODE.findall(prose(text)):
        path = re.sub(r"(::.*|#.*)", "", code)
        if not re.fullmatch(r"[\w.\-*][\w.\-/*]*", path) or "/" not in path:
            continue
        top = path.split("/")[0]
        if top in FOLDERS:
            if not list(ROOT.glob(path.rstrip("/"))):
                yield path
        elif (PACKAGE / top).is_dir() and not list(PACKAGE.glob(path.rstrip("/"))):
            yield path


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_links_lead_somewhere(page):
    assert not list(broken_links(page, page.read_text()))


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_paths_exist(page):
    assert not list(missing_paths(page.read_text()))


def test_pages_that_the_code_names_exist():
    folders = ("specontext_vllm", "triton_kernels", "benchmarks", "configs", "tests", "scripts")
    named = {
        (str(path.relative_to(ROOT)), page)
        for folder in folders
        for path in sorted((ROOT / folder).rglob("*"))
        if path.suffix in (".py", ".yaml", ".json", ".sh") and "results" not in path.parts
        for page in re.findall(r"(?<![\w/])docs/[\w/-]+\.md", path.read_text())
    }
    missing = {(path, page) for path, page in named if not (ROOT / page).exists()}
    assert named and {path for path, _ in missing} <= {"tests/docs/test_links.py"}


def test_what_leads_nowhere_is_found():
    page = ROOT / "README.md"
    text = (
        "[a](docs/nothing.md) [b](docs/README.md#nothing) [c](docs/README.md#results) `tests/no.py`"
    )
    assert list(broken_links(page, text)) == [
        "docs/nothing.md: no such file",
        "docs/README.md#nothing: no such heading",
    ]
    assert list(missing_paths(text + " `engine/no.py` `configs/demo.yaml` `10/s`")) == [
        "tests/no.py",
        "engine/no.py",
    ]


def test_every_page_of_docs_is_in_the_index():
    text = (ROOT / "docs" / "README.md").read_text()
    linked = {(ROOT / "docs" / path.split("#")[0]).resolve() for path in LINK.findall(text)}
    pages = {page for page in PAGES if (ROOT / "docs") in page.parents}
    assert pages - linked <= {ROOT / "docs" / "README.md"}


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_comments_for_machines_stand_on_lines_of_their_own(page):
    text = page.read_text()
    assert not [line for line in text.splitlines() if "<!--" in re.sub(r"^<!--.*-->$", "", line)]


def test_the_maintainers_script_runs_tests_that_exist():
    script = (ROOT / "scripts" / "maintainers" / "on_gpu.sh").read_text()
    named = re.findall(r"(?<![\w./])tests/[\w./]+", script)
    assert named and not [path for path in named if not (ROOT / path).exists()]
