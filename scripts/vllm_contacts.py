"""Where this package touches vLLM, read from the sources of both without importing either.

Four kinds of contact, each with its mark (docs/developer/port_vllm.md):

- an import of a vLLM name: the module's docstring has a line ``vLLM: what it needs of it``. A name
  that has moved between two releases is imported with ``try`` and ``except ImportError``;
- a method that overrides one of vLLM's: its docstring has ``Overrides: dotted.name``, or its
  class's has ``Implements: dotted.name`` where vLLM's class is an interface for plugins;
- an assignment to an attribute of a vLLM class, module or object, and
- a use of one of vLLM's private names: the docstring of the function or its class says
  ``Symptom:``, ``Reason:`` and ``Remove when:``.

What an expression that is assigned to or read belongs to, the sources do not tell. So a function
names it in its docstring: ``Uses: dotted.name``, with commas between several. It is listed and must
exist. The same line may name what else the function needs of vLLM, such as an undocumented
attribute.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from scripts.vllm_sources import (
    dotted,
    exists_in_vllm,
    imports_of,
    resolve,
    vllm_ancestors,
    vllm_members,
)

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "specontext_vllm"
REASONS = ("Symptom", "Reason", "Remove when")
NAMED_TUPLE = {"_asdict", "_fields", "_replace"}
"""Public though they begin with an underscore."""


@dataclass
class Contact:
    """One place where this package touches vLLM.

    Attributes:
        kind: ``import``, ``override``, ``assignment``, ``private`` or ``use``.
        where: our ``module.Class.function``.
        what: vLLM's dotted name, or the expression that is assigned to or read.
        marks: values of the marks found, by name.
        summary: first paragraph of the docstring.
        missing: what the mark lacks; None: nothing.
    """

    kind: str
    where: str
    what: str
    marks: dict[str, str] = field(default_factory=dict)
    summary: str = ""
    missing: str | None = None


def marks_of(docstring: str | None) -> dict[str, str]:
    """The marks in a docstring: a line ``Name: text``, and the indented lines after it."""
    found = {}
    pattern = r"^(vLLM|Overrides|Implements|Uses|Symptom|Reason|Remove when):\s+(.+(?:\n +\S.*)*)"
    for name, text in re.findall(pattern, docstring or "", re.M):
        found[name] = " ".join(text.split())
    return found


def summary_of(docstring: str | None) -> str:
    return " ".join((docstring or "").split("\n\n")[0].split())


def moved_names(tree: ast.AST) -> dict[str, str]:
    """Local name -> dotted name in the installed vLLM, of names that are imported from one module
    of vLLM with ``try``, and from another one, for another release, with ``except ImportError``.
    """
    found = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Try):
            for branch in (node.body, *(handler.body for handler in node.handlers)):
                names = imports_of(ast.Module(branch, []))
                found |= {
                    local: name
                    for local, name in names.items()
                    if name.startswith("vllm.") and exists_in_vllm(name)
                }
    return found


Definition = ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef


class OurModule:
    """One of our modules: its definitions, and which names come from vLLM."""

    def __init__(self, path: Path, root: Path) -> None:
        self.tree = ast.parse(path.read_text())
        self.name = ".".join(path.relative_to(root).with_suffix("").parts)
        package = self.name.rpartition(".")[0]
        self.names = imports_of(self.tree, package) | moved_names(self.tree)
        self.marks = marks_of(ast.get_docstring(self.tree))

    def walk(self) -> Iterator[tuple[ast.AST, tuple[Definition, ...]]]:
        """Every node, and the definitions it stands in, outermost first."""
        stack: list[tuple[ast.AST, tuple[Definition, ...]]] = [(self.tree, ())]
        while stack:
            node, outer = stack.pop()
            yield node, outer
            inner = (*outer, node) if isinstance(node, Definition) else outer
            stack += [(child, inner) for child in ast.iter_child_nodes(node)]

    def place(self, outer: tuple[Definition, ...]) -> str:
        return ".".join([self.name.removeprefix("specontext_vllm."), *(d.name for d in outer)])


class Package:
    """All modules of this package."""

    def __init__(self, folder: Path = PACKAGE) -> None:
        self.modules = [OurModule(path, folder.parent) for path in sorted(folder.rglob("*.py"))]
        self.classes: dict[str, tuple[OurModule, ast.ClassDef]] = {}
        self.own_names: set[str] = set()
        for module in self.modules:
            for node, _ in module.walk():
                if isinstance(node, ast.ClassDef):
                    self.classes[f"{module.name}.{node.name}"] = module, node
        for module in self.modules:
            for node, outer in module.walk():
                owner = _class_around(outer)
                if owner is not None:
                    self.own_names |= _names_defined_by(node) - set(
                        self.members_of_bases(module, owner)
                    )

    def vllm_bases(self, module: OurModule, definition: ast.ClassDef) -> list[str]:
        """vLLM's classes that one of our classes derives from, through our own ones too."""
        found = []
        for base in definition.bases:
            name = resolve(base, module.names) or ""
            if name.startswith("vllm."):
                found.append(name)
            ours = self.classes.get(name) or self.classes.get(f"{module.name}.{name}")
            if ours is not None and ours[1] is not definition:
                found += self.vllm_bases(*ours)
        return found

    def members_of_bases(self, module: OurModule, definition: ast.ClassDef) -> dict[str, str]:
        members: dict[str, str] = {}
        for base in self.vllm_bases(module, definition):
            derived = vllm_ancestors(base)
            for name, owner in vllm_members(base).items():
                # As Python resolves them: a class before those that it derives from.
                if members.get(name) in (None, *derived):
                    members[name] = owner
        return members


