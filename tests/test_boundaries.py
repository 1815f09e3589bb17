"""Imports point one way: engine -> {sidecar -> retrieval, residency, attention} -> triton_kernels
(docs/how-it-works/architecture.md), and never in a circle.
"""

import ast
from collections.abc import Iterable, Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "specontext_vllm"
KERNELS = "specontext_vllm.triton_kernels"
SOURCES = {"specontext_vllm": PACKAGE, KERNELS: ROOT / "triton_kernels"}
# What wraps vLLM's own attention.
WRAPPERS = {
    "specontext_vllm.attention.cpu_prefill",
    "specontext_vllm.attention.flash",
    "specontext_vllm.attention.triton",
}
MAY_IMPORT = {
    "retrieval": {
        "config",
        "cpu_kernels",
        "float8",
        "retrieval",
        "step_data",
        "triton_kernels",
    },
    "retrieval.rules": {"float8", "retrieval.rules", "triton_kernels"},
    "residency": {
        "config",
        "float8",
        "late_copy",
        "residency",
        "sizes",
        "step_data",
        "tier_data",
        "triton_kernels",
    },
    "attention": {
        "config",
        "attention",
        "cpu_kernels",
        "float8",
        "step_data",
        "triton_kernels",
    },
    "cpu_kernels": {"cpu_kernels"},
    "observability": {"observability", "retrieval.counters"},
    "synthetic": {"synthetic"},
    "distillation": {
        "config",
        "distillation",
        "model_config",
        "retrieval",
        "synthetic",
        "triton_kernels",
    },
    "demo": {"config", "demo", "distillation", "extras", "retrieval", "synthetic"},
    "sidecar": {"config", "float8", "retrieval", "sidecar", "step_data"},
    "triton_kernels": {"float8", "step_data", "tier_data", "triton_kernels"},
}
"""For each package, what of specontext_vllm it may import."""


def modules(sources: dict[str, Path]) -> dict[str, Path]:
    """Dotted name -> file of every module below these folders; a package is its __init__.py."""
    found = {}
    for package, folder in sources.items():
        for file in sorted(folder.rglob("*.py")):
            parts = file.relative_to(folder).with_suffix("").parts
            parts = parts[:-1] if parts[-1] == "__init__" else parts
            found[".".join((package, *parts))] = file
    return found


def statements(node: ast.AST) -> Iterator[ast.AST]:
    """All nodes below, in functions too, but not what only a type checker executes."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.If) and "TYPE_CHECKING" in ast.dump(child.test):
            for other in child.orelse:
                yield from statements(other)
            continue
        yield child
        yield from statements(child)


def imports(name: str, file: Path, known: Iterable[str] = ()) -> set[str]:
    """Dotted names that a module imports, anywhere in it; ``from a import b`` is ``a.b`` where that
    is a known module.
    """
    package = name.split(".") if file.name == "__init__.py" else name.split(".")[:-1]
    found = set()
    for node in statements(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) + 1 - node.level] if node.level else []
            base = ".".join([*above, *([node.module] if node.module else [])])
            for alias in node.names:
                inner = f"{base}.{alias.name}"
                found.add(inner if inner in known else base)
    return found


def circles(graph: dict[str, set[str]]) -> list[list[str]]:
    """Sets of nodes that reach one another (Tarjan), sorted; a node's edge to itself is none."""
    index: dict[str, int] = {}
    low: dict[str, int] = {}
    stack: list[str] = []
    found = []

    def visit(node: str) -> None:
        index[node] = low[node] = len(index)
        stack.append(node)
        for other in graph[node]:
            if other not in index:
                visit(other)
            if other in stack:
                low[node] = min(low[node], low[other])
        if low[node] == index[node]:
            together = stack[stack.index(node) :]
            del stack[stack.index(node) :]
            if len(together) > 1:
                found.append(sorted(together))

    for node in graph:
        if node not in index:
            visit(node)
    return sorted(found)


NESTED = ["specontext_vllm.retrieval.rules"]
"""Packages that lie deeper than the package they are in: the settings ask rules for their needs."""


def module_graph(sources: dict[str, Path]) -> dict[str, set[str]]:
    found = modules(sources)
    return {
        name: {other for other in imports(name, file, found) if other in found and other != name}
        for name, file in found.items()
    }


def package_graph(graph: dict[str, set[str]], root: str) -> dict[str, set[str]]:
    """The same between packages: a module directly under the root stands for itself, all else for
    its package under the root, or for one of NESTED.
    """

    def package(name: str) -> str:
        for nested in NESTED:
            if f"{name}.".startswith(f"{nested}."):
                return nested
        return ".".join(name.split(".")[: root.count(".") + 2])

    packages: dict[str, set[str]] = {package(name): set() for name in graph}
    for name, others in graph.items():
        packages[package(name)] |= {package(other) for other in others} - {package(name)}
    return packages


def modules_of(package: str) -> dict[str, Path]:
    name = f"specontext_vllm.{package}"
    return modules({name: SOURCES.get(name, PACKAGE.joinpath(*package.split(".")))})


@pytest.mark.parametrize(
    "package, name", [(p, name) for p in MAY_IMPORT for name in modules_of(p)], ids=lambda x: x
)
def test_a_package_imports_only_what_lies_below_it(package, name):
    for imported in imports(name, modules_of(package)[name]):
        if imported.startswith("specontext_vllm"):
            assert any(
                f"{imported}.".startswith(f"specontext_vllm.{allowed}.")
                for allowed in MAY_IMPORT[package]
            ), f"{name} imports {imported}"
        if imported == "vllm" or imported.startswith("vllm."):
            assert name in WRAPPERS, f"{name} imports {imported}"


@pytest.mark.parametrize("root", ["specontext_vllm", "benchmarks"])
def test_modules_import_one_another_in_no_circle(root):
    sources = SOURCES if root == "specontext_vllm" else {root: ROOT / root}
    assert circles(module_graph(sources)) == []


@pytest.mark.parametrize("root", ["specontext_vllm", "benchmarks"])
def test_packages_import_one_another_in_no_circle(root):
    sources = SOURCES if root == "specontext_vllm" else {root: ROOT / root}
    packages = package_graph(module_graph(sources), root)
    assert circles(packages) == []


def test_a_circle_is_found(tmp_path):
    """At module level, in a function, relative or not; one for a type checker alone is none."""
    (tmp_path / "a.py").write_text("def f():\n    from .b import g\n")
    (tmp_path / "b.py").write_text("import p.c\n")
    (tmp_path / "c.py").write_text("from p import a\n")
    (tmp_path / "d.py").write_text(
        "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from p import e\n"
    )
    (tmp_path / "e.py").write_text("import p.d\n")
    (tmp_path / "q").mkdir()
    (tmp_path / "q" / "__init__.py").write_text("")
    (tmp_path / "q" / "x.py").write_text("import p.d\n")
    graph = module_graph({"p": tmp_path})
    assert circles(graph) == [["p.a", "p.b", "p.c"]]
    graph["p.d"].add("p.q")
    assert circles(graph) == [["p.a", "p.b", "p.c"]]
    assert circles(package_graph(graph, "p")) == [["p.a", "p.b", "p.c"], ["p.d", "p.q"]]


def test_the_entry_point_imports_nothing_heavy():
    assert imports("specontext_vllm", PACKAGE / "__init__.py") == {
        "specontext_vllm.engine.registration"
    }
    top = ast.parse((PACKAGE / "__init__.py").read_text()).body
    assert not any(isinstance(node, ast.Import | ast.ImportFrom) for node in top)
