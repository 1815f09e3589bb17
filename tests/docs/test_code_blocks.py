"""Commands and programs in the pages' code blocks are ones that exist."""

from __future__ import annotations

import ast
import json
import re
from functools import cache
from typing import get_args, get_type_hints

import pytest
import typer

from specontext_vllm.cli import app
from specontext_vllm.config import ConfigError, SpeContextConfig
from tests.docs.pages import PAGES, ROOT, blocks, commands, name

COMMANDS = [
    pytest.param(words, id=f"{name(page)}: {' '.join(words)[:60]}")
    for page in PAGES
    for words in commands(page.read_text())
]
PROGRAMS = [
    pytest.param(block, id=f"{name(page)} {number}")
    for page in PAGES
    for number, block in enumerate(blocks(page.read_text(), "python"))
]


def options(run) -> set[str]:
    """The options of a typer command."""
    known = set()
    for parameter, hint in get_type_hints(run, include_extras=True).items():
        info = get_args(hint)[1] if get_args(hint)[1:] else None
        if isinstance(info, typer.models.OptionInfo):
            given = [text for text in (info.default, *(info.param_decls or ())) if text is not ...]
            known |= set(given) or {"--" + parameter.replace("_", "-")}
    return known


@cache
def vllm_options() -> set[str]:
    from vllm.entrypoints.launchers.cli_args import make_arg_parser
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    parser = make_arg_parser(FlexibleArgumentParser())
    return {option for action in parser._actions for option in action.option_strings}


def mistakes(words: list[str]) -> list[str]:
    """What is wrong with a command, as far as it is one of ours or vLLM's."""
    used = {word.split("=")[0] for word in words if re.match(r"--\w", word)}
    if words[0] == "make":
        targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
        return [word for word in words[1:] if "=" not in word and word not in targets]
    if words[0] == "specontext":
        runs = {c.name or c.callback.__name__: c.callback for c in app.registered_commands}
        if words[1] == "--version":
            return []
        return sorted(used - options(runs[words[1]])) if words[1] in runs else [words[1]]
    if words[:3] == ["accelerate", "launch", "-m"]:
        return mistakes(["specontext", *words[4:]])
    if words[:2] == ["vllm", "serve"]:
        wrong = sorted(used - vllm_options())
        if "--additional-config" in words:
            given = json.loads(words[words.index("--additional-config") + 1])
            try:
                SpeContextConfig.from_additional_config(given)
            except ConfigError as error:
                wrong.append(str(error))
        return wrong
    return []


@pytest.mark.parametrize("words", COMMANDS)
def test_a_command_exists_with_its_options(words):
    assert not mistakes(words)


@pytest.mark.parametrize(
    "words",
    [
        ["make", "nothing"],
        ["specontext", "nothing"],
        ["specontext", "plan", "--nothing", "1"],
        ["vllm", "serve", "M", "--nothing"],
        ["vllm", "serve", "M", "--additional-config", '{"specontext": {"buget": 1}}'],
    ],
)
def test_a_mistake_is_found(words):
    assert mistakes(words)


@pytest.mark.parametrize("program", PROGRAMS)
def test_a_program_parses_and_its_settings_are_valid(program):
    for node in ast.walk(ast.parse(program)):
        if isinstance(node, ast.keyword) and node.arg == "additional_config":
            SpeContextConfig.from_additional_config(ast.literal_eval(node.value))


def test_every_benchmark_is_listed_and_those_that_are_named_exist():
    from benchmarks.__main__ import app as cases

    names = {command.name or command.callback.__name__ for command in cases.registered_commands}
    names |= {group.name for group in cases.registered_groups}
    listing = (ROOT / "docs" / "developer" / "benchmarks.md").read_text()
    rows = re.findall(r"^\| (`.*?) \|", listing, re.MULTILINE)
    assert {code.split()[0] for row in rows for code in re.findall(r"`([^`]+)`", row)} == names
    text = "".join(page.read_text() for page in PAGES)
    assert set(re.findall(r"python -m benchmarks (\w+)", text)) <= names | {"CASE"}


def test_the_readme_is_short():
    from tests.docs.pages import prose

    text = re.sub(r"\]\([^)]*\)", "]", prose((ROOT / "README.md").read_text()))
    words = [word for word in text.split() if re.search(r"\w", word)]
    assert len(words) <= 600, f"{len(words)} words"