def _class_around(outer: tuple[Definition, ...]) -> ast.ClassDef | None:
    return next((d for d in reversed(outer) if isinstance(d, ast.ClassDef)), None)


def _names_defined_by(node: ast.AST) -> set[str]:
    """Names of methods and attributes that a node of one of our classes defines."""
    if isinstance(node, Definition):
        return {node.name}
    if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
        return {node.attr} if dotted(node.value) in ("self", "cls") else set()
    if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
        return {node.target.id}
    return set()


def contacts(package: Package) -> list[Contact]:
    """Every contact with vLLM, in the order of our modules."""
    found = []
    for module in package.modules:
        found += _imports(module)
        touches = any(name.split(".")[0] == "vllm" for name in module.names.values())
        for node, outer in module.walk():
            if isinstance(node, ast.ClassDef):
                found += _overrides(package, module, node, outer)
            if touches or module.name.startswith("specontext_vllm.engine."):
                found += _assignments(package, module, node, outer)
                found += _privates(package, module, node, outer)
            if isinstance(node, Definition):
                found += _uses(module, node, outer)
    return sorted(found, key=lambda contact: (contact.kind, contact.where, contact.what))


def unmarked(package: Package) -> list[str]:
    """A sentence for each contact whose mark is missing or wrong."""
    return [f"{c.where}: {c.what}: {c.missing}" for c in contacts(package) if c.missing]


def _imports(module: OurModule) -> list[Contact]:
    names = sorted(
        {name for name in module.names.values() if name == "vllm" or name.startswith("vllm.")}
    )
    missing = None if "vLLM" in module.marks else "the module's docstring has no line vLLM:"
    return [
        Contact(
            "import",
            module.name.removeprefix("specontext_vllm."),
            name,
            module.marks,
            missing=missing if exists_in_vllm(name) else "not in the installed vLLM",
        )
        for name in names
    ]


def _overrides(
    package: Package, module: OurModule, node: ast.ClassDef, outer: tuple[Definition, ...]
) -> list[Contact]:
    members = package.members_of_bases(module, node)
    if not members:
        return []
    class_marks = marks_of(ast.get_docstring(node))
    found = []
    for method in node.body:
        if isinstance(method, ast.Assign | ast.AnnAssign):
            found += _overridden_values(package, module, method, (*outer, node), members)
        if not isinstance(method, ast.FunctionDef):
            continue
        docstring = ast.get_docstring(method)
        marks = marks_of(docstring)
        if method.name not in members and "Overrides" not in marks:
            continue
        theirs = f"{members.get(method.name)}.{method.name}"
        missing = None
        if method.name not in members:
            theirs, missing = marks["Overrides"], "not in the installed vLLM"
        elif "Overrides" in marks:
            if marks["Overrides"] != theirs:
                missing = f"the mark names {marks['Overrides']}"
        elif "Implements" not in class_marks:
            missing = f"its docstring has no line Overrides: {theirs}"
        summary = summary_of(docstring) if "Overrides" in marks else ""
        found.append(
            Contact(
                "override",
                module.place((*outer, node, method)),
                theirs,
                class_marks | marks,
                "" if summary.startswith("Overrides:") else summary,
                missing,
            )
        )
    return found


