"""Writes what docs/ takes from the code: settings, metrics, commands, models (`make docs`).

A page holds prose written by hand and, between two marker lines, a part that is made here:

    <!-- made by `make docs`: settings -->
    ...
    <!-- end -->

With ``--check`` nothing is written, and the exit code is 1 if a page is not what the code gives.
"""

from __future__ import annotations

import argparse
import inspect
import json
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"
MADE = re.compile(r"(<!-- made by `make docs`: ([\w-]+) -->\n)(.*?)(<!-- end -->)", re.DOTALL)


def table(heading: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table; cells may hold pipes and line breaks."""

    def line(cells: Sequence[str]) -> str:
        return "| " + " | ".join(" ".join(c.split()).replace("|", "\\|") for c in cells) + " |"

    return "\n".join([line(heading), "|" + "---|" * len(heading), *map(line, rows)]) + "\n"


# --- settings ---


def type_text(annotation: Any, metadata: Sequence[Any] = ()) -> str:
    """What a setting accepts, in words: choices, or a kind of value and its range."""
    if get_origin(annotation) is Literal:
        return ", ".join(f"`{choice}`" for choice in get_args(annotation))
    if get_origin(annotation) in (Union, UnionType):
        kinds = [kind for kind in get_args(annotation) if kind is not type(None)]
        return " or ".join(type_text(kind, metadata) for kind in kinds)
    if get_origin(annotation) is dict:
        return "object"
    name = {bool: "`true`, `false`", int: "integer", float: "number", str: "text"}[annotation]
    ends = {
        key: getattr(entry, key)
        for entry in metadata
        for key in ("gt", "ge", "le")
        if hasattr(entry, key)
    }
    if ends.keys() == {"ge", "le"}:
        return f"{name}, {ends['ge']:g} to {ends['le']:g}"
    signs = {"gt": ">", "ge": "≥", "le": "≤"}
    return " ".join([name, *(f"{signs[key]} {end:g}" for key, end in ends.items())])


def _json(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def rule_text(name: str) -> str:
    """What the first paragraph of a rule's docstring says."""
    from specontext_vllm.retrieval.rules import find_rule

    text = " ".join(inspect.cleandoc(find_rule(name).__doc__ or "").split("\n\n")[0].split())
    return f"`{name}`: {text[0].lower()}{text[1:]}"


def settings() -> str:
    """The settings of ``SpeContextConfig``, in its order."""
    from specontext_vllm.config import SpeContextConfig
    from specontext_vllm.retrieval.rules import listed_rules

    rows = []
    for name, field in SpeContextConfig.model_fields.items():
        found = field.get_default(call_default_factory=True)
        default = "–" if found is None else f"`{_json(found)}`"
        values, meaning = type_text(field.annotation, field.metadata), field.description or ""
        if name == "retriever":
            values = ", ".join(f"`{rule}`" for rule in listed_rules())
            meaning = " ".join([meaning, *map(rule_text, listed_rules())])
        rows.append((f"`{name}`", values, default, meaning))
    return table(("setting", "values", "default", "meaning"), rows)


# --- metrics ---


def metrics() -> str:
    """What /metrics gains, in the catalog's order."""
    from specontext_vllm.observability.catalog import METRICS

    return table(
        ("name", "type", "unit", "by rank", "meaning"),
        [(f"`{m.name}`", m.kind, m.unit, "yes" if m.per_rank else "", m.text) for m in METRICS],
    )


# --- commands ---


def command_section(run: Callable[..., None], path: str) -> str:
    """A section for one command, from the signature and docstring of its function."""
    import typer

    hints = get_type_hints(run, include_extras=True)
    arguments, rows = [], []
    for name, parameter in inspect.signature(run).parameters.items():
        kind, info = get_args(hints[name])
        required = parameter.default is inspect.Parameter.empty
        if isinstance(info, typer.models.ArgumentInfo):
            arguments.append(name.upper())
            shown = name.upper()
        else:
            # The first name of an option stands where its default would.
            given = [text for text in (info.default, *(info.param_decls or ())) if text is not ...]
            shown = ", ".join(given) or "--" + name.replace("_", "-")
        unset = required or parameter.default is None or parameter.default is False
        default = "required" if required else "" if unset else f"`{parameter.default}`"
        choices = get_args(kind) if get_origin(kind) is Literal else ()
        listed = f" One of {', '.join(f'`{choice}`' for choice in choices)}." if choices else ""
        rows.append((f"`{shown}`", default, (info.help or "") + listed))
    usage = " ".join([path, *arguments, "[options]"])
    paragraphs = inspect.cleandoc(run.__doc__ or "").split("\n\n")
    text = "\n\n".join(" ".join(paragraph.split()) for paragraph in paragraphs)
    options = table(("argument or option", "default", "meaning"), rows)
    return f"## {path}\n\n    {usage}\n\n{text}\n\n{options}"


def commands() -> str:
    """Every command of `specontext` and the demo, with its options."""
    from specontext_vllm.cli import app
    from specontext_vllm.demo.__main__ import main as demo

    runs = {
        f"specontext {command.name or command.callback.__name__}": command.callback
        for command in app.registered_commands
    }
    runs["python -m specontext_vllm.demo"] = demo
    return "\n".join(command_section(run, path) for path, run in runs.items())


# --- vLLM ---


def vllm_contacts() -> str:
    """Where this package touches vLLM."""
    if str(ROOT) not in sys.path:
        sys.path.append(str(ROOT))
    from scripts.vllm_contacts_page import as_markdown

    return as_markdown()


def models() -> str:
    """Which of vLLM's architectures are served."""
    if str(ROOT) not in sys.path:
        sys.path.append(str(ROOT))
    from scripts.model_table import as_markdown

    return as_markdown()


def engine_arguments() -> str:
    """What becomes of vLLM's engine arguments."""
    if str(ROOT) not in sys.path:
        sys.path.append(str(ROOT))
    from scripts.engine_arguments_page import as_markdown

    return as_markdown()


PARTS: dict[str, Callable[[], str]] = {
    "settings": settings,
    "metrics": metrics,
    "commands": commands,
    "vllm-contacts": vllm_contacts,
    "models": models,
    "engine-arguments": engine_arguments,
}


def fill(text: str) -> str:
    """A page with its made parts as the code has them.

    Raises:
        KeyError: a marker names a part that is not made here.
    """
    return MADE.sub(lambda found: f"{found[1]}\n{PARTS[found[2]]()}\n{found[4]}", text)


def stale(root: Path = DOCS) -> dict[Path, str]:
    """The pages under ``root`` that are not what the code gives, and what they should be."""
    pages = {path: path.read_text() for path in sorted(root.rglob("*.md"))}
    filled = {path: fill(text) for path, text in pages.items()}
    return {path: text for path, text in filled.items() if text != pages[path]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 if stale")
    check = parser.parse_args().check
    found = stale()
    for path, text in found.items():
        print(f"{path.relative_to(ROOT)}: {'is stale, run make docs' if check else 'written'}")
        if not check:
            path.write_text(text)
    sys.exit(1 if check and found else 0)


if __name__ == "__main__":
    main()
