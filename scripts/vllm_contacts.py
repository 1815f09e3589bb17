"""Where this package touches vLLM, read from the sources of both without importing either.

Four kinds of contact, each with its mark (docs/developer/port_vllm.md):

- an import of a vLLM name: the module's docstring has a line ``vLLM: what it needs of it``;
- a method that overrides one of vLLM's: its docstring has ``Overrides: dotted.name``, or its
  class's has ``Implements: dotted.name`` where vLLM's class is an interface for plugins;
- an assignment to an attribute of a vLLM class, module or object, and
- a use of one of vLLM's private names: the docstring of the function or its class says
  ``Symptom:``, ``Reason:`` and ``Remove when:``.

What else a function needs of vLLM without being able to say so in code, such as an undocumented
attribute, it may name in its docstring: ``Uses: dotted.name``. It is listed and must exist.
"""

from __future__ import annotations

import ast
import importlib.util
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

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


# --- vLLM's sources ---


@cache
def source_of(module: str) -> ast.Module | None:
    """The parsed source of a module of vLLM; None if there is none."""
    try:
        spec = importlib.util.find_spec(module)
    except ModuleNotFoundError:
        return None
    if spec is None or spec.origin is None or not spec.origin.endswith(".py"):
        return None
    return ast.parse(Path(spec.origin).read_text())


def imports_of(tree: ast.AST, package: str = "") -> dict[str, str]:
    """Local name -> dotted name of what a source imports anywhere."""
    names = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                names[alias.asname or alias.name.partition(".")[0]] = (
                    alias.name if alias.asname else alias.name.partition(".")[0]
                )
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                base = ".".join([*package.split(".")[: -node.level + 1 or None], base]).strip(".")
            for alias in node.names:
                names[alias.asname or alias.name] = f"{base}.{alias.name}"
    return names


def dotted(node: ast.expr) -> str | None:
    """``a.b.c`` of an expression that is only names; a generic's name without its parameters."""
    if isinstance(node, ast.Subscript):
        return dotted(node.value)
    if isinstance(node, ast.Attribute):
        return f"{base}.{node.attr}" if (base := dotted(node.value)) else None
    return node.id if isinstance(node, ast.Name) else None


def resolve(node: ast.expr, names: dict[str, str]) -> str | None:
    """The dotted name of an expression, through the imports ``names``."""
    name = dotted(node)
    if name is None:
        return None
    first, _, rest = name.partition(".")
    return ".".join(filter(None, [names.get(first, first), rest]))


@cache
def vllm_members(name: str) -> dict[str, str]:
    """Methods and attributes of a vLLM class -> the class that defines them, bases included.

    Args:
        name: ``vllm.module.Class``.
    """
    module, _, class_name = name.rpartition(".")
    found = _class_in(module, class_name)
    if found is None:
        tree = source_of(module) if module.startswith("vllm") else None
        # Perhaps imported there from elsewhere.
        origin = None if tree is None else imports_of(tree, module).get(class_name)
        return vllm_members(origin) if origin not in (None, name) else {}
    own = {}
    for node in ast.walk(found):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            own[node.name] = name
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            if isinstance(node.value, ast.Name) and node.value.id == "self":
                own[node.attr] = name
        elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            own[node.target.id] = name
        elif isinstance(node, ast.Assign):
            own |= {t.id: name for t in node.targets if isinstance(t, ast.Name)}
    inherited: dict[str, str] = {}
    for base in found.bases:
        inherited = vllm_members(_base_name(base, module)) | inherited
    return inherited | own


@cache
def vllm_ancestors(name: str) -> frozenset[str]:
    """The vLLM classes that a vLLM class derives from."""
    module, _, class_name = name.rpartition(".")
    found = _class_in(module, class_name)
    if found is None:
        return frozenset()
    bases = [_base_name(base, module) for base in found.bases]
    return frozenset(bases).union(*map(vllm_ancestors, bases))


def _class_in(module: str, class_name: str) -> ast.ClassDef | None:
    tree = source_of(module) if module.startswith("vllm") else None
    nodes = () if tree is None else ast.walk(tree)
    return next((n for n in nodes if isinstance(n, ast.ClassDef) and n.name == class_name), None)


def _base_name(base: ast.expr, module: str) -> str:
    tree = source_of(module)
    name = resolve(base, {} if tree is None else imports_of(tree, module)) or ""
    return name if "." in name else f"{module}.{name}"