def _overridden_values(
    package: Package,
    module: OurModule,
    node: ast.Assign | ast.AnnAssign,
    outer: tuple[Definition, ...],
    members: dict[str, str],
) -> list[Contact]:
    """Class attributes that stand in for vLLM's; an interface's need no mark of their own."""
    targets = node.targets if isinstance(node, ast.Assign) else [node.target]
    class_marks = marks_of(ast.get_docstring(outer[-1]))
    missing = None if "Implements" in class_marks else "its class's docstring has no Implements:"
    return [
        Contact(
            "override",
            f"{module.place(outer)}.{target.id}",
            f"{members[target.id]}.{target.id}",
            class_marks,
            missing=missing,
        )
        for target in targets
        if isinstance(target, ast.Name) and target.id in members
    ]


def _reasons(outer: tuple[Definition, ...]) -> tuple[dict[str, str], str, str | None]:
    """The innermost reasons around a node, the summary with them, and what is missing."""
    for definition in reversed(outer):
        docstring = ast.get_docstring(definition)
        marks = marks_of(docstring)
        if all(part in marks for part in REASONS):
            return marks, summary_of(docstring), None
    return {}, "", f"no docstring around it says {', '.join(f'{part}:' for part in REASONS)}"


def _assignments(
    package: Package, module: OurModule, node: ast.AST, outer: tuple[Definition, ...]
) -> list[Contact]:
    targets: list[ast.expr] = []
    if isinstance(node, ast.Assign):
        targets = node.targets
    elif isinstance(node, ast.AugAssign):
        targets = [node.target]
    elif isinstance(node, ast.Call) and dotted(node.func) == "setattr":
        if ast.unparse(node.args[0]) not in ("self", "cls"):
            targets = [ast.Attribute(node.args[0], ast.unparse(node.args[1]), ast.Store())]
    flat = [
        part for t in targets for part in (t.elts if isinstance(t, ast.Tuple | ast.List) else [t])
    ]
    found = []
    for target in flat:
        if not isinstance(target, ast.Attribute) or target.attr.startswith("_specontext"):
            continue
        root = dotted(target.value)
        if root in ("self", "cls"):
            definition = _class_around(outer)
            if definition is None or target.attr not in package.members_of_bases(
                module, definition
            ):
                continue
            if "Implements" in marks_of(ast.get_docstring(definition)):
                continue  # an interface asks for them
        elif target.attr in package.own_names:
            continue
        marks, summary, missing = _reasons(outer)
        found.append(
            Contact("assignment", module.place(outer), ast.unparse(target), marks, summary, missing)
        )
    return found


def _privates(
    package: Package, module: OurModule, node: ast.AST, outer: tuple[Definition, ...]
) -> list[Contact]:
    if not isinstance(node, ast.Attribute) or not isinstance(node.ctx, ast.Load):
        return []
    name = node.attr
    if not name.startswith("_") or name.startswith("__") or name in NAMED_TUPLE:
        return []
    if name.startswith("_specontext") or any(definition.name == name for definition in outer):
        return []  # our own, or what an override overrides
    definition, root = _class_around(outer), ast.unparse(node.value)
    if definition is not None and root in ("self", "cls", "super()"):
        if name not in package.members_of_bases(module, definition):
            if name in package.own_names:
                return []
            gone = "neither ours nor in the installed vLLM"
            return [Contact("private", module.place(outer), ast.unparse(node), missing=gone)]
    elif name in package.own_names:
        return []
    marks, summary, missing = _reasons(outer)
    return [Contact("private", module.place(outer), ast.unparse(node), marks, summary, missing)]


def _uses(module: OurModule, node: Definition, outer: tuple[Definition, ...]) -> list[Contact]:
    docstring = ast.get_docstring(node)
    names = marks_of(docstring).get("Uses", "")
    return [
        Contact(
            "use",
            module.place((*outer, node)),
            name,
            summary=summary_of(docstring),
            missing=None if exists_in_vllm(name) else "not in the installed vLLM",
        )
        for name in filter(None, re.split(r",\s*|\s+", names))
    ]
