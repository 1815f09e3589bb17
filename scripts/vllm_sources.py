"""What the installed vLLM defines, read from its sources: importing its workers has side effects,
and one of them needs a GPU.
"""

from __future__ import annotations

import ast
import importlib.util
from functools import cache
from pathlib import Path


@cache
def source_of(module: str) -> ast.Module | None:
    """The parsed source of a module of vLLM; None if there is none."""
    top, *parts = module.split(".")
    # Only a package at the top is looked up: below it, find_spec would import what is above.
    spec = importlib.util.find_spec(top)
    if spec is None or spec.origin is None or not spec.submodule_search_locations:
        return None
    path = Path(spec.origin).parent.joinpath(*parts)
    for file in (path / "__init__.py", path.with_name(f"{path.name}.py")):
        if file.is_file():
            return ast.parse(file.read_text())
    return None


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
