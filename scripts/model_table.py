"""Which of vLLM's architectures are served, with a head or with `quest`, and which are refused and
why: docs/models.toml beside what vLLM's sources say of each (`make docs`).

The sources are read as text, by the heads of classes and the imports: parsing all of the models
takes ten times as long.
"""

from __future__ import annotations

import ast
import importlib.util
import re
import tomllib
from functools import cache
from pathlib import Path
from typing import Any

FILE = Path(__file__).resolve().parents[1] / "docs" / "models.toml"
MODELS = "vllm.model_executor.models"
GENERATING = (
    "_TEXT_GENERATION_MODELS",
    "_MULTIMODAL_MODELS",
    "_TRANSFORMERS_SUPPORTED_MODELS",
)
"""The registry's tables of models that generate text."""
EAGLE3 = "SupportsEagle3"
"""What a class derives from that hands out the hidden states of an EAGLE-3 head."""
MULTIMODAL, ATTENTION_FREE = "SupportsMultiModal", "IsAttentionFree"

CLASS = re.compile(r"^class (\w+)\(((?:[^()]|\([^()]*\))*)\):", re.M)
IMPORT = re.compile(r"^[ \t]*from (\.*)([\w.]*) import (?:\(([^)]*)\)|([^\n(]+))", re.M)


@cache
def source_of(module: str) -> str:
    """A module of vLLM's, or of the package of that name; empty where there is none."""
    spec = importlib.util.find_spec("vllm")
    assert spec is not None and spec.origin is not None
    path = Path(spec.origin).parent.joinpath(*module.split(".")[1:])
    files = (path.with_suffix(".py"), path / "__init__.py")
    return next((file.read_text() for file in files if file.is_file()), "")


@cache
def is_package(module: str) -> bool:
    spec = importlib.util.find_spec("vllm")
    assert spec is not None and spec.origin is not None
    return Path(spec.origin).parent.joinpath(*module.split(".")[1:], "__init__.py").is_file()


@cache
def imports_of(module: str) -> dict[str, str]:
    """Name -> the module of vLLM's that it is imported from."""
    found = {}
    for dots, tail, several, one in IMPORT.findall(source_of(module)):
        # One dot is the package that the module is in.
        up = len(dots) - is_package(module)
        package = ".".join(module.split(".")[:-up] if up > 0 else module.split("."))
        origin = ".".join(filter(None, (package, tail))) if dots else tail
        for name in re.sub(r"#.*", "", several or one).split(","):
            local = name.split(" as ")[-1].strip()
            found[local] = origin
    return found


@cache
def interfaces_of(module: str, class_name: str) -> frozenset[str]:
    """Names of all that a class of vLLM's derives from, itself included."""
    if not module.startswith("vllm"):
        return frozenset()
    bases = dict(CLASS.findall(source_of(module))).get(class_name)
    if bases is None:  # imported there from elsewhere, or no class with bases
        origin = imports_of(module).get(class_name, "")
        above = interfaces_of(origin, class_name) if origin != module else frozenset()
        return above | {class_name}
    names = {class_name}
    for base in re.findall(r"[A-Za-z_]\w*", re.sub(r"#.*|\[[^\]]*\]|\w+=\S+", "", bases)):
        names |= interfaces_of(imports_of(module).get(base, module), base)
    return frozenset(names)


@cache
def architectures() -> dict[str, tuple[str, str]]:
    """Every architecture that vLLM generates text with -> the module and name of its class."""
    found = {}
    registry = source_of(f"{MODELS}.registry")
    for table in GENERATING:
        text = registry.partition(f"\n{table} = ")[2].partition("\n}\n")[0] + "\n}"
        for name, (module, class_name) in ast.literal_eval(text).items():
            full = module if module.startswith("vllm.") else f"{MODELS}.{module}"
            found[name] = (full, class_name)
    return found


def derives_from(architecture: str, interface: str) -> bool:
    """Whether an architecture's class has an interface of vLLM's."""
    return interface in interfaces_of(*architectures()[architecture])


def read_table() -> dict[str, Any]:
    """The file: ``tested``, architectures; ``refused`` and ``untried``, lists of tables with
    ``why`` and ``architectures``.
    """
    return tomllib.loads(FILE.read_text())


def rows() -> dict[str, list[str]]:
    """Every architecture under what is said of it."""
    table = read_table()
    refused = {f"refused: {entry['why']}": entry["architectures"] for entry in table["refused"]}
    untried = {f"not tried: {entry['why']}": entry["architectures"] for entry in table["untried"]}
    listed = {name for names in [*refused.values(), *untried.values()] for name in names}
    rest = [name for name in architectures() if name not in listed]
    free = [name for name in rest if derives_from(name, ATTENTION_FREE)]
    images = [
        name for name in rest if derives_from(name, MULTIMODAL) and name not in table["tested"]
    ]
    served = [name for name in rest if name not in {*free, *images}]
    with_head = [name for name in served if derives_from(name, EAGLE3)]
    return {
        "served, with a head or without": with_head,
        "served without a head (`quest`)": [name for name in served if name not in with_head],
        **refused,
        "refused: no attention, nothing to select from": free,
        "not tried: images or audio beside the layers of a text model": images,
        **untried,
    }


def as_markdown() -> str:
    """The table, tested architectures in bold."""
    tested = set(read_table()["tested"])
    lines = ["| | architectures |", "|---|---|"]
    for what, names in rows().items():
        marked = (f"**{name}**" if name in tested else name for name in sorted(names))
        lines.append(f"| {what} | {', '.join(marked)} |")
    return "\n".join(lines) + "\n"