def exists_in_vllm(name: str) -> bool:
    """Whether ``vllm.module[.Class][.member]`` is in the installed vLLM's sources."""
    module, rest = name, []
    while module and source_of(module) is None:
        module, _, last = module.rpartition(".")
        rest.insert(0, last)
    tree = source_of(module) if module else None
    if tree is None or not rest:
        return tree is not None
    if len(rest) > 1:
        return rest[1] in vllm_members(f"{module}.{rest[0]}")
    defined = {getattr(node, "name", None) for node in tree.body} | set(imports_of(tree))
    for node in ast.walk(tree):
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            defined.add(node.id)
    return rest[0] in defined


# --- our sources ---


def marks_of(docstring: str | None) -> dict[str, str]:
    """The marks in a docstring: a line ``Name: text``, and the indented lines after it."""
    found = {}
    pattern = r"^(vLLM|Overrides|Implements|Uses|Symptom|Reason|Remove when): (.+(?:\n +\S.*)*)"
    for name, text in re.findall(pattern, docstring or "", re.M):
        found[name] = " ".join(text.split())
    return found


def summary_of(docstring: str | None) -> str:
    return " ".join((docstring or "").split("\n\n")[0].split())


Definition = ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef


class OurModule:
    """One of our modules: its definitions, and which names come from vLLM."""

    def __init__(self, path: Path, root: Path) -> None:
        self.tree = ast.parse(path.read_text())
        self.name = ".".join(path.relative_to(root).with_suffix("").parts)
        package = self.name.rpartition(".")[0]
        self.names = imports_of(self.tree, package)
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
        if not isinstance(method, ast.FunctionDef) or method.name not in members:
            continue
        docstring = ast.get_docstring(method)
        marks = marks_of(docstring)
        theirs = f"{members[method.name]}.{method.name}"
        missing = None
        if "Overrides" in marks:
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
            return []
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


# --- the page ---


def as_markdown(package: Package | None = None) -> str:
    """The made part of docs/developer/port_vllm.md."""
    found = contacts(package or Package())
    by_kind = {kind: [c for c in found if c.kind == kind] for kind in KINDS}
    return "\n".join(
        [
            "### Replaced in memory, set, or private\n",
            _reasons_table(by_kind["assignment"] + by_kind["private"]),
            "### Overridden methods\n",
            _overrides_table(by_kind["override"]),
            "### Interfaces implemented\n",
            _interfaces_table(by_kind["override"]),
            "### Read or called though no interface promises it\n",
            _uses_table(by_kind["use"]),
            "### Imported names\n",
            _imports_table(by_kind["import"]),
        ]
    )


KINDS = ("assignment", "private", "override", "use", "import")


def _table(heading: list[str], rows: list[list[str]]) -> str:
    lines = [heading, ["---"] * len(heading), *rows]
    escaped = ([cell.replace("|", r"\|") for cell in line] for line in lines)
    return "".join("| " + " | ".join(line) + " |\n" for line in escaped)


def _reasons_table(found: list[Contact]) -> str:
    touched: dict[str, list[Contact]] = {}
    for contact in found:
        touched.setdefault(contact.where, []).append(contact)
    rows = []
    for where, group in sorted(touched.items()):
        what = ", ".join(f"`{name}`" for name in sorted({c.what for c in group}))
        rows.append([f"`{where}`", what, *(group[0].marks.get(mark, "") for mark in REASONS)])
    return _table(["where", "what", "symptom without it", "reason", "remove when"], rows)


def _overrides_table(found: list[Contact]) -> str:
    rows = [[f"`{c.what}`", f"`{c.where}`", c.summary] for c in found if "Overrides" in c.marks]
    return _table(["vLLM's", "ours", "what it adds"], sorted(rows))


def _interfaces_table(found: list[Contact]) -> str:
    members: dict[tuple[str, str], list[str]] = {}
    for contact in found:
        if "Overrides" not in contact.marks and "Implements" in contact.marks:
            owner, _, name = contact.where.rpartition(".")
            members.setdefault((contact.marks["Implements"], owner), []).append(f"`{name}`")
    rows = [
        [f"`{theirs}`", f"`{ours}`", ", ".join(names)]
        for (theirs, ours), names in sorted(members.items())
    ]
    return _table(["vLLM's", "ours", "members"], rows)


def _uses_table(found: list[Contact]) -> str:
    used: dict[str, list[str]] = {}
    for contact in found:
        used.setdefault(contact.what, []).append(f"`{contact.where}`")
    return _table(
        ["vLLM's", "used in"], [[f"`{k}`", ", ".join(v)] for k, v in sorted(used.items())]
    )


def _imports_table(found: list[Contact]) -> str:
    modules: dict[str, list[Contact]] = {}
    for contact in found:
        modules.setdefault(contact.where, []).append(contact)
    rows = [
        [f"`{where}`", group[0].marks.get("vLLM", ""), ", ".join(f"`{c.what}`" for c in group)]
        for where, group in sorted(modules.items())
    ]
    return _table(["module", "for", "names"], rows)
