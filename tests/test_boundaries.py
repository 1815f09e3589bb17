"""Dependencies point one way: engine -> {sidecar -> retrieval, residency, attention} ->
triton_kernels (docs/architecture.md).
"""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "specontext_vllm"
# The providers that wrap vLLM's own attention.
WRAPPERS = {PACKAGE / "attention" / "flash.py", PACKAGE / "attention" / "triton.py"}
ROOMS = {
    "retrieval": {
        "specontext_vllm.config",
        "specontext_vllm.retrieval",
        "specontext_vllm.step_data",
        "specontext_vllm.triton_kernels",
    },
    "residency": {
        "specontext_vllm.config",
        "specontext_vllm.late_copy",
        "specontext_vllm.residency",
        "specontext_vllm.sizes",
        "specontext_vllm.step_data",
        "specontext_vllm.triton_kernels",
    },
    "attention": {
        "specontext_vllm.config",
        "specontext_vllm.attention",
        "specontext_vllm.step_data",
        "specontext_vllm.triton_kernels",
    },
    "observability": {"specontext_vllm.observability", "specontext_vllm.retrieval.counters"},
    "distillation": {
        "specontext_vllm.config",
        "specontext_vllm.distillation",
        "specontext_vllm.model_config",
        "specontext_vllm.retrieval",
        "specontext_vllm.synthetic",
    },
    "synthetic": {"specontext_vllm.synthetic"},
    "demo": {
        "specontext_vllm.demo",
        "specontext_vllm.distillation",
        "specontext_vllm.synthetic",
    },
    "sidecar": {
        "specontext_vllm.config",
        "specontext_vllm.retrieval",
        "specontext_vllm.sidecar",
        "specontext_vllm.step_data",
    },
    "triton_kernels": {"specontext_vllm.step_data", "specontext_vllm.triton_kernels"},
}


def imports(file: Path, package: str) -> set[str]:
    """Dotted names a file imports, anywhere in it."""
    found = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found.add(f"{package}.{node.module}" if node.level else node.module)
    return found


def files(room: str) -> list[Path]:
    return sorted((ROOT if room == "triton_kernels" else PACKAGE).joinpath(room).glob("*.py"))


@pytest.mark.parametrize(
    "file", [f for room in ROOMS for f in files(room)], ids=lambda f: f"{f.parent.name}/{f.name}"
)
def test_a_room_imports_only_what_lies_below_it(file):
    room = file.parent.name
    for name in imports(file, f"specontext_vllm.{room}"):
        if name.startswith("specontext_vllm"):
            assert any(
                name == allowed or name.startswith(allowed + ".") for allowed in ROOMS[room]
            ), f"{file} imports {name}"
        if name == "vllm" or name.startswith("vllm."):
            assert file in WRAPPERS, f"{file} imports {name}"


def test_the_entry_point_imports_nothing_heavy():
    assert imports(PACKAGE / "__init__.py", "specontext_vllm") == {
        "specontext_vllm.engine.registration"
    }
    top = ast.parse((PACKAGE / "__init__.py").read_text()).body
    assert not any(isinstance(node, ast.Import | ast.ImportFrom) for node in top)
